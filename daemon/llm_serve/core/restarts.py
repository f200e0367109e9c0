"""When to try again and when to give up: functions of numbers. Time comes in as an argument."""

from __future__ import annotations

from collections.abc import Iterable

_FIRST_S, _LONGEST_S = 1.0, 60.0


def within_window(starts: Iterable[float], now: float, window_s: float) -> tuple[float, ...]:
    """The start times that still count at `now`, oldest first."""
    return tuple(sorted(start for start in starts if now - window_s < start <= now))


def backoff_s(failures_in_a_row: int) -> float:
    """Seconds to wait before the next start: 0 after the first failure, then 1, 2, 4 ... up to 60."""
    if failures_in_a_row <= 1:
        return 0.0
    return float(min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures_in_a_row - 2, 16)))
