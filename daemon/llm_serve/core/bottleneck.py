"""What limits a server under load, told from what it says of itself meanwhile: the limit, its evidence, what to try.

The rules are tried in order, and the first that holds names the limit:

1. nothing was answered, the load generator was the slow one, or the step was over before its answers were: the figures
   say nothing of the server;
2. the KV cache: it was full with requests waiting, or requests were thrown out of it (preemptions);
3. the front end: its process used a core up, or held requests that the engine knew nothing of;
4. `max_num_seqs`: the batch was full, others waited, and the KV cache had room for more of them;
5. compute: more ran at once than in an earlier step, and hardly more came out;
6. the load: nobody waited, so more of it is needed to meet a limit.

4 gives way to 5 where a larger batch has been tried and did not help: then raising `max_num_seqs` would not either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from llm_serve.core.figures import Figures, percentile

_FULL_CACHE, _FULL_BATCH, _BUSY_CORE = 0.9, 0.95, 0.9
_MANY = 8
"""Places of which one is free at most times: its request has ended, and the next one is on its way."""
_UNSEEN = 0.25
"""Share of the streams that the engine may know nothing of: on their way, or just answered."""
_LATENCIES = 1.5
"""Latencies that a step lasts at least, if what was seen in it is to be more than how it began."""
_HARDLY = 0.2
"""Tokens/s gained, as a share of what they would be if all grew alike."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a server's /metrics said at one moment (seconds of the samples' clock). None is not told."""

    at_s: float
    running: float | None = None
    waiting: float | None = None
    held: float | None = None
    kv_cache_usage: float | None = None
    preemptions: float | None = None
    max_num_seqs: float | None = None
    gpu_utilization: float | None = None
    front_end_cpu_s: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was observed during one step: medians, unless the name says otherwise. None is not known."""

    observations: int
    running: float | None = None
    running_most: float | None = None
    waiting: float | None = None
    held: float | None = None
    kv_cache_most: float | None = None
    preemptions: float | None = None
    max_num_seqs: int | None = None
    gpu_utilization: float | None = None
    front_end_cpu_share: float | None = None

    @property
    def queued(self) -> float:
        """Those who wait, in the engine and at the gate before it."""
        return (self.waiting or 0.0) + (self.held or 0.0)

    @property
    def is_batch_full(self) -> bool:
        """True when no place was free, but for one that changes hands; where nobody tells their number, it may be."""
        slots = self.max_num_seqs
        if slots is None:
            return True
        return (self.running or 0.0) >= (min(_FULL_BATCH * slots, slots - 1) if slots >= _MANY else slots)

    @classmethod
    def of(cls, seen: Sequence[Observation]) -> Evidence:
        """Sum up the observations of one step, in their order."""
        running, kv, most = (_known(seen, name) for name in ("running", "kv_cache_usage", "max_num_seqs"))
        cpu_s = _grown(seen, "front_end_cpu_s")
        passed_s = seen[-1].at_s - seen[0].at_s if seen else 0.0
        return cls(
            observations=len(seen),
            running=_median(running),
            running_most=max(running, default=None),
            waiting=_median(_known(seen, "waiting")),
            held=_median(_known(seen, "held")),
            kv_cache_most=max(kv, default=None),
            preemptions=_grown(seen, "preemptions"),
            max_num_seqs=int(most[-1]) if most else None,
            gpu_utilization=_median(_known(seen, "gpu_utilization")),
            front_end_cpu_share=cpu_s / passed_s if cpu_s is not None and passed_s > 0 else None,
        )


def _known(seen: Sequence[Observation], name: str) -> list[float]:
    return [value for each in seen if (value := getattr(each, name)) is not None]


def _median(values: Sequence[float]) -> float | None:
    return percentile(values, 0.5) if values else None


def _grown(seen: Sequence[Observation], name: str) -> float | None:
    """How much a counter grew; one that fell began anew with its process, and then nothing is known."""
    values = _known(seen, name)
    return values[-1] - values[0] if len(values) > 1 and values == sorted(values) else None


class Limit(StrEnum):
    """What binds."""

    nothing_answered = "nothing answered"
    generator = "the load generator"
    kv_cache = "KV cache"
    front_end = "front end"
    max_num_seqs = "max_num_seqs"
    compute = "compute"
    load = "the load"
    unknown = "not known"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limits the server in the largest step: the evidence, what to try, and what could not be known."""

    limit: Limit
    evidence: tuple[str, ...]
    advice: str
    not_known: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """One step: its figures, and what the server said meanwhile; None where it has no /metrics for us."""

    figures: Figures
    evidence: Evidence | None


