"""What `top` draws: one frame, as lines that fit into the window, from what was seen so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_serve.core.report import Report, is_open
from llm_serve.core.terminal import words
from llm_serve.core.terminal.cells import between, cells, clip, pad, plain
from llm_serve.core.terminal.overview import overview, plan
from llm_serve.core.terminal.sparkline import sparkline
from llm_serve.core.vitals import Vitals

_REMEMBERED = 600
_LABEL, _VALUE = 14, 20
_LEAST_SPARK = 8


@dataclass(frozen=True, slots=True)
class Window:
    """The place to draw in, in cells, and the moment: a Unix time, and as a clock shows it.

    Without a `height` the frame is as long as there is something to say, and nobody has keys to press.
    """

    width: int
    height: int | None
    now: float
    clock: str
    every_s: float


class History:
    """What one instance has been seen doing: the last report of its daemon, and each figure's last values."""

    def __init__(self) -> None:
        self.last: Report | None = None
        """Of a daemon that answered."""
        self.silent_since: float | None = None
        """Since when nobody answers, as a Unix time."""
        self._values: dict[str, deque[float | None]] = {}

    def add(self, report: Report, now: float) -> None:
        """Take one more report, of every interval one, also where nobody answered."""
        if report.status is not None:
            self.last, self.silent_since = report, None
        elif self.silent_since is None:
            self.silent_since = now
        for name, value in _figures(report).items():
            self.of(name).append(value)

    def of(self, name: str) -> deque[float | None]:
        """The values of a figure, the newest last."""
        return self._values.setdefault(name, deque(maxlen=_REMEMBERED))


def _figures(report: Report) -> dict[str, float | None]:
    vitals, status = report.vitals or Vitals(), report.status or {}
    gpus = {f"gpu {gpu['index']}": gpu["utilization_ratio"] for gpu in status.get("gpus", ())}
    return {
        "running": vitals.running,
        "waiting": vitals.waiting,
        "held": status.get("requests_held"),
        "kv": vitals.kv_cache_usage,
        "generated": vitals.generated_per_s,
        "prompt": vitals.prompt_per_s,
        "ttft": vitals.ttft_p99_s,
    } | gpus


def one(report: Report, history: History, window: Window) -> list[str]:
    """A frame of one instance. While nobody answers, it shows what was last known."""
    last = history.last or report
    body = [*_head(report, history, window), *(_body(last, report.vitals, history, window) if last.status else ())]
    return _cut(body, window, f"q quits; every {window.every_s:g} s")


def many(reports: Sequence[Report], window: Window) -> list[str]:
    """A frame of all instances."""
    head = between(f"{len(reports)} instance(s)", window.clock, window.width)
    body = [head, "", *overview(reports, window.now, window.width)]
    return _cut(body, window, f"q quits; every {window.every_s:g} s; `llm-serve top NAME` shows one")


def _cut(body: Sequence[str], window: Window, foot: str) -> list[str]:
    """The lines that there is room for, none longer than the window is wide, and the foot at its end if it fits."""
    lines = [clip(line, window.width).rstrip() for line in body[: window.height]]
    if window.height is not None and len(lines) < window.height:
        lines += [""] * (window.height - len(lines) - 1) + [clip(foot, window.width)]
    return lines


def _head(report: Report, history: History, window: Window) -> Iterator[str]:
    if history.silent_since is None or report.status is not None:
        since = words.age(window.now - report.since) if report.since is not None else "-"
        said = f"{report.instance}: {report.state} for {since}: {report.why}"
    else:
        silent = words.age(window.now - history.silent_since)
        said = f"{report.instance}: {report.state} for {silent}; this goes on when it is back"
    yield between(plain(said), window.clock, window.width)


def _body(last: Report, now: Vitals | None, history: History, window: Window) -> Iterator[str]:
    status = last.status or {}
    yield plain(f"{status['model']} on {status['listen']}, vLLM {status['vllm_version']}")
    yield plain(f"plan {plan(status)}, rung {status['rung']}, engine start {status['engine_starts']}{_stopped(status)}")
    yield _limit(now) if is_open(status) else f"limit: none is looked for while it is {plain(status['state'])}"
    yield ""
    yield from _load(status, now or Vitals(), history, window.width)
    if status["gpus"]:
        yield ""
    for gpu in status["gpus"]:
        yield _gpu(gpu, history, window.width)
    yield ""
    yield from _failures(status, window.now)


def _stopped(status: Mapping[str, Any]) -> str:
    """Why nothing is let in, or how far a start has come."""
    if status["is_drained"]:
        return "; admission is stopped by hand"
    if status["too_hot"]:
        return f"; {status['too_hot']}"
    return "" if status["progress"] >= 1 else f"; {status['phase']}, {status['progress']:.0%}"


def _limit(now: Vitals | None) -> str:
    if now is None or now.limit is None:
        return "limit: not known"
    return plain(f"limit: {now.limit.limit.value}: {now.limit.evidence[0]}")


def _load(status: Mapping[str, Any], now: Vitals, history: History, width: int) -> Iterator[str]:
    most = now.max_num_seqs or status["max_num_seqs"]
    of = f" of {most:.0f}" if most else ""
    cached = f", {words.share(now.prefix_cache_hits)} cached" if now.prefix_cache_hits is not None else ""
    first = f"{words.seconds(now.ttft_p50_s)} / {words.seconds(now.ttft_p99_s)}"
    rows = (
        ("running", words.whole(now.running) + of, "running", most),
        ("waiting", words.whole(now.waiting), "waiting", None),
        ("held", f"{status['requests_held']} of {status['requests_in_flight']} in flight", "held", None),
        ("KV cache", f"{words.share(now.kv_cache_usage)} full", "kv", 1.0),
        ("generated", f"{words.number(now.generated_per_s)} tokens/s", "generated", None),
        ("prompt", f"{words.number(now.prompt_per_s)} tokens/s{cached}", "prompt", None),
        ("TTFT P50/P99", first, "ttft", None),
    )
    for label, value, name, top in rows:
        left = pad(pad(label, _LABEL) + value, _LABEL + _VALUE)
        yield left + "  " + sparkline(history.of(name), width - cells(left) - 2, top)


def _gpu(gpu: Mapping[str, Any], history: History, width: int) -> str:
    """Its sensors in columns; then what slows it down, or how busy it was."""
    heat, watts, limit, busy = (
        gpu[name] for name in ("temperature_celsius", "power_watts", "power_limit_watts", "utilization_ratio")
    )
    memory = words.gib(gpu["memory_used_bytes"], gpu["memory_total_bytes"])
    figures = (
        (f"GPU {gpu['index']}", 6),
        (f"{words.whole(heat)} °C", 6),
        (words.whole(watts) + (f" of {limit:.0f}" if limit else "") + " W", 13),
        (memory, 18),
        (words.share(busy), 4),
    )
    left = "  ".join(pad(value, size, right=place > 0) for place, (value, size) in enumerate(figures))
    if gpu["slowed_by"]:
        return left + "  " + plain("slowed down by: " + ", ".join(gpu["slowed_by"]))
    room = width - cells(left) - 2
    return left + "  " + sparkline(history.of(f"gpu {gpu['index']}"), room, 1.0) if room >= _LEAST_SPARK else left


def _failures(status: Mapping[str, Any], now: float) -> Iterator[str]:
    if not status["failures"]:
        yield "no failure since the daemon started"
    for each in status["failures"]:
        failure = each["failure"]
        yield plain(f"{words.age(now - each['time'])} ago: {failure['kind']}: {failure['detail']}")
