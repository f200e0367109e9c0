"""Errors: their exit status, and how problems read."""

from __future__ import annotations

import pickle

import pytest

from llm_serve.core.errors import (
    ConfigError,
    EngineStartError,
    GaveUp,
    HostError,
    LlmServeError,
    Problem,
)

PROBLEM = Problem("a.toml", 12, "engine.x", "unknown option", "Did you mean y?")


@pytest.mark.parametrize(
    ("kind", "status"),
    [(LlmServeError, 70), (ConfigError, 78), (HostError, 75), (EngineStartError, 70), (GaveUp, 70)],
)
def test_each_error_has_the_exit_status_that_the_unit_knows(kind: type[LlmServeError], status: int) -> None:
    """The exit status is what systemd decides by."""
    assert status == kind.exit_status


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (PROBLEM, "a.toml:12: engine.x: unknown option. Did you mean y?"),
        (Problem("a.toml", None, "model", "is required"), "a.toml: model: is required"),
        (Problem("a.toml", 3, "", "not TOML"), "a.toml:3: not TOML"),
        (Problem("a.toml", 3, "x", "is odd!", "Do so."), "a.toml:3: x: is odd! Do so."),
    ],
)
def test_a_problem_reads_as_place_option_reason_and_remedy(problem: Problem, words: str) -> None:
    """A problem begins with file:line, which editors and terminals follow."""
    assert words == str(problem)


def test_a_config_error_lists_all_its_problems() -> None:
    """One line a problem, in their order."""
    other = Problem("a.toml", 13, "engine.z", "is odd")

    assert f"{PROBLEM}\n{other}" == str(ConfigError([PROBLEM, other]))


def test_a_config_error_survives_the_way_between_processes() -> None:
    """Its problems are whole after pickling."""
    copied = pickle.loads(pickle.dumps(ConfigError([PROBLEM])))

    assert copied.problems == (PROBLEM,)
