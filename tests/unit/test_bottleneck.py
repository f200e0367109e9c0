"""Which limit is named for what was seen: a table, and what holds for any observations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.bottleneck import Evidence, Limit, Measured, Observation, judge
from llm_serve.core.figures import Figures, Generator, Spread


def step(
    streams: int | None, tokens_per_s: float | None, evidence: Evidence | None, *, answered: int = 100, **more: Any
) -> Measured:
    """One step of a load test."""
    spread = Spread(1.0, 2.0)
    values: dict[str, Any] = {
        "load": f"{streams} streams", "streams": streams, "rate": None if streams else 9.0, "seconds": 30.0,
        "answered": answered, "requests_per_s": (tokens_per_s or 50) / 50, "tokens_per_s": tokens_per_s,
        "ttft_s": spread, "tpot_s": spread, "latency_s": spread, "errors": {}, "sent_late": 0,
        "generator": Generator(),
    }  # fmt: skip
    return Measured(Figures(**values | more), evidence)


def seen(running: float | None, **more: Any) -> Evidence:
    """What a server showed; a plain one, with a fifth of its KV cache in use and nobody waiting."""
    values: dict[str, Any] = {"running_most": running, "waiting": 0.0, "kv_cache_most": 0.2, "preemptions": 0.0}
    return Evidence(30, running=running, **values | more)


SMALL = step(64, 1000, seen(64))
FULL: dict[str, Any] = {"max_num_seqs": 128, "waiting": 32.0, "held": 96.0}

CASES = [
    pytest.param(
        [step(64, 1000, seen(64, max_num_seqs=128)), step(256, 1900, seen(128, **FULL))],
        Limit.max_num_seqs, ["128 ran of 128 (max_num_seqs), 32 waited in the engine, 96 held", "20% full at most", "still pays"],
        "max_num_seqs = 256",
        id="full batch, KV to spare, still growing",
    ),
    pytest.param(
        [step(256, 1900, seen(128, **FULL))],
        Limit.max_num_seqs, ["128 ran of 128"], "max_num_seqs = 256",
        id="one step alone: a full batch before which others wait",
    ),
    pytest.param(
        [step(32, 90, seen(15, max_num_seqs=16, waiting=3.0, held=12.0))],
        Limit.max_num_seqs, ["15 ran of 16"], "max_num_seqs = 32",
        id="a small batch of which one place changes hands at most times",
    ),
    pytest.param(
        [step(32, 90, seen(12, max_num_seqs=16, waiting=3.0, held=12.0))],
        Limit.unknown, ["12 ran of 16"], "",
        id="places are free, and it is not told why nobody takes them",
    ),
    pytest.param(
        [step(256, 1900, seen(128, **FULL | {"kv_cache_most": 0.75}))],
        Limit.max_num_seqs, ["75% full"], "max_num_seqs = 153",
        id="the KV cache would not hold twice as many",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(128, waiting=128.0))],
        Limit.max_num_seqs, ["does not tell it, but never more than 128 ran"], "max_num_seqs = 256",
        id="plain vLLM: requests wait beside an empty KV cache",
    ),
    pytest.param(
        [step(64, 1000, seen(64, max_num_seqs=128)), step(256, 1050, seen(128, **FULL, gpu_utilization=0.99))],
        Limit.compute, ["from 64 to 128 at once, output went from 1000 to 1050", "99% of the time"], "quantized",
        id="full batch that brought nothing",
    ),
    pytest.param(
        [SMALL, step(256, 1050, seen(256))], Limit.compute, ["from 64 to 256 at once"], "quantized",
        id="all run at once and nothing comes of it",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(90, **FULL | {"kv_cache_most": 0.97}))],
        Limit.kv_cache, ["97% full"], "kv_cache_dtype",
        id="full KV cache with a queue",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(128, **FULL | {"preemptions": 40.0, "kv_cache_most": 0.85}))],
        Limit.kv_cache, ["40 preemptions"], "max_num_seqs = 115",
        id="preemptions, although the batch was full",
    ),
    pytest.param(
        [SMALL, step(64, 1900, seen(64, kv_cache_most=0.97))], Limit.load, ["64 ran"], "more streams",
        id="a KV cache that is full and keeps nobody waiting",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(128, **FULL, front_end_cpu_share=0.98))],
        Limit.front_end, ["98% of a core"], "front end",
        id="the server's process is busy all the time",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(100))],
        Limit.front_end, ["of 256 requests 156 had not come to the engine"], "front end",
        id="requests that are nowhere",
    ),
    pytest.param(
        [SMALL, step(256, 3900, seen(250))], Limit.load, ["250 ran"], "more streams",
        id="everything runs and output grows",
    ),
    pytest.param(
        [step(None, 900, seen(20, max_num_seqs=128))], Limit.load, ["20 ran of 128"], "a higher rate",
        id="an open loop that the server keeps up with",
    ),
    pytest.param(
        [step(None, 900, seen(128, **FULL))], Limit.max_num_seqs, ["128 ran of 128"], "max_num_seqs = 256",
        id="an open loop that it does not",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(100, max_num_seqs=128, waiting=150.0))], Limit.unknown, ["100 ran of 128"], "longer",
        id="requests wait beside a batch with room",
    ),
    pytest.param(
        [step(256, 1900, seen(1, **FULL), seconds=6.0, latency_s=Spread(20.7, 29.0))],
        Limit.unknown, ["an answer took 20.7 s, and all of it was seen for 6.0 s"], "--seconds 62",
        id="a step that was over before its answers were",
    ),
    pytest.param(
        [step(64, 1000, None), step(256, 1020, None)], Limit.unknown, ["from 64 to 256"], "/metrics",
        id="no metrics, no growth",
    ),
    pytest.param(
        [step(64, 1000, None), step(256, 3000, None)], Limit.load, ["from 64 to 256"], "more streams",
        id="no metrics, but growth",
    ),
    pytest.param(
        [SMALL, step(256, None, seen(128, **FULL), answered=0, errors={"HTTP 503": 7})],
        Limit.nothing_answered, ["7 x HTTP 503"], "log",
        id="nothing but errors",
    ),
    pytest.param(
        [SMALL, step(256, 1900, seen(128, **FULL), generator=Generator(0.2, 0.4, 0.95))],
        Limit.generator, ["95% of a core"], "again",
        id="the generator was at its end, whatever else was seen",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "limit", "evidence", "advice"), CASES)
def test_the_limit_is_named_with_its_evidence(
    steps: list[Measured], limit: Limit, evidence: list[str], advice: str
) -> None:
    """What binds, why, and what to try."""
    verdict = judge(steps)

    assert limit == verdict.limit, verdict
    for words in evidence:
        assert any(words in each for each in verdict.evidence), verdict
    assert advice in verdict.advice


def test_what_a_plain_server_does_not_tell_is_said() -> None:
    """vLLM's own server tells neither its max_num_seqs nor its GPUs."""
    told = judge([step(8, 100, seen(8))])

    assert ("max_num_seqs", "CPU of the server's process", "how busy the GPU was") == told.not_known
    assert judge([step(8, 100, None)]).not_known


def test_evidence_is_summed_up_from_observations() -> None:
    """Medians of what goes up and down, the growth of counters, the CPU share from seconds."""
    told = [
        Observation(
            10.0 + number, running=running, waiting=1.0, kv_cache_usage=running / 20, preemptions=5.0 + number,
            max_num_seqs=16.0, front_end_cpu_s=100 + number * 0.5,
        )
        for number, running in enumerate([2.0, 16.0, 16.0])
    ]  # fmt: skip

    assert Evidence(
        observations=3, running=16.0, running_most=16.0, waiting=1.0, kv_cache_most=0.8, preemptions=2.0,
        max_num_seqs=16, front_end_cpu_share=0.5,
    ) == Evidence.of(told)  # fmt: skip


def test_a_counter_that_began_anew_tells_nothing() -> None:
    """The server was started again in the middle of the step."""
    told = [Observation(at, running=1.0, preemptions=value) for at, value in ((0.0, 9.0), (1.0, 0.0), (2.0, 1.0))]

    assert None is Evidence.of(told).preemptions


number = st.none() | st.floats(0, 1e4)
observations = st.lists(
    st.builds(
        Observation, st.floats(0, 100), number, number, number, st.none() | st.floats(0, 1), number,
        st.none() | st.integers(1, 2000).map(float), st.none() | st.floats(0, 1), number,
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip
steps = st.lists(
    st.builds(
        step, st.none() | st.integers(1, 2000), st.none() | st.floats(0, 1e5), st.none() | observations.map(Evidence.of),
        answered=st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@given(steps)
def test_every_load_test_has_a_verdict(measured: list[Measured]) -> None:
    """Whatever was seen, there is one limit, with evidence and advice; and a limit that needs evidence has it."""
    verdict = judge(measured)
    evidence = measured[-1].evidence

    assert verdict.evidence
    assert verdict.advice.endswith(".")
    if verdict.limit is Limit.max_num_seqs:
        assert evidence is not None
        assert evidence.queued > 0
        assert not evidence.preemptions
    if verdict.limit is Limit.kv_cache:
        assert evidence is not None
        assert evidence.preemptions or (evidence.kv_cache_most or 0) >= 0.9
    if evidence is None and measured[-1].figures.answered:
        assert verdict.limit in {Limit.unknown, Limit.load}
