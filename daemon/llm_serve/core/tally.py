"""What clients have got of engines so far, in numbers that only grow: tokens, and how long the first of them took.

The numbers are one row, so that they can lie in memory which other processes read (host/board.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass

_PROMPT, _GENERATED, _FIRST = 0, 1, 2
_SHORTEST_S, _FACTOR = 0.001, 1.25
BOUNDS_S = tuple(_SHORTEST_S * _FACTOR**number for number in range(64))
"""Upper bounds of the buckets of times to the first token, 1 ms to 21 min; the last bucket takes what is longer too."""
WIDTH = _FIRST + len(BOUNDS_S)


class Tally:
    """Counts into `cells`, a row of WIDTH numbers."""

    def __init__(self) -> None:
        self.cells: MutableSequence[float] = [0.0] * WIDTH

    def count(self, *, prompt: int, generated: int, first_tokens_s: Iterable[float]) -> None:
        """So many tokens more, and first tokens that took so long."""
        self.cells[_PROMPT] += prompt
        self.cells[_GENERATED] += generated
        for seconds in first_tokens_s:
            self.cells[_FIRST + min(bisect_left(BOUNDS_S, seconds), len(BOUNDS_S) - 1)] += 1

    def move_to(self, cells: MutableSequence[float]) -> None:
        """Go on counting in another row, which is all zero."""
        for number, value in enumerate(self.cells):
            cells[number] = value
        self.cells = cells


HERE = Tally()
"""What this process's clients have got, of all engines that it has had."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast it goes: tokens/s since the last look, and seconds to the first token in the last looks; None: no token.

    The times are true to a tenth, because they are read off buckets.
    """

    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    first_token_median_s: float | None
    first_token_p99_s: float | None


class Paces:
    """Turns the rows of several processes, looked at again and again, into the pace of all of them."""

    def __init__(self, looks: int) -> None:
        """`looks` is how many of the last ones the times to the first token are taken of."""
        self._before: tuple[tuple[float, ...], ...] = ()
        self._at_s = 0.0
        self._firsts: deque[list[float]] = deque(maxlen=looks)

    def look(self, at_s: float, rows: Iterable[Sequence[float]]) -> Pace:
        """The pace at that time (seconds of any clock). A row that has become smaller is that of a new process."""
        now = tuple(tuple(row) for row in rows)
        before = self._before or now
        by_process = [_grown(old, new) for old, new in zip(before, now, strict=True)]
        grown = [sum(column) for column in zip(*by_process, strict=True)]
        passed_s = max(at_s - self._at_s, 1e-3)
        self._before, self._at_s = now, at_s
        self._firsts.append(grown[_FIRST:])
        firsts = [sum(column) for column in zip(*self._firsts, strict=True)]
        return Pace(
            grown[_PROMPT] / passed_s, grown[_GENERATED] / passed_s, quantile(firsts, 0.5), quantile(firsts, 0.99)
        )


def _grown(before: Sequence[float], now: Sequence[float]) -> Sequence[float]:
    pairs = list(zip(before, now, strict=True))
    return now if any(new < old for old, new in pairs) else [new - old for old, new in pairs]


def quantile(counts: Sequence[float], share: float) -> float | None:
    """Of so many values in each bucket the one which that share of them does not exceed; None where there are none."""
    wanted, seen = math.ceil(share * sum(counts)), 0.0
    if not wanted:
        return None
    for bound, count in zip(BOUNDS_S, counts, strict=True):
        if seen + count >= wanted:
            # Within a bucket values are taken to be spread evenly on its logarithmic scale.
            return bound * math.pow(_FACTOR, (wanted - seen - 0.5) / count - 1)
        seen += count
    return BOUNDS_S[-1]
