"""What clients have got so far, and how fast it goes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.tally import BOUNDS_S, WIDTH, Paces, Tally, quantile

TIMES_S = st.floats(min_value=0.001, max_value=1200)


def test_the_pace_is_what_was_added_since_the_last_look() -> None:
    """Tokens by the second; what was there at the first look counts for nothing, because nobody knows since when."""
    tally, paces = Tally(), Paces(looks=10)
    tally.count(prompt=1000, generated=1000, first_tokens_s=[1.0])
    first = paces.look(100.0, [tally.cells])
    tally.count(prompt=30, generated=8, first_tokens_s=[0.25])

    then = paces.look(102.0, [tally.cells])

    assert (0.0, 0.0, None) == (first.prompt_tokens_per_s, first.generated_tokens_per_s, first.first_token_median_s)
    assert (15.0, 4.0) == (then.prompt_tokens_per_s, then.generated_tokens_per_s)
    assert then.first_token_median_s == pytest.approx(0.25, rel=0.12)


def test_processes_are_added_up_and_one_that_begins_anew_does_not_count_backwards() -> None:
    """A front end that has ended leaves a row of zeros, and its successor counts from there."""
    tallies, paces = (Tally(), Tally()), Paces(looks=10)
    for tally in tallies:
        tally.count(prompt=0, generated=100, first_tokens_s=[])
    paces.look(0.0, [tally.cells for tally in tallies])
    tallies[0].count(prompt=0, generated=5, first_tokens_s=[])
    successor = Tally()
    gone = paces.look(1.0, [tallies[0].cells, successor.cells])
    successor.count(prompt=0, generated=7, first_tokens_s=[])

    assert 5.0 == gone.generated_tokens_per_s
    assert 7.0 == paces.look(2.0, [tallies[0].cells, successor.cells]).generated_tokens_per_s


def test_times_to_the_first_token_are_those_of_the_last_looks() -> None:
    """What is longer ago than that is over."""
    tally, paces = Tally(), Paces(looks=3)
    paces.look(0.0, [tally.cells])
    tally.count(prompt=1, generated=1, first_tokens_s=[0.5])

    medians = [paces.look(float(at), [tally.cells]).first_token_median_s for at in (1, 2, 3, 4)]

    assert [True, True, True, False] == [median is not None for median in medians]


@given(st.lists(TIMES_S, min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_true_to_a_bucket(times_s: list[float], share: float) -> None:
    """It lies in the bucket of the value which that share of all does not exceed, whatever the values are."""
    tally = Tally()
    tally.count(prompt=0, generated=0, first_tokens_s=times_s)

    found = quantile(tally.cells[2:], share)

    exact = sorted(times_s)[math.ceil(share * len(times_s)) - 1]
    assert found is not None
    assert exact / 1.25 <= found <= exact * 1.25 + 1e-9


@pytest.mark.parametrize("seconds", [-1.0, 0.0, BOUNDS_S[-1], 1e9, math.inf])
def test_no_time_is_left_out(seconds: float) -> None:
    """Not even one that no clock should have shown."""
    tally = Tally()

    tally.count(prompt=0, generated=0, first_tokens_s=[seconds])

    assert 1.0 == sum(tally.cells)


def test_a_tally_that_moves_goes_on() -> None:
    """Into memory that others read."""
    tally, elsewhere = Tally(), [0.0] * WIDTH
    tally.count(prompt=3, generated=1, first_tokens_s=[])
    tally.move_to(elsewhere)

    tally.count(prompt=1, generated=1, first_tokens_s=[0.1])

    assert [4.0, 2.0, 1.0] == [*elsewhere[:2], sum(elsewhere[2:])]
