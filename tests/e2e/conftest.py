"""Daemons for the tests: one shared by all that only ask it something, and fresh ones; never two at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import Daemon

SHARED = {
    "server": {"anthropic_messages": True},
    "engine": {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the users of the shared daemon together: each change of daemon costs a start."""
    mine = [item for item in items if "e2e" in item.path.parts]
    ordered = iter(sorted(mine, key=lambda item: "shared" not in getattr(item, "fixturenames", ())))
    items[:] = [next(ordered) if "e2e" in item.path.parts else item for item in items]


class Stage:
    """At most one daemon runs here."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._shared: Daemon | None = None

    def shared(self) -> Daemon:
        """The shared daemon, ready."""
        if self._shared is None:
            self._shared = Daemon(self.model, SHARED).start()
        return self._shared.wait_ready()

    def clear(self) -> None:
        """End the shared daemon, if it runs."""
        if self._shared is not None:
            shared, self._shared = self._shared, None
            shared.destroy()


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
    return stage.shared()


@pytest.fixture
def daemon(stage: Stage) -> Iterator[Callable[..., Daemon]]:
    """A maker of daemons of this test's own. The last one made is the one that runs."""
    made: list[Daemon] = []

    def make(tables: Any = None, **options: Any) -> Daemon:
        stage.clear()
        for earlier in made:
            earlier.destroy()
        made.append(Daemon(options.pop("model", stage.model), tables, **options).start())
        return made[-1]

    yield make
    for each in made:
        each.destroy()
