"""When a client that was refused should ask again: functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_S, MOST_S, UNKNOWN_S = 1, 120, 10


def for_engine(past_s: Sequence[float], passed_s: float) -> int:
    """Seconds until there is an engine: what it took the median of times, less what has passed of this time.

    One that is late already is expected to take as long again as it is late.
    """
    if not past_s:
        return UNKNOWN_S
    ordered = sorted(past_s)
    usual_s = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return _within_bounds(abs(usual_s - passed_s))


def for_room(waiting: int, admitted: int, in_s: float) -> int:
    """Seconds until so many who wait have gone in, at the pace at which the last `admitted` did so `in_s` seconds."""
    if not admitted or in_s <= 0:
        return UNKNOWN_S
    return _within_bounds(waiting * in_s / admitted)


def _within_bounds(seconds: float) -> int:
    return max(LEAST_S, math.ceil(min(seconds, MOST_S)))
