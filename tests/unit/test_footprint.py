"""The sums of a start: what is parsed, what is added up, what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.course import Effective
from llm_serve.core.footprint import (
    Footprint,
    Gpus,
    Layers,
    blocks_in,
    budget,
    longest,
    parse_gpus,
    steps_of_seqs,
    usable_bytes,
)

MIB, GIB = 1 << 20, 1 << 30
MODEL = Footprint(
    weights_bytes=12 * GIB,
    layers=(Layers("full", 28, 57344), Layers("window", 4, 8192, 1024)),
    step_bytes_per_token=128_000,
    hidden_bytes_per_token=7168,
    logits_bytes_per_seq=300_000,
    state_bytes_per_seq=200_000,
    num_layers=32,
    graph_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
NOW = Effective(
    max_model_len=32768,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    gpu_memory_utilization=0.92,
    device_memory_bytes=24 * GIB,
)


@dataclass
class Blocks:
    """A cache of one kind of layer, or of a window beside it."""

    bytes_per_block: int = 16 * 57344
    fixed_blocks: int | None = None
    blocks_per_sequence_at_least: int = 0
    window: int | None = None

    def blocks_per_request(self, length: int, batched_tokens: int) -> int:
        whole = -(-length // 16)
        if self.window is None:
            return whole
        return whole + -(-min(length, self.window + batched_tokens) // 16) + 1


@pytest.mark.parametrize(
    ("text", "count", "gib"),
    [
        ("24GiB", 1, 24),
        ("24 GiB x 4", 4, 24),
        ("4x24GiB", 4, 24),
        ("4 * 24 gb", 4, 24),
        ("  8X80G ", 8, 80),
        ("22528MiB", 1, 22),
        ("22.5GiB x2", 2, 22.5),
    ],
)
def test_gpus_are_spoken_of_in_any_usual_way(text: str, count: int, gib: float) -> None:
    assert Gpus(count, usable_bytes(int(gib * GIB))) == parse_gpus(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "24",
        "GiB",
        "x4",
        "2 x 24GiB x 4",
        "0 x 24GiB",
        "24TiB",
        "-1GiB",
        "0.5GiB",
        "9999GiB",
        "24GiB, 24GiB",
        "2000x24GiB",
    ],
)
def test_what_means_no_gpus_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="GiB"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("shown_mib", "seen_gib"),
    [
        (24576, 23.69),  # RTX 3090
        (143771, 139.8),  # H200
    ],
)
def test_a_program_sees_less_than_the_driver_shows(shown_mib: int, seen_gib: float) -> None:
    assert seen_gib == pytest.approx(usable_bytes(shown_mib * MIB) / GIB, abs=0.05)


def test_all_parts_and_the_pool_are_what_the_engine_may_use() -> None:
    sums = budget(MODEL, NOW)
    assert sums.allowed == sums.weights + sums.step + sums.kept + sums.graphs + sums.pool
    assert sums.allowed == pytest.approx(0.92 * 24 * GIB, abs=1)
    assert sums.step == 2048 * 128_000 * 9 // 8  # the allocator's share


def test_with_many_sequences_it_is_sampling_that_takes_most() -> None:
    assert budget(MODEL, replace(NOW, max_num_seqs=1024)).step == (2048 * 7168 + 1024 * 300_000) * 9 // 8


def test_no_such_allocator_is_on_the_cpu() -> None:
    assert budget(MODEL, replace(NOW, device="cpu")).step == 2048 * 128_000


def test_a_fixed_cache_has_its_size_whatever_is_left() -> None:
    assert budget(MODEL, replace(NOW, kv_cache_memory_bytes=5 * GIB)).pool == 5 * GIB


def test_graphs_cost_nothing_where_none_are_made_and_fewer_with_fewer_sequences() -> None:
    assert budget(MODEL, replace(NOW, enforce_eager=True)).graphs == 0
    assert budget(MODEL, replace(NOW, device="cpu")).graphs == 0
    assert budget(MODEL, replace(NOW, max_num_seqs=16)).graphs < budget(MODEL, NOW).graphs


def test_bytes_per_token_are_those_of_all_layers() -> None:
    assert MODEL.kv_bytes_per_token == 57344 + 8192


def test_a_fixed_number_of_blocks_does_not_follow_the_memory() -> None:
    assert blocks_in(Blocks(fixed_blocks=7), 100 * GIB) == 7
    assert blocks_in(Blocks(), -1) == 0


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_steps_double_and_end_with_what_is_asked_for(most: int, steps: list[int]) -> None:
    assert list(steps_of_seqs(most)) == steps


@given(
    blocks=st.integers(0, 100_000),
    seqs=st.integers(1, 600),
    most=st.integers(1, 200_000),
    window=st.none() | st.integers(1, 5000),
)
def test_the_longest_request_fits_and_one_token_more_does_not(
    blocks: int, seqs: int, most: int, window: int | None
) -> None:
    cache, now = Blocks(window=window), replace(NOW, max_model_len=most)
    length = longest(cache, blocks, now, seqs)
    assert 0 <= length <= most
    if length:
        assert seqs * cache.blocks_per_request(length, 2048) <= blocks - 1
    if length < most:
        assert seqs * cache.blocks_per_request(length + 1, 2048) > blocks - 1


@given(tokens=st.integers(1, 16384), seqs=st.integers(1, 1024), share=st.floats(0.1, 1.0))
def test_smaller_limits_never_leave_less_for_the_cache(tokens: int, seqs: int, share: float) -> None:
    now = replace(NOW, max_num_batched_tokens=tokens, max_num_seqs=seqs, gpu_memory_utilization=share)
    pool = budget(MODEL, now).pool
    assert budget(MODEL, replace(now, max_num_batched_tokens=max(tokens // 2, 1))).pool >= pool
    assert budget(MODEL, replace(now, max_num_seqs=max(seqs // 2, 1))).pool >= pool
    assert budget(MODEL, replace(now, gpu_memory_utilization=share / 2)).pool < pool