def judge(steps: Sequence[Measured]) -> Verdict:
    """Name the limit in the last of the steps, which go from little load to much."""
    last, seen = steps[-1].figures, steps[-1].evidence
    if not last.answered:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in last.errors.items()) or "no request ended in time"
        return Verdict(Limit.nothing_answered, (f"{last.load}: {kinds}",), "Look at the server's log first.")
    if last.generator.is_busy:
        advice = "Measure again, with several at once or on a faster machine: these are not the server's figures."
        return Verdict(Limit.generator, (f"it used {last.generator.cpu_share:.0%} of a core",), advice)
    gain, latency_s = _gain(steps), last.latency_s.p50 or 0.0
    if last.seconds < _LATENCIES * latency_s:
        short = f"{last.load}: an answer took {latency_s:.1f} s, and all of it was seen for {last.seconds:.1f} s"
        return Verdict(Limit.unknown, (short,), f"Measure for longer: --seconds {3 * latency_s:.0f}.")
    if seen is None or seen.running is None:
        return _without_metrics(last, gain)
    found = next(verdict for rule in _RULES if (verdict := rule(last.streams, seen, gain)) is not None)
    return Verdict(found.limit, found.evidence, found.advice, tuple(_gaps(seen)))


def binding(seen: Evidence) -> Verdict | None:
    """What limits a server now, from what it says of itself alone; None where it tells nothing.

    That compute is the limit shows only where two loads are compared: where the batch is full, so much is said.
    """
    if seen.running is None:
        return None
    rules = (rule(None, seen, None) for rule in (_kv_cache, _front_end, _max_num_seqs))
    found = next((verdict for verdict in rules if verdict is not None), None)
    if found is not None and found.limit is Limit.max_num_seqs:
        return replace(found, advice=f"{found.advice} Whether a larger batch pays, or compute binds, `bench` tells.")
    return found or (_load(None, seen, None) if seen.queued else Verdict(Limit.load, (_batch(seen),), _NOBODY_WAITS))


_NOBODY_WAITS = "Nobody waits: no limit is met."


@dataclass(frozen=True, slots=True)
class _Gain:
    """What a larger batch brought, from an earlier step to the last one."""

    before: Measured
    running: tuple[float, float]
    tokens_per_s: tuple[float, float]

    @property
    def is_hardly_any(self) -> bool:
        """True when far more ran at once and hardly more came out."""
        more, faster = (after / before - 1 for before, after in (self.running, self.tokens_per_s))
        return faster < _HARDLY * more

    def __str__(self) -> str:
        (ran, runs), (before, after) = self.running, self.tokens_per_s
        return f"from {ran:.0f} to {runs:.0f} at once, output went from {before:.0f} to {after:.0f} tokens/s"


def _gain(steps: Sequence[Measured]) -> _Gain | None:
    """From the nearest earlier step in which clearly fewer ran at once; None when there is none."""
    last = steps[-1]
    for earlier in reversed(steps[:-1]):
        ran, runs = _at_once(earlier), _at_once(last)
        before, after = _output(earlier.figures), _output(last.figures)
        if ran and runs and before and after and runs >= 1.25 * ran:
            return _Gain(earlier, (ran, runs), (before, after))
    return None


def _at_once(step: Measured) -> float | None:
    running = step.evidence.running if step.evidence is not None else None
    return running if running is not None else step.figures.streams


def _output(figures: Figures) -> float:
    return figures.tokens_per_s if figures.tokens_per_s is not None else figures.requests_per_s


def _without_metrics(last: Figures, gain: _Gain | None) -> Verdict:
    evidence = (f"{last.load}: {last.requests_per_s:.2f} requests/s",) if gain is None else (str(gain),)
    if gain is not None and not gain.is_hardly_any:
        return Verdict(Limit.load, evidence, "Output still grows with the load: try more streams.", (_NO_METRICS,))
    advice = "Let /metrics be read (a key, or server.open_metrics), and measure again."
    return Verdict(Limit.unknown, evidence, advice, (_NO_METRICS,))


_NO_METRICS = "the server showed no vllm: metrics here: what it ran, what waited and how full its KV cache was"


