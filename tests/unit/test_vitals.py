"""An instance's load from looks at its metrics: rates, quantiles, and what binds."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.bottleneck import Limit, Observation
from llm_serve.core.figures import percentile
from llm_serve.core.vitals import Look, Vitals, grown_buckets, quantile
from llm_serve.scrape import look

BOUNDS = (0.1, 1.0, 10.0, math.inf)


def at(
    at_s: float, *, generated: float | None = None, first_token: dict[float, float] | None = None, **seen: Any
) -> Look:
    """One look."""
    return Look(Observation(at_s, **seen), generated=generated, first_token=first_token or {})


def counted(values: list[float], bounds: tuple[float, ...] = BOUNDS) -> dict[float, float]:
    """A histogram of them."""
    return {bound: float(sum(value <= bound for value in values)) for bound in bounds}


@pytest.mark.parametrize(
    ("before", "now", "rate"),
    [
        (100.0, 300.0, 100.0),
        (100.0, 100.0, 0.0),
        (300.0, 100.0, None),
        (None, 100.0, None),
        (100.0, None, None),
    ],
    ids=["grown", "idle", "began anew", "not told before", "not told now"],
)
def test_a_rate_is_of_the_last_interval(before: float | None, now: float | None, rate: float | None) -> None:
    """A counter that fell tells nothing, rather than something negative or a burst."""
    looks = [at(0, generated=0.0), at(10, generated=before), at(12, generated=now)]

    vitals = Vitals.of(looks, has_engine=True, is_open=True)

    assert (rate, 2.0) == (vitals.generated_per_s, vitals.interval_s)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=8), st.lists(st.floats(0.001, 100), min_size=8, max_size=8))
def test_no_rate_is_negative(counts: list[float], passed: list[float]) -> None:
    """Whatever a daemon counts, however often it begins anew."""
    looks = [at(sum(passed[:place]), generated=count) for place, count in enumerate(counts)]

    rate = Vitals.of(looks, has_engine=True, is_open=True).generated_per_s

    assert (rate is None) == (counts[-1] < counts[-2])
    assert rate is None or rate >= 0


def test_one_look_has_no_rates() -> None:
    """Gauges are told at once."""
    vitals = Vitals.of([at(5, generated=100.0, running=3.0, kv_cache_usage=0.5)], has_engine=True, is_open=True)

    assert (3.0, 0.5, None, None) == (vitals.running, vitals.kv_cache_usage, vitals.generated_per_s, vitals.interval_s)


@pytest.mark.parametrize(
    ("values", "share", "wanted"),
    [
        ([], 0.5, None),
        ([0.05] * 10, 0.5, 0.05),
        ([0.05] * 5 + [0.5] * 5, 0.5, 0.1),
        ([0.05] * 5 + [0.5] * 5, 0.75, 0.55),
        ([100.0] * 10, 0.99, 10.0),
        ([0.05] * 99 + [100.0], 0.5, 0.1 * 50 / 99),
    ],
    ids=["none", "first bucket", "at a bound", "by proportion", "beyond the last bound", "one far beyond"],
)
def test_a_quantile_is_as_prometheus_has_it(values: list[float], share: float, wanted: float | None) -> None:
    """By proportion within its bucket, which begins at nothing; of what is beyond all bounds the last bound is told."""
    found = quantile(counted(values), share)

    assert wanted is None if found is None else found == pytest.approx(wanted)


@given(st.lists(st.floats(0.0001, 9.99), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_in_the_bucket_of_the_value_it_stands_for(values: list[float], share: float) -> None:
    """So it is off by its bucket's width at most."""
    found = quantile(counted(values), share)

    exact = sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]
    place = bisect_left(BOUNDS, exact)
    assert found is not None
    rounding = 1e-12
    assert (BOUNDS[place - 1] if place else 0.0) - rounding <= found <= BOUNDS[place] + rounding
    assert percentile(values, 1.0) <= 10.0


def test_first_tokens_are_those_of_the_last_interval() -> None:
    """What was slow an hour ago is no news."""
    before, now = counted([5.0] * 100), counted([5.0] * 100 + [0.05] * 10)

    vitals = Vitals.of([at(0, first_token=before), at(1, first_token=now)], has_engine=True, is_open=True)

    assert [0.05, 0.099] == pytest.approx([vitals.ttft_p50_s, vitals.ttft_p99_s])


