"""Heat pauses admission above a limit, and lets it go on 5 degrees below."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.guard import too_hot
from llm_serve.core.telemetry import Reading


def gpus(*temperatures: float | None) -> list[Reading]:
    """GPUs with these temperatures."""
    return [Reading(index, "u", "n", temperature_celsius=each) for index, each in enumerate(temperatures)]


@pytest.mark.parametrize(
    ("temperatures", "is_paused", "expected"),
    [
        ((84.0,), False, False),
        ((85.0,), False, False),
        ((86.0,), False, True),
        ((40.0, 86.0), False, True),
        ((85.0,), True, True),
        ((81.0,), True, True),
        ((80.0,), True, False),
        ((80.0, None), True, False),
    ],
)
def test_the_hottest_gpu_decides(temperatures: tuple[float | None, ...], is_paused: bool, expected: bool) -> None:
    """Above 85 it pauses, at 80 it goes on."""
    assert expected is bool(too_hot(gpus(*temperatures), 85, is_paused=is_paused))


def test_what_is_said_names_gpu_limit_and_end() -> None:
    """What a person reads in `status`."""
    assert (
        "GPU 1 has 91 °C and gpu.pause_above_celsius is 85: admission pauses until it has 80"
        == too_hot(gpus(60.0, 91.0), 85, is_paused=False)
    )  # fmt: skip


@pytest.mark.parametrize("temperatures", [(), (None,)])
def test_nothing_is_said_of_what_is_not_known(temperatures: tuple[float | None, ...]) -> None:
    """Without a sensor neither a pause nor its end."""
    assert too_hot(gpus(*temperatures), 85, is_paused=True) is None


def test_off_is_off() -> None:
    """0 means never, and ends a pause of a limit that was taken away."""
    assert "" == too_hot(gpus(105.0), 0, is_paused=True)


@given(st.lists(st.floats(20, 110), min_size=1, max_size=40), st.integers(30, 110))
def test_it_does_not_flutter(course: list[float], limit: int) -> None:
    """Between a pause and its end the temperature has changed by 5 degrees at least."""
    is_paused, at = False, 0.0
    for temperature in course:
        now = bool(too_hot(gpus(temperature), limit, is_paused=is_paused))
        if now is not is_paused:
            assert now or at - temperature >= 5
            is_paused, at = now, temperature
        elif is_paused:
            at = max(at, temperature)