# The rules, in order.
def _kv_cache(_: int | None, seen: Evidence, __: _Gain | None) -> Verdict | None:
    usage, thrown_out = seen.kv_cache_most or 0.0, seen.preemptions or 0.0
    if not thrown_out and not (usage >= _FULL_CACHE and seen.queued):
        return None
    evidence = (f"KV cache {usage:.0%} full at most, {thrown_out:.0f} preemptions", _batch(seen))
    advice = (
        "Give the KV cache more memory (gpu_memory_utilization or kv_cache_memory_bytes up, kv_cache_dtype = fp8), "
        "or the model more GPUs (tensor_parallel_size)."
    )
    if thrown_out:
        advice += f" Until then max_num_seqs = {max(1, int((seen.running or 1) * 0.9))} spares preemptions."
    return Verdict(Limit.kv_cache, evidence, advice)


def _front_end(streams: int | None, seen: Evidence, _: _Gain | None) -> Verdict | None:
    share, evidence = seen.front_end_cpu_share or 0.0, list[str]()
    unseen = (streams or 0) - (seen.running or 0.0) - seen.queued
    if share >= _BUSY_CORE:
        evidence.append(f"the server's own process used {share:.0%} of a core")
    if streams is not None and unseen >= max(2.0, _UNSEEN * streams) and not (seen.max_num_seqs and seen.is_batch_full):
        evidence.append(f"of {streams} requests {unseen:.0f} had not come to the engine, or had left it")
    if not evidence:
        return None
    advice = "Start more front ends: server.front_ends = 4 (vllm serve: --api-server-count 4)."
    return Verdict(Limit.front_end, (*evidence, _batch(seen)), advice)


def _max_num_seqs(_: int | None, seen: Evidence, gain: _Gain | None) -> Verdict | None:
    if not seen.queued or (gain is not None and gain.is_hardly_any):
        return None
    running, slots = seen.running or 0.0, seen.max_num_seqs
    if not seen.is_batch_full:
        return None
    usage = seen.kv_cache_most
    spare = "KV cache not told" if usage is None else f"KV cache {usage:.0%} full at most: room for more"
    now = slots or max(1, round(running))
    factor = 2.0 if usage is None or usage * 2 <= _FULL_CACHE else _FULL_CACHE / usage
    wanted = max(int(now * factor), now + 1)
    said = "" if slots is not None else f"; the server does not tell it, but never more than {running:.0f} ran"
    evidence = [_batch(seen) + said, spare]
    if gain is not None:
        evidence.append(f"{gain}: a larger batch still pays")
    return Verdict(Limit.max_num_seqs, tuple(evidence), f"Try max_num_seqs = {wanted} (--max-num-seqs).")


def _compute(_: int | None, seen: Evidence, gain: _Gain | None) -> Verdict | None:
    if gain is None or not gain.is_hardly_any:
        return None
    evidence = [str(gain), _batch(seen)]
    if seen.gpu_utilization is not None:
        evidence.append(f"a kernel ran {seen.gpu_utilization:.0%} of the time")
    advice = (
        "More at once would only wait longer: a smaller or quantized model, more GPUs (tensor_parallel_size), or a "
        "second instance."
    )
    return Verdict(Limit.compute, tuple(evidence), advice)


def _load(streams: int | None, seen: Evidence, gain: _Gain | None) -> Verdict:
    evidence = [_batch(seen)]
    if gain is not None:
        evidence.append(str(gain))
    if seen.queued:
        return Verdict(Limit.unknown, tuple(evidence), "Requests wait although the batch has room: measure for longer.")
    more = "a higher rate" if streams is None else "more streams"
    return Verdict(Limit.load, tuple(evidence), f"No limit was met: try {more}.")


_RULES = (_kv_cache, _front_end, _max_num_seqs, _compute, _load)


def _batch(seen: Evidence) -> str:
    of = "" if seen.max_num_seqs is None else f" of {seen.max_num_seqs} (max_num_seqs)"
    held = "" if seen.held is None else f", {seen.held:.0f} held at the gate"
    return f"{seen.running or 0:.0f} ran{of}, {seen.waiting or 0:.0f} waited in the engine{held}"


def _gaps(seen: Evidence) -> Iterator[str]:
    """What the server did not tell."""
    told = {
        "max_num_seqs": seen.max_num_seqs,
        "how full the KV cache was": seen.kv_cache_most,
        "preemptions": seen.preemptions,
        "CPU of the server's process": seen.front_end_cpu_share,
        "how busy the GPU was": seen.gpu_utilization,
    }
    yield from (name for name, value in told.items() if value is None)
