"""When to try again and when to give up: functions of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.restarts import backoff_s, within_window


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [
        (0, 0.0),
        (1, 0.0),
        (2, 1.0),
        (3, 2.0),
        (4, 4.0),
        (5, 8.0),
        (7, 32.0),
        (8, 60.0),
        (50, 60.0),
        (10**6, 60.0),
    ],
)
def test_the_pause_doubles_from_one_second_to_a_minute(failures: int, seconds: float) -> None:
    """The first failure is answered at once, the following ones after 1, 2, 4 ... 60 s."""
    assert seconds == backoff_s(failures)


@given(st.integers(min_value=0, max_value=10**9))
def test_more_failures_never_mean_a_shorter_pause(failures: int) -> None:
    """The pause grows with the failures, and stays between nothing and a minute."""
    assert 0 <= backoff_s(failures) <= backoff_s(failures + 1) <= 60


@pytest.mark.parametrize(
    ("starts", "now", "kept"),
    [
        ((), 100.0, ()),
        ((100.0,), 100.0, (100.0,)),
        ((40.0, 41.0), 100.0, (41.0,)),
        ((99.0, 50.0, 70.0), 100.0, (50.0, 70.0, 99.0)),
        ((101.0,), 100.0, ()),
    ],
    ids=["none", "just now", "one on the edge is out", "oldest first", "one of the future is out"],
)
def test_a_start_counts_for_the_length_of_the_window(
    starts: tuple[float, ...], now: float, kept: tuple[float, ...]
) -> None:
    """Starts of the last 60 s are kept in order; one that is 60 s old is not."""
    assert kept == within_window(starts, now, 60.0)


@given(st.lists(st.floats(0, 1e6)), st.floats(0, 1e6), st.floats(1, 1e5))
def test_what_is_kept_is_kept_again(starts: list[float], now: float, window_s: float) -> None:
    """Sorting out twice at the same time is sorting out once."""
    once = within_window(starts, now, window_s)

    assert once == within_window(once, now, window_s)
