"""What is learned, from one process to the next, on a real disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog

from llm_serve.core.course import Course, Step
from llm_serve.core.evidence import Kind, Place
from llm_serve.core.learned import Key
from llm_serve.core.plan import EnginePlan
from llm_serve.host.state_file import StateFile
from llm_serve.memory import Memory

KEY = Key(settings="f00", vllm="0.32.0", gpus=("cpu: x",), model="folder abc")
ASKED = EnginePlan("m", {"max_model_len": 8192}, {})
RUNG = Step(Kind.kv_cache_too_small, Place.kv_cache, "4096 fit.", {"max_model_len": 4096}, {}, is_rung=True)
COURSE = Course(ASKED, (RUNG,), is_proven=True)


def memory(folder: Path, key: Key = KEY) -> Memory:
    """As a new process opens it."""
    return Memory(StateFile(folder), lambda: key)


def test_a_course_is_there_for_the_next_process(tmp_path: Path) -> None:
    """With its rung, and proven."""
    asyncio.run(memory(tmp_path).remember(COURSE))

    assert COURSE == memory(tmp_path).recall(ASKED)


def test_nothing_learned_is_the_plan_of_the_file(tmp_path: Path) -> None:
    """No file, no word."""
    with structlog.testing.capture_logs() as said:
        assert Course(ASKED) == memory(tmp_path).recall(ASKED)
    assert not said


def test_a_torn_file_costs_its_content_and_one_warning(tmp_path: Path) -> None:
    """The start goes on with the plan of the file."""
    asyncio.run(memory(tmp_path).remember(COURSE))
    path = StateFile(tmp_path).path
    path.write_bytes(path.read_bytes()[:40])

    with structlog.testing.capture_logs() as said:
        assert Course(ASKED) == memory(tmp_path).recall(ASKED)
    assert ["warning"] == [entry["log_level"] for entry in said]
    assert str(path) in said[0]["event"]


def test_another_key_drops_it_with_a_word(tmp_path: Path) -> None:
    """What was learned on another model does not hold."""
    asyncio.run(memory(tmp_path).remember(COURSE))
    other = Key(settings="f00", vllm="0.32.0", gpus=("cpu: x",), model="folder def")

    with structlog.testing.capture_logs() as said:
        assert () == memory(tmp_path, other).recall(ASKED).steps
    assert "model" in said[0]["event"]


def test_a_course_without_steps_removes_the_file(tmp_path: Path) -> None:
    """After a step up to the plan of the file, nothing is left to remember."""
    kept = memory(tmp_path)
    asyncio.run(kept.remember(COURSE))
    asyncio.run(kept.remember(Course(ASKED, (), is_proven=True)))

    assert not StateFile(tmp_path).path.exists()
    assert not kept.was_reset(), "we have removed it ourselves"


def test_a_reset_is_noticed_once(tmp_path: Path) -> None:
    """Somebody removes the file while the process runs."""
    kept = memory(tmp_path)
    asyncio.run(kept.remember(COURSE))
    assert not kept.was_reset()
    StateFile(tmp_path).path.unlink()

    assert [True, False] == [kept.was_reset(), kept.was_reset()]


@pytest.mark.parametrize("course", [COURSE, Course(ASKED)], ids=["write", "forget"])
def test_a_disk_that_refuses_costs_the_memory_only(tmp_path: Path, course: Course) -> None:
    """The recovery that wants to remember goes on, with a warning."""
    (tmp_path / "state").write_text("a file, where a folder should be")
    kept = memory(tmp_path / "state")

    with structlog.testing.capture_logs() as said:
        asyncio.run(kept.remember(course))

    assert bool(course.steps) == any(entry["log_level"] == "warning" for entry in said)
    assert not kept.was_reset()
