"""Daemons to be hurt, faults made on cue, and the table of figures at the end of the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import Daemon, eventually

_INJECT = Path(__file__).parent / "inject"
_ROWS: list[dict[str, Any]] = []


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


class Watch:
    """Times what follows on a fault, for one row of the table."""

    def __init__(self, row: str, fault: str) -> None:
        self._row: dict[str, Any] = {"row": row, "fault": fault}
        self._began = time.monotonic()

    def begin(self) -> None:
        """Now the fault happens."""
        self._began = time.monotonic()

    def detected(self, daemon: Daemon, within_s: float) -> None:
        """Wait until the daemon has noticed: it is not ready any more."""
        eventually(
            lambda: daemon.http.get("/readyz").status_code, lambda code: code == 503, within_s=within_s, what="notice"
        )
        self._row["detected after s"] = round(time.monotonic() - self._began, 2)

    def serving(self, daemon: Daemon, within_s: float = 120) -> None:
        """Wait until a request is answered again."""
        eventually(
            lambda: daemon.chat("Hi.", max_tokens=1).status_code,
            lambda code: code == 200,
            within_s=within_s,
            what="an answer",
        )
        self._row["serving after s"] = round(time.monotonic() - self._began, 2)
        self.note(daemon)

    def note(self, daemon: Daemon) -> None:
        """Starts and rung, as /status has them."""
        status = daemon.status()
        self._row |= {"starts": status["engine_starts"], "rung": status["rung"]}

    def figure(self, **values: Any) -> None:
        """Further figures of this row."""
        self._row |= values


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """The row of this test, named by its marker `row`."""
    row = request.node.get_closest_marker("row")
    assert row is not None, "a test of a fault names its row"
    watch = Watch(*row.args)
    _ROWS.append(watch._row)
    return watch


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, and as JSON where LLM_SERVE_FIGURES says."""
    if not _ROWS:
        return
    terminalreporter.write_sep("=", "faults")
    for row in sorted(_ROWS, key=lambda row: str(row["row"]).zfill(3)):
        rest = {key: value for key, value in row.items() if key not in ("row", "fault")}
        terminalreporter.write_line(f"{row['row']:>4}  {row['fault']:44} {rest}")
    if path := os.environ.get("LLM_SERVE_FIGURES"):
        Path(path).write_text(json.dumps(_ROWS, indent=1))
