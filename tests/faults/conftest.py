"""Daemons to be hurt, and faults made on cue."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import Daemon
from tests.figures import ROWS, Watch, report, watch_of

_INJECT = Path(__file__).parent / "inject"


class Fault:
    """A fault of inject/sitecustomize.py: armed by writing its file, and then verified to have happened."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "fault.json"

    @property
    def environ(self) -> dict[str, str]:
        """What a daemon must be started with, for its processes to be able to fail."""
        here, daemon = str(_INJECT), str(Path(__file__).parents[2] / "daemon")
        return {"LLM_SERVE_FAULT_FILE": str(self._file), "PYTHONPATH": f"{here}:{daemon}"}

    def arm(self, at: str, do: str, *, times: int = 1, after: int = 0, token: int | None = None) -> None:
        """From now on `at` does this, so many times, once it was passed so often; with `token`, for such prompts only."""
        self.made_file.unlink(missing_ok=True)
        self._file.write_text(json.dumps({"at": at, "do": do, "times": times, "after": after, "token": token}))

    def disarm(self) -> None:
        """Nothing more happens."""
        self._file.unlink(missing_ok=True)

    @property
    def made_file(self) -> Path:
        """One line for each fault that was made."""
        return Path(f"{self._file}.made")

    @property
    def made(self) -> int:
        """How often the fault has happened."""
        lines = self.made_file.read_text().splitlines() if self.made_file.exists() else []
        return sum(line != "passed" for line in lines)

    @property
    def said(self) -> str:
        """What came of it, for a fault that says so."""
        return Path(f"{self._file}.said").read_text()


@pytest.fixture
def fault(tmp_path: Path) -> Fault:
    """A fault that can be armed."""
    return Fault(tmp_path)


@pytest.fixture(scope="session")
def model() -> Path:
    """The folder of the embedded model, made once on this machine."""
    return ensure_demo_model(default_cache(os.environ), print)


@pytest.fixture
def daemon(model: Path) -> Iterator[Callable[..., Daemon]]:
    """A maker of daemons of this test's own."""
    made: list[Daemon] = []

    def make(tables: Any = None, **options: Any) -> Daemon:
        made.append(Daemon(options.pop("model", model), tables, **options).start())
        return made[-1]

    yield make
    for each in made:
        each.destroy()


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """The row of this test in the table of figures."""
    return watch_of(request)


def engine_core(daemon: Daemon) -> int:
    """The pid of EngineCore: the engine's process that the others were started for."""
    return int(min(daemon.status()["engine_pids"]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """LLM_SERVE_REPEAT=10 runs each test ten times; the table then has p50 and maximum."""
    if (times := int(os.environ.get("LLM_SERVE_REPEAT", "1"))) > 1:
        metafunc.fixturenames.append("repeat")
        metafunc.parametrize("repeat", range(times))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if ROWS:
        terminalreporter.write_sep("=", "faults")
        report(terminalreporter.write_line)
