"""A stress test as text: a table for each GPU, and what went wrong in it."""

from __future__ import annotations

from collections.abc import Iterator

from llm_serve.core.stress import TITLES, Range, Row, Verdict
from llm_serve.core.terminal.table import figures, table
from llm_serve.stress.measure import OnGpu, Report

_COLUMNS = figures("test", "verdict", "TFLOPS", "GiB", "iterations", "errors", "°C", "W", "s")
_MARKS = {Verdict.passed: "passed", Verdict.failed: "FAILED", Verdict.stopped: "stopped", Verdict.not_run: "not run"}
NO_SENSOR = "its temperature is not known: heat would not have stopped it"


def as_text(report: Report) -> str:
    """The report for people."""
    return "\n".join(line for on in report.on for line in [*_of(on), ""]) + conclusion(report)


def conclusion(report: Report) -> str:
    """One line for all."""
    seen = report.verdicts
    counts = ", ".join(f"{seen.count(each)} {each}" for each in Verdict if each in seen)
    return f"{counts or 'nothing was run'}, in {report.seconds:.0f} s" + ", interrupted" * report.is_interrupted


def _of(on: OnGpu) -> Iterator[str]:
    yield f"GPU {on.gpu.index}, {on.gpu.name}, limit {on.limit_celsius:.0f} °C"
    yield from table(_COLUMNS, [cells for row in on.rows for cells in _rows(row)])
    for row in on.rows:
        if row.reason:
            yield f"{TITLES[row.found.part]} {row.verdict}: {row.reason}"
    for cause, titles in _slowed(on).items():
        yield f"slowed down by: {cause} ({'all tests' if len(titles) == len(on.rows) else ', '.join(titles)})"
    yield from (f"warning: {words}" for words in warnings(on))


def _slowed(on: OnGpu) -> dict[str, list[str]]:
    """What made it slower than it could be, and in which tests."""
    found: dict[str, list[str]] = {}
    for row in on.rows:
        for cause in row.sight.slowed_by:
            found.setdefault(cause, []).append(TITLES[row.found.part])
    return found


def warnings(on: OnGpu) -> Iterator[str]:
    """What makes the verdicts on one GPU doubtful."""
    if on.samples and all(sample.celsius is None for sample in on.samples):
        yield NO_SENSOR


def _rows(row: Row) -> Iterator[tuple[str, ...]]:
    """One; and where several formats were measured, one for each."""
    found, sight = row.found, row.sight
    rates = {name: f"{value:.1f}" for name, value in found.tflops.items()}
    is_one = len(rates) == 1
    yield (
        TITLES[found.part],
        _MARKS[row.verdict],
        next(iter(rates.values())) if is_one else "",
        f"{found.allocated_bytes / 2**30:.1f}" if found.allocated_bytes else "",
        *((str(found.iterations), str(found.errors)) if row.verdict is not Verdict.not_run else ("", "")),
        span(sight.celsius),
        span(sight.watts),
        f"{found.seconds:.1f}" if found.seconds else "",
    )
    for name, rate in rates.items() if not is_one else ():
        yield (f"  {name}", "", rate, *[""] * (len(_COLUMNS) - 3))


def span(seen: Range) -> str:
    """43-79, or one number where it did not change."""
    if seen.least is None or seen.most is None:
        return ""
    ends = dict.fromkeys((f"{seen.least:.0f}", f"{seen.most:.0f}"))
    return "-".join(ends)
