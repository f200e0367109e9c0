"""The figures of a step: definitions by example, and what holds for all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.figures import Generator, Sample, Spread, figures, percentile
from llm_serve.core.workload import Step

STEP = Step(streams=4)
times = st.floats(0, 1e4, allow_nan=False)


@given(st.lists(times, min_size=1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_numpy(values: list[float], share: float) -> None:
    """And so those of `vllm bench serve`."""
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)), abs=1e-6)


def test_of_nothing_there_is_no_percentile() -> None:
    """Not zero, which would be a wonderful latency."""
    assert Spread(None, None) == Spread.of([None, None])


def test_the_times_of_a_request() -> None:
    """TTFT from sending to the first token; TPOT leaves the first token out."""
    sample = Sample(sent_s=10.0, first_s=10.5, last_s=12.5, tokens=5)

    assert (0.5, 2.5, 0.5) == (sample.ttft_s, sample.latency_s, sample.tpot_s)
    assert None is Sample(sent_s=0, first_s=1, last_s=1, tokens=1).tpot_s
    assert None is Sample(sent_s=0, first_s=1, last_s=3, tokens=None).tpot_s


def test_without_an_end_rates_are_over_everything() -> None:
    """As `vllm bench serve` counts: until the last answer, errors included in the time and not in the count."""
    samples = [
        Sample(0, 2, 1, tokens=10),
        Sample(0, 4, 1, tokens=10),
        Sample(0, 5, error="time-out"),
        Sample(1, 3, error="HTTP 503"),
        Sample(1, 3, error="HTTP 503"),
    ]

    found = figures(STEP, samples, began_s=0)

    assert (2, 0.4, 4.0) == (found.answered, found.requests_per_s, found.tokens_per_s)
    assert {"time-out": 1, "HTTP 503": 2} == found.errors
    assert 3.0 == found.latency_s.p50


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.floats(1, 60))
def test_an_emptying_server_is_not_taken_for_a_slow_one(latencies: list[float], seconds: float) -> None:
    """Streams that always take the same for an answer give the sum of 1 / latency, wherever the step ends."""
    samples = [
        Sample(sent, sent + latency_s, sent + latency_s / 2, tokens=7)
        for latency_s in latencies
        for sent in itertools.takewhile(lambda sent: sent < seconds, itertools.count(0.0, latency_s))
    ]

    found = figures(STEP, samples, began_s=0, until_s=seconds)

    assert sum(1 / latency_s for latency_s in latencies) == pytest.approx(found.requests_per_s, rel=1e-6)


@pytest.mark.parametrize("seconds", [1.0, 9.0, 10.0, 15.0, 31.0])
def test_waves_are_counted_by_their_parts(seconds: float) -> None:
    """Four streams in step, 10 s an answer: 0.4 requests/s, also when the step ends in the middle of a wave."""
    samples = [Sample(at, at + 10, at + 1, tokens=50) for at in range(0, 40, 10) if at < seconds for _ in range(4)]

    found = figures(STEP, samples, began_s=0, until_s=seconds)

    assert 0.4 == pytest.approx(found.requests_per_s)
    assert 20 == pytest.approx(found.tokens_per_s)


def test_tokens_that_the_server_does_not_count_are_not_guessed() -> None:
    """One answer without usage, and tokens/s is not known."""
    samples = [Sample(0, 1, 0.5, tokens=10), Sample(0, 1, 0.5)]

    assert None is figures(STEP, samples, began_s=0).tokens_per_s


@pytest.mark.parametrize(
    ("generator", "said"),
    [
        (Generator(0.001, 0.05, 0.3), None),
        (Generator(0.001, 0.05, 0.95), "95% of a core"),
        (Generator(0.05, 0.3, 0.3), "late by 50 ms (P99; 300 ms at most)"),
    ],
)
def test_a_generator_that_was_slow_itself_says_so(generator: Generator, said: str | None) -> None:
    """By its own CPU, or by how late its loop was."""
    trouble = generator.trouble

    assert trouble is None if said is None else said in (trouble or "")


def test_late_ones_are_counted() -> None:
    """What left more than 10 ms after its time."""
    samples = [Sample(0, 1, 0.5, tokens=1, late_s=late) for late in (0.0, 0.009, 0.011, 2.0)]

    assert 2 == figures(Step(rate=1.0), samples, began_s=0).sent_late
