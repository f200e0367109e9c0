"""When a refused client is told to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.retry_after import LEAST_S, MOST_S, UNKNOWN_S, for_engine, for_room


@pytest.mark.parametrize(
    ("past_s", "passed_s", "expected"),
    [
        pytest.param([], 0, UNKNOWN_S, id="the first start ever"),
        pytest.param([20], 0, 20, id="as long as last time"),
        pytest.param([20], 15.2, 5, id="less what has passed, rounded up"),
        pytest.param([4, 60, 5], 1, 4, id="the median: one long start among short ones does not count"),
        pytest.param([4, 8], 0, 6, id="the middle of two"),
        pytest.param([20], 20, LEAST_S, id="due now"),
        pytest.param([20], 50, 30, id="late by 30 s: as long again"),
        pytest.param([3600], 0, MOST_S, id="a very large model: at most"),
    ],
)
def test_an_engine_is_expected_when_it_came_before(past_s: list[float], passed_s: float, expected: int) -> None:
    """The median of what starts and recoveries took, less what has passed of this one."""
    assert expected == for_engine(past_s, passed_s)


@pytest.mark.parametrize(
    ("waiting", "admitted", "in_s", "expected"),
    [
        pytest.param(256, 32, 16.0, MOST_S, id="a long queue: at most"),
        pytest.param(30, 32, 16.0, 15, id="two a second"),
        pytest.param(1, 32, 1.0, LEAST_S, id="at least"),
        pytest.param(10, 0, 0.0, UNKNOWN_S, id="nobody has gone in yet"),
    ],
)
def test_room_is_expected_at_the_pace_of_the_queue(waiting: int, admitted: int, in_s: float, expected: int) -> None:
    """So many wait, and so many went in lately."""
    assert expected == for_room(waiting, admitted, in_s)


@given(st.lists(st.floats(0, 1e9)), st.floats(0, 1e9))
def test_the_answer_is_always_sane(past_s: list[float], passed_s: float) -> None:
    """Whatever the history, a client is neither sent into a loop nor away for hours."""
    assert LEAST_S <= for_engine(past_s, passed_s) <= MOST_S
