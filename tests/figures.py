"""Figures of tests that measure: one row a fault, as a table at the end of the run, and as JSON where that is wanted."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon, eventually

ROWS: list[dict[str, Any]] = []
_NAMES = ("row", "fault")


class Watch:
    """Times what follows on a fault, for one row of the table."""

    def __init__(self, row: str, fault: str) -> None:
        self._row: dict[str, Any] = {"row": row, "fault": fault}
        self._began = time.monotonic()
        ROWS.append(self._row)

    @property
    def passed_s(self) -> float:
        """Seconds since the fault."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Now the fault happens."""
        self._began = time.monotonic()

    def mark(self, what: str) -> None:
        """Now this has been seen."""
        self._row[f"{what} after s"] = round(self.passed_s, 2)

    def detected(self, daemon: Daemon, within_s: float) -> None:
        """Wait until the daemon has noticed: it is not ready any more."""
        eventually(
            lambda: daemon.http.get("/readyz").status_code, lambda code: code == 503, within_s=within_s, what="notice"
        )
        self.mark("detected")

    def serving(self, daemon: Daemon, within_s: float = 120) -> None:
        """Wait until a request is answered again."""
        eventually(
            lambda: daemon.chat("Hi.", max_tokens=1).status_code,
            lambda code: code == 200,
            within_s=within_s,
            what="an answer",
        )
        self.mark("serving")
        self.note(daemon)

    def note(self, daemon: Daemon) -> None:
        """Starts and rung, as /status has them."""
        status = daemon.status()
        self._row |= {"starts": status["engine_starts"], "rung": status["rung"]}

    def figure(self, **values: Any) -> None:
        """Further figures of this row."""
        self._row |= values


def watch_of(request: pytest.FixtureRequest) -> Watch:
    """The row of a test, named by its marker `row` and by what it is parametrised with."""
    row = request.node.get_closest_marker("row")
    assert row is not None, "a test that measures names its row"
    number, fault = row.args
    values = getattr(request.node, "callspec", None)
    varied = [str(value) for name, value in values.params.items() if name != "repeat"] if values else []
    return Watch(number, " ".join([fault, *(f"[{value}]" for value in varied)]))


def report(write: Callable[[str], None]) -> None:
    """Write the table, repeated rows as p50 and maximum; and all of it to the file that LLM_SERVE_FIGURES names."""
    rows, ROWS[:] = list(ROWS), []
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["row"], row["fault"]].append(row)
    for (number, fault), same in sorted(by_name.items(), key=lambda item: item[0][0].zfill(3)):
        names = dict.fromkeys(name for row in same for name in row if name not in _NAMES)
        write(f"{number:>4}  {fault:48} { ({name: _summary(row.get(name) for row in same) for name in names}) }")
    if rows and (path := os.environ.get("LLM_SERVE_FIGURES")):
        Path(path).write_text(json.dumps(rows, indent=1))


def _summary(values: Iterable[Any]) -> Any:
    """One value as it is; of more, p50, maximum and how many."""
    found = [value for value in values if value is not None]
    if len(found) == 1:
        return found[0]
    if all(isinstance(value, int | float) for value in found):
        return f"p50 {statistics.median(found):g}, max {max(found):g} (of {len(found)})"
    return found