@pytest.mark.parametrize(
    ("before", "now"),
    [(counted([0.05] * 9), counted([0.05])), (counted([]), {}), (counted([]), counted([1.0], (0.5, math.inf)))],
)
def test_a_histogram_that_began_anew_tells_nothing(before: dict[float, float], now: dict[float, float]) -> None:
    """Counts that fell, and bounds that went."""
    assert {} == grown_buckets(before, now)


BUSY: dict[str, Any] = {"max_num_seqs": 8.0, "preemptions": 0.0, "kv_cache_usage": 0.2}


@pytest.mark.parametrize(
    ("seen", "limit"),
    [
        ({"running": 3.0, "waiting": 0.0}, Limit.load),
        ({"running": 8.0, "waiting": 4.0}, Limit.max_num_seqs),
        ({"running": 8.0, "waiting": 0.0, "held": 4.0}, Limit.max_num_seqs),
        ({"running": 5.0, "waiting": 4.0, "kv_cache_usage": 0.97}, Limit.kv_cache),
        ({"running": 5.0, "waiting": 4.0}, Limit.unknown),
    ],
    ids=["nobody waits", "full batch", "full batch, held at the gate", "full cache", "waiting beside room"],
)
def test_what_binds_is_named(seen: dict[str, Any], limit: Limit) -> None:
    """With bench's own rules, as far as they need no second load to compare."""
    verdict = Vitals.of([at(0, **BUSY | seen), at(1, **BUSY | seen)], has_engine=True, is_open=True).limit

    assert verdict is not None
    assert limit == verdict.limit


def test_preemptions_name_the_cache_and_a_busy_core_the_front_end() -> None:
    """Counters count by what they grew, not by what they were."""
    preempted = [
        at(0, **BUSY | {"running": 3.0, "preemptions": 5.0}),
        at(1, **BUSY | {"running": 3.0, "preemptions": 6.0}),
    ]
    long_ago = [
        at(0, **BUSY | {"running": 3.0, "preemptions": 5.0}),
        at(1, **BUSY | {"running": 3.0, "preemptions": 5.0}),
    ]
    core = [at(0, **BUSY, running=3.0, front_end_cpu_s=7.0), at(1, **BUSY, running=3.0, front_end_cpu_s=7.97)]

    limits = [
        getattr(Vitals.of(looks, has_engine=True, is_open=True).limit, "limit", None)
        for looks in (preempted, long_ago, core)
    ]

    assert [Limit.kv_cache, Limit.load, Limit.front_end] == limits


def test_nothing_binds_while_requests_wait_for_something_else() -> None:
    """An engine that is being built, an operator, the heat; and nothing is said of a server that tells nothing."""
    full = [at(0, **BUSY, running=8.0, waiting=4.0)]

    assert None is Vitals.of(full, has_engine=True, is_open=False).limit
    assert None is Vitals.of([at(0)], has_engine=True, is_open=True).limit


def test_gauges_of_an_engine_that_is_gone_are_not_told() -> None:
    """They stay as they were until there is another; what was counted, and who waits at the gate, stays true."""
    looks = [at(0, **BUSY, running=8.0, held=1.0, generated=0.0), at(1, **BUSY, running=8.0, held=2.0, generated=7.0)]

    vitals = Vitals.of(looks, has_engine=False, is_open=False)

    assert (None, None, None) == (vitals.running, vitals.kv_cache_usage, vitals.max_num_seqs)
    assert (2.0, 7.0, 0.0) == (vitals.held, vitals.generated_per_s, vitals.preemptions)


def test_a_look_adds_up_engines_and_reads_the_histogram() -> None:
    """Two engines' buckets are one; what is no metric is nothing."""
    bucket = "vllm:time_to_first_token_seconds_bucket"
    text = (
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 1.0\n'
        'vllm:prefix_cache_queries_total{engine="0"} 8.0\nvllm:prefix_cache_hits_total{engine="0"} 2.0\n'
        f'{bucket}{{engine="0",le="0.1"}} 1.0\n{bucket}{{engine="0",le="+Inf"}} 2.0\n'
        f'{bucket}{{engine="1",le="0.1"}} 10.0\n{bucket}{{engine="1",le="+Inf"}} 20.0\n'
    )

    seen = look(text, 5.0)

    assert seen is not None
    assert (Observation(5.0, running=4.0), {0.1: 11.0, math.inf: 22.0}) == (seen.seen, seen.first_token)
    assert 0.25 == Vitals.of([seen], has_engine=True, is_open=True).prefix_cache_hits
    assert None is look("<html>", 5.0)
