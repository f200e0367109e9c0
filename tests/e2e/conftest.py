"""Daemons for the tests: shared by those that leave them serving, or fresh; never two at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import Daemon, Tables

SHARED: Tables = {
    "server": {"anthropic_messages": True},
    "limits": {"allow": ["prompt_logprobs"]},
    "engine": {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
    # Its tests kill the engine, more often in all than an hour should have it.
    "recovery": {"restart_limit": 100},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the users of the shared daemon together: each change of daemon costs a start."""
    mine = [item for item in items if "e2e" in item.path.parts]
    ordered = iter(sorted(mine, key=lambda item: "shared" not in getattr(item, "fixturenames", ())))
    items[:] = [next(ordered) if "e2e" in item.path.parts else item for item in items]


class Stage:
    """At most one daemon runs here, and it runs on for as long as the same one is asked for."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._running: Daemon | None = None
        self._tables: Tables | None = None

    def reuse(self, tables: Tables) -> Daemon:
        """A ready daemon with these settings."""
        if self._running is None or self._tables != tables:
            self.clear()
            self._running, self._tables = Daemon(self.model, tables).start(), tables
        return self._running.wait_ready()

    def take(self, tables: Tables) -> Daemon:
        """The same, for a test that may end it; `clear` still removes what is left of it."""
        daemon, self._tables = self.reuse(tables), None
        return daemon

    def clear(self) -> None:
        """End what runs."""
        if self._running is not None:
            running, self._running = self._running, None
            running.destroy()


@pytest.fixture(scope="session")
def model() -> Path:
    """The folder of the embedded model, made once on this machine."""
    return ensure_demo_model(default_cache(os.environ), print)


@pytest.fixture(scope="session")
def stage(model: Path) -> Iterator[Stage]:
    """Who may run."""
    stage = Stage(model)
    yield stage
    stage.clear()


@pytest.fixture
def shared(stage: Stage) -> Daemon:
    """A ready daemon that other tests use too: leave it serving."""
    return stage.reuse(SHARED)


@pytest.fixture
def daemon(stage: Stage) -> Iterator[Callable[..., Daemon]]:
    """A maker of daemons of this test's own. The last one made is the one that runs."""
    made: list[Daemon] = []

    def make(tables: Tables | None = None, **options: Any) -> Daemon:
        stage.clear()
        for earlier in made:
            earlier.destroy()
        made.append(Daemon(options.pop("model", stage.model), tables, **options).start())
        return made[-1]

    yield make
    for each in made:
        each.destroy()
