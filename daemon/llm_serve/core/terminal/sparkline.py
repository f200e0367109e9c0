"""The last values of a figure as a row of blocks."""

from __future__ import annotations

from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int, top: float | None = None) -> str:
    """The newest `width` values, the newest at the right; what is not known, or not there yet, is blank.

    The highest block stands for `top`, or for the largest value that is shown; the lowest for nothing at all, so that
    a little differs from nothing.
    """
    shown = list(values)[-width:] if width > 0 else []
    highest = top or max((value for value in shown if value is not None), default=0.0)
    return "".join(_block(value, highest) for value in shown).rjust(max(0, width))


def _block(value: float | None, highest: float) -> str:
    if value is None:
        return " "
    if value <= 0 or highest <= 0:
        return BLOCKS[0]
    above = len(BLOCKS) - 1
    return BLOCKS[1 + int(min(1.0, value / highest) * (above - 1) + 0.5)]
