"""When work counts as under way, and when a larger plan is tried."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.stall import Progress, is_step_up_due


def test_what_was_never_seen_to_move_has_always_stood_still() -> None:
    """The first look only sets a mark: a process that has used 40 s of CPU before may hang since then."""
    progress = Progress()

    assert math.isinf(progress.idle_s((40.0, 1 << 30), 100.0))
    assert math.isinf(progress.idle_s((40.0, 1 << 30), 101.0))


@pytest.mark.parametrize(
    ("marks", "moves"),
    [
        pytest.param((41.0, 0), True, id="CPU"),
        pytest.param((40.049, 0), False, id="too little CPU: it waits"),
        pytest.param((40.06, 0), True, id="just enough CPU"),
        pytest.param((40.0, 1), True, id="reads"),
        pytest.param((0.0, 0), False, id="all processes are gone"),
    ],
)
def test_cpu_and_reading_are_progress(marks: tuple[float, int], moves: bool) -> None:
    """A twentieth of a core, or any byte."""
    progress = Progress()
    progress.idle_s((40.0, 0), 100.0)

    assert moves == (progress.idle_s(marks, 101.0) == 0.0)


def test_idleness_counts_from_the_last_move() -> None:
    """Two seconds after it, it is two seconds."""
    progress = Progress()
    progress.idle_s((1.0, 0), 10.0)
    progress.idle_s((2.0, 0), 11.0)

    assert progress.idle_s((2.0, 0), 13.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("on_plan_s", "idle_s", "failed", "is_due"),
    [
        pytest.param(599, 9999, 0, False, id="too early"),
        pytest.param(600, 30, 0, True, id="time, and nobody there"),
        pytest.param(600, 29, 0, False, id="somebody was there just now"),
        pytest.param(1199, 9999, 1, False, id="a trial has failed: twice as long"),
        pytest.param(1200, 9999, 1, True, id="twice as long has passed"),
        pytest.param(600 * 2**16, 9999, 500, True, id="the wait ends growing"),
    ],
)
def test_a_larger_plan_is_tried_late_and_idle(on_plan_s: float, idle_s: float, failed: int, is_due: bool) -> None:
    """After step_up_after_s = 600."""
    assert is_due == is_step_up_due(on_plan_s=on_plan_s, idle_s=idle_s, wait_s=600, trials_failed=failed)


@given(on_plan_s=st.floats(0, 1e9), idle_s=st.floats(0, 1e9), wait_s=st.floats(1, 1e6), failed=st.integers(0, 1000))
def test_a_failed_trial_never_makes_the_next_one_earlier(
    on_plan_s: float, idle_s: float, wait_s: float, failed: int
) -> None:
    """Due after n + 1 failures means due after n."""
    later = is_step_up_due(on_plan_s=on_plan_s, idle_s=idle_s, wait_s=wait_s, trials_failed=failed + 1)
    now = is_step_up_due(on_plan_s=on_plan_s, idle_s=idle_s, wait_s=wait_s, trials_failed=failed)
    assert now or not later
