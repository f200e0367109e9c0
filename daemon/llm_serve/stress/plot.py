"""A stress test as a picture: temperature, power and speed of each GPU over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_serve.core.stress import Part, Sample
from llm_serve.picture import new_figure
from llm_serve.stress.measure import Report
from llm_serve.stress.report import conclusion

_ROWS = (("°C", "celsius"), ("W", "watts"), ("TFLOPS", "tflops"))
_SHADES = ("0.93", "0.87")
_NAMES_APART = 0.025


def write_png(report: Report, path: Path) -> None:
    """Write the picture. Raises OSError where that cannot be."""
    names = dict.fromkeys(on.gpu.name for on in report.on)
    figure = new_figure(f"{', '.join(names)}: {conclusion(report)}")
    plots = figure.subplots(len(_ROWS), 1, sharex=True)
    for (label, name), axis in zip(_ROWS, plots, strict=True):
        for number, on in enumerate(report.on):
            color = f"C{number % 10}"
            times = [sample.at_s for sample in on.samples]
            axis.plot(times, [_value(sample, name) for sample in on.samples], color=color, label=f"GPU {on.gpu.index}")
            if name == "celsius":
                axis.axhline(on.limit_celsius, color=color, linestyle=":", linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        # The tests of one GPU; those of others are a little before or behind.
        _shade(axis, report.on[0].samples if report.on else [], is_named=axis is plots[0])
    # By themselves the axes would leave out times of which no value is known, with the names of the tests far outside.
    plots[0].set_xlim(0, max((sample.at_s for on in report.on for sample in on.samples), default=0.0) or 1.0)
    plots[0].legend(loc="lower right")
    plots[-1].set_xlabel("s")
    figure.savefig(path, format="png", dpi=120)


def _shade(axis: Any, samples: list[Sample], *, is_named: bool) -> None:
    spans: dict[Part, list[float]] = {}
    for sample in samples:
        if sample.part is not None:
            spans.setdefault(sample.part, []).append(sample.at_s)
    seen_s = [sample.at_s for sample in samples]
    free_s, apart_s = 0.0, _NAMES_APART * (max(seen_s) - min(seen_s) if seen_s else 0.0)
    for number, (part, times) in enumerate(spans.items()):
        axis.axvspan(times[0], times[-1], color=_SHADES[number % 2], zorder=0)
        if is_named:
            free_s = max(free_s, times[0])  # a short test leaves its name too little room
            axis.annotate(part, (free_s, 1), xycoords=("data", "axes fraction"), rotation=40, fontsize="small")
            free_s += apart_s


def _value(sample: Sample, name: str) -> float:
    """NaN, which leaves a gap, where it is not known."""
    value: float | None = getattr(sample, name)
    return float("nan") if value is None else value
