"""A load test as a picture: throughput, and the times of requests, over the load."""

from __future__ import annotations

from pathlib import Path

from llm_serve.bench.measure import Report
from llm_serve.bench.report import what
from llm_serve.core.figures import Figures, Spread
from llm_serve.picture import new_figure

_Times = tuple[tuple[str, str, float], ...]
_TIMES: _Times = (("TTFT, ms", "ttft_s", 1000), ("TPOT, ms", "tpot_s", 1000), ("latency, s", "latency_s", 1))


def write_png(report: Report, path: Path) -> None:
    """Write the picture. Raises OSError where that cannot be."""
    steps = [each.figures for each in report.steps]
    places = [step.rate if step.rate is not None else float(step.streams or 0) for step in steps]
    figure = new_figure(f"{report.model}: {what(report)}")
    axes = figure.subplots(2, 2)
    rates = axes[0, 0]
    rates.plot(places, [step.requests_per_s for step in steps], marker="o")
    rates.set_ylabel("requests/s")
    for axis, (label, name, factor) in zip((axes[0, 1], axes[1, 0], axes[1, 1]), _TIMES, strict=True):
        for line in ("p50", "p99"):
            axis.plot(places, [_value(step, name, line) * factor for step in steps], marker="o", label=line.upper())
        axis.set_ylabel(label)
        axis.legend()
    for axis in axes.flat:
        axis.set_xlabel("requests/s offered" if steps and steps[0].rate is not None else "streams")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _value(step: Figures, name: str, line: str) -> float:
    """NaN, which leaves a gap, where it is not known."""
    spread: Spread = getattr(step, name)
    value: float | None = getattr(spread, line)
    return float("nan") if value is None else value
