"""Asks instances how they are: all at once, so that one that hangs keeps nobody from the others' answers."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm_serve.cli import control
from llm_serve.core.report import Report, has_engine, is_open
from llm_serve.core.vitals import Look, Vitals
from llm_serve.host.names import instance_names
from llm_serve.host.units import Unit, units

OF_ALL_TIMEOUT_S = 2.0
"""How long each of several may take; one that is asked alone may take longer."""
_REMEMBERED = 10
"""Looks from which it is told what binds."""


class Watch:
    """One instance, looked at again and again. Rates are those between two looks."""

    def __init__(self, name: str, timeout_s: float = control.ANSWER_TIMEOUT_S) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._pid: int | None = None
        self._looks: deque[Look] = deque(maxlen=_REMEMBERED)

    def look(self) -> Report:
        """How it is now."""
        path = control.find(self.name)
        try:
            if path is None:
                raise FileNotFoundError(self.name)
            return self._told(path)
        except (OSError, ValueError) as error:
            self._looks.clear()
            return Report(self.name, _state(error), control.silence(error))

    def _told(self, path: Path) -> Report:
        status: dict[str, Any] = json.loads(control.fetch(path, "/status", timeout_s=self._timeout_s))
        metrics = control.fetch(path, "/metrics", timeout_s=self._timeout_s).decode(errors="replace")
        from llm_serve.scrape import look

        now = look(metrics, time.monotonic())
        if status["pid"] != self._pid or now is None:
            self._looks.clear()
            self._pid = status["pid"]
        if now is None:
            return Report.told(status)
        self._looks.append(now)
        return Report.told(status, Vitals.of(self._looks, has_engine=has_engine(status), is_open=is_open(status)))


def _state(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "not shown"
    return "no answer" if isinstance(error, TimeoutError) else "not running"


def look_at_all(watches: Iterable[Watch]) -> list[Report]:
    """How all of them are now, in their order."""
    each = list(watches)
    with ThreadPoolExecutor(max(1, len(each))) as pool:
        return list(pool.map(Watch.look, each))


def twice(watches: Sequence[Watch], interval_s: float) -> list[Report]:
    """As `look_at_all`, with the rates where something is being done: those take two looks, so far apart."""
    reports = look_at_all(watches)
    busy = [place for place, report in enumerate(reports) if _is_busy(report)]
    if busy:
        time.sleep(interval_s)
        for place, report in zip(busy, look_at_all(watches[place] for place in busy), strict=True):
            reports[place] = report
    return reports


def _is_busy(report: Report) -> bool:
    vitals = report.vitals
    return vitals is not None and any((vitals.running, vitals.waiting, vitals.held))


def names() -> tuple[str, ...]:
    """Every instance that runs here, or has a file."""
    return tuple(sorted({*control.find_all(), *instance_names()}))


def with_units(reports: Sequence[Report]) -> list[Report]:
    """The same, and what systemd knows of those whose daemon is not there, with those that only it knows."""
    known = units(report.instance for report in reports)
    told = [_without_daemon(report, known) if report.status is None else report for report in reports]
    others = known.keys() - {report.instance for report in reports}
    only = [Report(name, known[name].state, known[name].why, known[name].since) for name in sorted(others)]
    return told + [report for report in only if report.state != "stopped"]


def _without_daemon(report: Report, known: Mapping[str, Unit]) -> Report:
    unit = known.get(report.instance)
    if report.state != "not running" or unit is None:
        return report
    return Report(report.instance, unit.state, unit.why, unit.since)
