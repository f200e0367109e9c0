"""What a load test asks, and when."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.errors import ConfigError
from llm_serve.core.workload import (
    CHAT,
    LONG,
    SHORT,
    Ask,
    Step,
    arrivals,
    closed_steps,
    from_file,
    made_up,
)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("short", [50] * 10),
        ("chat", [150] * 10),
        ("mixed", [50, 50, 50, 50, LONG.tokens] * 2),
    ],
)
def test_a_scenario_is_made_of_its_kinds_in_turn(scenario: str, expected: list[int]) -> None:
    """`mixed` is 80 % short ones, however few are sent."""
    assert expected == [ask.tokens for ask in itertools.islice(made_up(scenario, random.Random(1).random), 10)]
    assert (SHORT.tokens, CHAT.tokens) == (50, 150)


def test_no_two_prompts_begin_alike_and_a_seed_repeats_them() -> None:
    """A cache of prefixes has nothing to find; two tests with one seed ask the same."""
    first, again = (list(itertools.islice(made_up("short", random.Random(7).random), 500)) for _ in range(2))

    assert first == again
    assert 500 == len({str(ask.prompt)[:10] for ask in first})


def test_own_prompts_are_lines_or_objects() -> None:
    """Blank lines are nothing; an object may say how long its answer is."""
    text = 'Hello there.\n\n{"prompt": "Hi", "max_tokens": 7}\n{"messages": [{"role": "user", "content": "Ho"}]}\n'

    assert (
        Ask("Hello there.", 20),
        Ask("Hi", 7),
        Ask(({"role": "user", "content": "Ho"},), 20),
    ) == from_file(text, "own.txt", 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "own.txt: has no prompt in it. Write one prompt a line"),
        ("ok\n{\n", "own.txt:2: not JSON"),
        ('{"prompt": "a", "tokens": 3}', "own.txt:1: unknown key tokens"),
        ('{"prompt": "a", "max_tokens": 0}', "own.txt:1: max_tokens must be a number from 1, not 0"),
        ('{"prompt": "a", "max_tokens": true}', "own.txt:1: max_tokens must be a number from 1, not True"),
        ('{"prompt": ""}', "own.txt:1: must have either prompt"),
        ('{"messages": ["a"]}', "own.txt:1: must have either prompt"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "own.txt:1: must have either prompt"),
    ],
)
def test_a_wrong_line_is_named(text: str, said: str) -> None:
    """File, line, what is wrong."""
    with pytest.raises(ConfigError) as refused:
        from_file(text, "own.txt")

    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_queued", "expected"),
    [
        (None, None, [1, 8, 64, 256]),
        (1000, 256, [1, 8, 64, 256]),
        (256, 256, [1, 8, 64, 256, 512]),
        (256, 10, [1, 8, 64, 256, 266]),
        (16, None, [1, 8, 16, 32]),
        (8, 256, [1, 8, 16]),
        (1, 256, [1, 2]),
        (16, 0, [1, 8, 16]),
    ],
)
def test_default_steps_go_a_little_beyond_the_batch(
    max_num_seqs: int | None, max_queued: int | None, expected: list[int]
) -> None:
    """Far enough to meet the limit, not so far that requests would be refused."""
    assert [Step(streams=each) for each in expected] == list(closed_steps(max_num_seqs, max_queued))


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_default_steps_grow_and_fit(max_num_seqs: int, max_queued: int) -> None:
    """Each step is larger than the one before, and none is more than the server lets in and lets wait."""
    streams = [step.streams or 0 for step in closed_steps(max_num_seqs, max_queued)]

    assert sorted(set(streams)) == streams
    assert 1 <= streams[0]
    assert streams[-1] <= max_num_seqs + max_queued


def test_even_arrivals_keep_their_distance() -> None:
    """4 a second for one second."""
    assert [0.0, 0.25, 0.5, 0.75] == list(arrivals(4, 1, None))


def test_arrivals_by_chance_are_a_poisson_process() -> None:
    """As many as the rate says, and the gaps are spread as much as they are long (exponential)."""
    times = list(arrivals(50, 200, random.Random(3).random))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]

    assert times == sorted(times)
    assert 50 == pytest.approx(len(times) / 200, rel=0.05)
    assert 1 == pytest.approx(statistics.stdev(gaps) / statistics.mean(gaps), abs=0.05)
    assert times == list(arrivals(50, 200, random.Random(3).random))


@given(st.floats(0.1, 500), st.floats(0.1, 20), st.integers(0, 10))
def test_all_arrivals_are_in_time(rate: float, seconds: float, seed: int) -> None:
    """None comes after the end, and the first one at once."""
    for luck in (None, random.Random(seed).random):
        times = list(arrivals(rate, seconds, luck))
        assert 0.0 == times[0]
        assert max(times) < seconds
