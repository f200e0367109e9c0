"""All instances in one table, a line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_serve.core.report import Report
from llm_serve.core.terminal import words
from llm_serve.core.terminal.table import Column, table
from llm_serve.core.vitals import Vitals

_COLUMNS = (
    Column("instance"),
    Column("state"),
    Column("for", 3),
    Column("model", 7),
    Column("plan", 6),
    Column("rung", 5, right=True),
    Column("run", right=True),
    Column("wait", right=True),
    Column("held", 1, right=True),
    Column("KV", 1, right=True),
    Column("tokens/s", 2, right=True),
    Column("GPU", 4),
    Column("last failure", 8),
)


def overview(reports: Sequence[Report], now: float, width: int | None = None) -> list[str]:
    """The table, for the Unix time `now`; in `width` cells it has fewer columns, and its last is cut."""
    return table(_COLUMNS, [_row(report, now) for report in reports], width)


def _row(report: Report, now: float) -> tuple[str, ...]:
    since = "-" if report.since is None else words.age(now - report.since)
    status, vitals = report.status, report.vitals or Vitals()
    if status is None:
        return (report.instance, report.state, since, *["-"] * 9, report.why)
    return (
        report.instance,
        report.state,
        since,
        _model(status["model"]),
        plan(status),
        str(status["rung"]),
        words.whole(vitals.running),
        words.whole(vitals.waiting),
        str(status["requests_held"]),
        words.share(vitals.kv_cache_usage),
        words.number(vitals.generated_per_s),
        _gpus(status["gpus"]),
        last_failure(status, now),
    )


def _model(name: str) -> str:
    """Of a folder its last part."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name


def plan(status: Mapping[str, Any]) -> str:
    """Longest request in tokens x most at once; what is not said yet is vLLM's choice."""
    length, most = status["max_model_len"], status["max_num_seqs"]
    return "-" if length is None and most is None else f"{length or 'auto'} x {most or 'auto'}"


def last_failure(status: Mapping[str, Any], now: float) -> str:
    """Its kind and age; what an earlier daemon has seen is its own affair."""
    if not status["failures"]:
        return "none"
    newest = status["failures"][0]
    failure = newest["failure"]
    return f"{words.age(now - newest['time'])} ago: {failure['kind']}: {failure['detail']}"


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> str:
    """The hottest one's temperature, and the power and memory of all."""
    if not gpus:
        return "-"
    hottest = max((gpu["temperature_celsius"] for gpu in gpus if gpu["temperature_celsius"] is not None), default=None)
    watts, used, total = (_sum(gpus, name) for name in ("power_watts", "memory_used_bytes", "memory_total_bytes"))
    said = (
        f"{len(gpus)} x" if len(gpus) > 1 else "",
        "" if hottest is None else f"{hottest:.0f} °C",
        "" if watts is None else f"{watts:.0f} W",
        "" if used is None else words.gib(used, total),
    )
    return " ".join(filter(None, said)) or "-"


def _sum(gpus: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [gpu[name] for gpu in gpus if gpu[name] is not None]
    return sum(known) if known else None
