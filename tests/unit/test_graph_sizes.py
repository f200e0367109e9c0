"""Which CUDA graphs are left: always a next larger one, not far away, and the largest of all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.graph_sizes import sparse


def of_vllm(most: int) -> list[int]:
    """vLLM 0.32's own sizes up to this many tokens."""
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most]


@pytest.mark.parametrize(
    ("most", "before", "after"), [(8, 4, 4), (64, 11, 11), (128, 19, 15), (256, 35, 23), (512, 51, 31), (1024, 83, 47)]
)
def test_a_third_of_the_graphs_is_left_out(most: int, before: int, after: int) -> None:
    """The more there are the more; none of those that few streams use."""
    sizes = of_vllm(most)

    assert before == len(sizes)
    assert after == len(sparse(sizes))
    assert sparse(sizes)[:11] == sizes[:11]


@given(st.integers(1, 1024), st.integers(1, 1024))
def test_every_step_that_had_a_graph_has_one_not_much_larger(most: int, tokens: int) -> None:
    """At most 15 tokens more than before up to 256, 31 above; a size of the user's batch is never left out."""
    sizes = sorted({*of_vllm(most), most})
    if tokens > most:
        return
    left = sparse(sizes, (tokens,) if tokens in sizes else ())
    graph = min(size for size in left if size >= tokens)

    assert graph - tokens < (16 if graph <= 256 else 32)
    assert set(left) <= set(sizes)
    assert tokens in left or tokens not in sizes


@given(st.lists(st.integers(65, 1024).filter(lambda size: size % 8 != 0), unique=True))
def test_what_stands_out_of_the_stride_was_wanted(sizes: list[int]) -> None:
    """vLLM adds the largest step and the largest batch, whatever they are."""
    assert sorted(sizes) == sparse(sorted(sizes))
