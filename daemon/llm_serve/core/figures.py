"""What a step of load came to: exact figures from every request of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_serve.core.workload import Step

TOO_LATE_S = 0.01
"""A request that leaves so long after its time is counted as late."""
_BUSY, _SLOW_S = 0.9, 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was sent, and when its first and last token came, in seconds of one clock.

    `tokens` is what the server counted, None where it did not say. `error` is the kind of what went wrong; then only
    `sent_s` and `last_s`, its end, count.
    """

    sent_s: float
    last_s: float
    first_s: float | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    error: str | None = None
    late_s: float = 0.0

    @property
    def latency_s(self) -> float:
        """From sending to the last token."""
        return self.last_s - self.sent_s

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first token."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token, the first one left out."""
        if self.first_s is None or not self.tokens or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    def share_before(self, until_s: float) -> float:
        """Which part of it, by time, lies before this moment."""
        if self.last_s <= until_s:
            return 1.0
        return max(0.0, until_s - self.sent_s) / self.latency_s


def percentile(values: Sequence[float], share: float) -> float:
    """The exact percentile of all values, of which there is one at least; between two by proportion, as in numpy."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """P50 and P99 of one figure; None where no request had it."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Of those values that are known."""
        known = [value for value in values if value is not None]
        return cls(percentile(known, 0.50), percentile(known, 0.99)) if known else cls(None, None)


@dataclass(frozen=True, slots=True)
class Generator:
    """How the load generator itself did: how late its loop was, and the share of one core that it used."""

    late_p99_s: float = 0.0
    late_max_s: float = 0.0
    cpu_share: float = 0.0

    @property
    def is_busy(self) -> bool:
        """True when it had nothing to spare: then it may have been slower than the server."""
        return self.cpu_share >= _BUSY

    @property
    def trouble(self) -> str | None:
        """Why the figures may be those of the generator instead of the server's."""
        if self.is_busy:
            return f"the load generator used {self.cpu_share:.0%} of a core: start several, or take a faster machine"
        if self.late_p99_s >= _SLOW_S:
            late = f"{self.late_p99_s * 1000:.0f} ms (P99; {self.late_max_s * 1000:.0f} ms at most)"
            return f"the load generator's own loop was late by {late}: take a machine that has a core to spare for it"
        return None


@dataclass(frozen=True, slots=True)
class Figures:
    """One step. Rates are per second; times are seconds."""

    load: str
    streams: int | None
    rate: float | None
    seconds: float
    answered: int
    requests_per_s: float
    tokens_per_s: float | None
    ttft_s: Spread
    tpot_s: Spread
    latency_s: Spread
    errors: Mapping[str, int]
    sent_late: int
    generator: Generator

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints them."""
        return asdict(self)


def figures(
    step: Step,
    samples: Sequence[Sample],
    *,
    began_s: float,
    until_s: float | None = None,
    generator: Generator | None = None,
) -> Figures:
    """Sum up a step that began then.

    With `until_s` the load was full until then, and what ran at that moment was let finish: for rates such a request
    counts by the part of it that lies before, so that the emptying server is not taken for a slow one. Without it,
    rates are over all the time to the last answer, as `vllm bench serve` has them.
    """
    good = [sample for sample in samples if sample.error is None]
    end_s = until_s if until_s is not None else max((sample.last_s for sample in samples), default=began_s)
    seconds = max(end_s - began_s, 1e-9)
    counts = [(sample.share_before(end_s), sample.tokens) for sample in good]
    is_counted = bool(counts) and all(tokens is not None for _, tokens in counts)
    return Figures(
        load=str(step),
        streams=step.streams,
        rate=step.rate,
        seconds=seconds,
        answered=len(good),
        requests_per_s=sum(share for share, _ in counts) / seconds,
        tokens_per_s=sum(share * (tokens or 0) for share, tokens in counts) / seconds if is_counted else None,
        ttft_s=Spread.of(sample.ttft_s for sample in good),
        tpot_s=Spread.of(sample.tpot_s for sample in good),
        latency_s=Spread.of(sample.latency_s for sample in good),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        sent_late=sum(sample.late_s >= TOO_LATE_S for sample in samples),
        generator=generator or Generator(),
    )
