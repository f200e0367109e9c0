"""What an instance does now, from looks at its metrics: gauges from the last, rates from two, its limit from all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llm_serve.core.bottleneck import Evidence, Observation, Verdict, binding


@dataclass(frozen=True, slots=True)
class Look:
    """What /metrics said at one moment. None is not told.

    All but `seen` has been counted since the daemon started, whatever became of its engines: tokens, requests, and
    `first_token`, by each bound in seconds the requests whose first token took at most so long.
    """

    seen: Observation
    generated: float | None = None
    prompt: float | None = None
    answered: float | None = None
    cache_queries: float | None = None
    cache_hits: float | None = None
    first_token: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vitals:
    """An instance's load. Rates are per second, of the last `interval_s`; shares are 0 to 1. None is not known.

    `prefix_cache_hits` is the share of prompt tokens that were found in the cache, and that, like `preemptions` and
    `answered`, is since the daemon started.
    """

    running: float | None = None
    waiting: float | None = None
    held: float | None = None
    max_num_seqs: float | None = None
    kv_cache_usage: float | None = None
    prefix_cache_hits: float | None = None
    preemptions: float | None = None
    answered: float | None = None
    interval_s: float | None = None
    generated_per_s: float | None = None
    prompt_per_s: float | None = None
    answered_per_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    limit: Verdict | None = None

    @classmethod
    def of(cls, looks: Sequence[Look], *, has_engine: bool, is_open: bool) -> Vitals:
        """From looks at one daemon, in their order, one at least.

        Without an engine the gauges are those of one that is gone, and left out. What binds is named only while it
        `is_open`: requests that wait for an engine, or because an operator said so, wait for no limit.
        """
        last, before = looks[-1], looks[-2] if len(looks) > 1 else None
        seen = last.seen if has_engine else Observation(last.seen.at_s, held=last.seen.held)
        passed_s = seen.at_s - before.seen.at_s if before else 0.0
        first_token = grown_buckets(before.first_token, last.first_token) if before else {}
        return cls(
            running=seen.running,
            waiting=seen.waiting,
            held=seen.held,
            max_num_seqs=seen.max_num_seqs,
            kv_cache_usage=seen.kv_cache_usage,
            prefix_cache_hits=_ratio(last.cache_hits, last.cache_queries),
            preemptions=last.seen.preemptions,
            answered=last.answered,
            interval_s=passed_s or None,
            generated_per_s=_rate(before, last, "generated", passed_s),
            prompt_per_s=_rate(before, last, "prompt", passed_s),
            answered_per_s=_rate(before, last, "answered", passed_s),
            ttft_p50_s=quantile(first_token, 0.50),
            ttft_p99_s=quantile(first_token, 0.99),
            limit=binding(Evidence.of([look.seen for look in looks])) if is_open else None,
        )

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _rate(before: Look | None, now: Look, name: str, passed_s: float) -> float | None:
    """How fast a counter grows; one that fell began anew with its process, and then nothing is known."""
    old, new = getattr(before, name, None), getattr(now, name)
    return (new - old) / passed_s if old is not None and new is not None and new >= old and passed_s > 0 else None


def grown_buckets(before: Mapping[float, float], now: Mapping[float, float]) -> dict[float, float]:
    """What a histogram has counted between two looks; nothing where it began anew, or has other bounds than before."""
    grown = {bound: now[bound] - before.get(bound, 0.0) for bound in sorted(now)}
    return grown if before.keys() <= now.keys() and all(count >= 0 for count in grown.values()) else {}


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value that this share of all is not above: by proportion within its bucket, as Prometheus has it.

    `buckets` counts those up to each bound, so the one at infinity counts all. Of what is beyond the largest bound
    only that is known, and it is returned.
    """
    wanted = share * buckets.get(math.inf, 0.0)
    if not wanted:
        return None
    lower, below = 0.0, 0.0
    for bound in sorted(buckets):
        count = buckets[bound]
        if count >= wanted:
            return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower
