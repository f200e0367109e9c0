"""What would become of a start, and the rungs that recovery would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core import forecast
from llm_serve.core.course import Course, Effective, Floors
from llm_serve.core.evidence import Kind, Place
from llm_serve.core.footprint import Footprint
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import Choices
from tests.unit.test_footprint import GIB, MODEL, NOW, Blocks

CHOICES = Choices(Floors(2048, 4))
COURSE = Course(EnginePlan("m", {}, {}))


def expecting(model: Footprint, cache: Blocks) -> Callable[[Effective], forecast.Outlook]:
    return lambda now: forecast.outlook(model, cache, now)


def walk(model: Footprint, now: Effective, cache: Blocks | None = None) -> tuple[forecast.Outlook, forecast.Walk]:
    expects = expecting(model, cache or Blocks())
    return expects(now), forecast.to_a_start(COURSE, expects(now), CHOICES, expects)


def weighing(gib: float) -> Footprint:
    return replace(MODEL, weights_bytes=int(gib * GIB))


def test_concurrency_and_tokens_are_vllms_divisions() -> None:
    outlook = forecast.outlook(MODEL, Blocks(fixed_blocks=5000), NOW)
    assert outlook.blocks_per_request == 2048
    assert outlook.concurrency == 5000 / 2048
    assert outlook.tokens == int(5000 / 2048 * 32768)


@pytest.mark.parametrize(
    ("weights", "changes", "cache", "kind", "place"),
    [
        (25, {}, Blocks(), Kind.weights_do_not_fit, Place.loading),
        (23.7, {}, Blocks(), Kind.out_of_memory, Place.profiling),
        (23, {}, Blocks(), Kind.no_kv_cache, Place.kv_cache),
        (20.2, {}, Blocks(), Kind.kv_cache_too_small, Place.kv_cache),
        (12, {"kv_cache_memory_bytes": 12 * GIB}, Blocks(), Kind.out_of_memory, Place.kv_cache),
        (12, {"kv_cache_memory_bytes": 1 * GIB}, Blocks(), Kind.kv_cache_too_small, Place.kv_cache),
        (12, {}, Blocks(fixed_blocks=2500, blocks_per_sequence_at_least=1), None, None),
        (12, {"max_num_seqs": 300, "max_model_len": 2048}, Blocks(fixed_blocks=200, blocks_per_sequence_at_least=1),
         Kind.too_many_sequences, Place.capture),
        (12, {}, Blocks(), None, None),
    ],
)  # fmt: skip
def test_a_start_fails_for_the_first_thing_that_does_not_fit(
    weights: float, changes: dict[str, Any], cache: Blocks, kind: Kind | None, place: Place | None
) -> None:
    failure = forecast.outlook(weighing(weights), cache, replace(NOW, **changes)).failure
    assert (kind, place) == ((failure.kind, failure.place) if failure else (None, None))


def test_what_fits_needs_no_rung() -> None:
    outlook, taken = walk(MODEL, NOW)
    assert outlook.failure is None
    assert forecast.Walk((), "") == taken


def test_a_cache_too_small_costs_one_rung_to_what_fits() -> None:
    outlook, taken = walk(weighing(20.2), NOW)
    assert outlook.failure is not None
    fitting = outlook.failure.fitting_model_len
    assert fitting is not None
    (rung,) = taken.rungs
    assert rung.outlook.failure is None
    assert fitting - 32 < rung.step.arguments["max_model_len"] <= fitting
    assert not taken.end


def test_weights_that_do_not_fit_have_no_rung_but_advice() -> None:
    _, taken = walk(weighing(25), NOW)
    assert not taken.rungs
    assert "quantised model" in taken.end


def test_without_room_for_any_cache_the_batch_is_halved_first() -> None:
    _, taken = walk(weighing(21.2), replace(NOW, max_num_batched_tokens=8192))
    assert "max_num_batched_tokens" in taken.rungs[0].step.arguments


def test_the_rungs_while_serving_come_to_an_end_and_each_leaves_less_of_the_device() -> None:
    expects = expecting(MODEL, Blocks())
    taken = forecast.while_serving(COURSE, expects(NOW), CHOICES, expects)
    used = [expects(NOW).budget.used, *(rung.outlook.budget.used for rung in taken.rungs)]
    assert len(taken.rungs) > 3
    assert taken.end
    assert used == sorted(used, reverse=True)


def test_on_a_cpu_the_kernel_ends_it_and_a_fixed_cache_gets_smaller() -> None:
    now = replace(NOW, device="cpu", kv_cache_memory_bytes=4 * GIB)
    expects = expecting(replace(MODEL, weights_bytes=GIB), Blocks())
    taken = forecast.while_serving(COURSE, expects(now), CHOICES, expects)
    assert "kernel killed" in taken.rungs[0].step.reason
    assert taken.rungs[0].outlook.budget.pool < 4 * GIB


def test_more_requests_at_once_have_to_be_shorter() -> None:
    found = forecast.rows(MODEL, Blocks(), NOW)
    lengths = [row.tokens_each for row in found]
    assert [1, 2, 4, 8, 16, 32, 64, 128, 256] == [row.max_num_seqs for row in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 32768


@given(
    weights=st.floats(0, 30),
    seqs=st.integers(1, 1024),
    tokens=st.integers(16, 16384),
    length=st.integers(1, 262_144),
    share=st.floats(0.3, 1.0),
    window=st.none() | st.integers(1, 5000),
)
def test_a_walk_ends_with_a_start_or_with_the_reason_and_stays_above_the_floors(
    *, weights: float, seqs: int, tokens: int, length: int, share: float, window: int | None
) -> None:
    now = replace(
        NOW, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length, gpu_memory_utilization=share
    )
    outlook, taken = walk(weighing(weights), now, Blocks(window=window))
    last = taken.rungs[-1].outlook if taken.rungs else outlook
    assert (last.failure is None) == (not taken.end)
    for rung in taken.rungs:
        assert rung.step.arguments.get("max_model_len", 2048) >= 2048
        assert rung.step.arguments.get("max_num_seqs", 4) >= 4
