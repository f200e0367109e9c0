"""Rows in aligned columns, in no more cells than there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_serve.core.terminal.cells import cells, clip, pad, plain

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """One column. Where there is no room for all, those of the highest `rank` go first; `right` is for figures."""

    title: str
    rank: int = 0
    right: bool = False


def figures(first: str, *others: str) -> tuple[Column, ...]:
    """Columns of figures behind one that says what they are of."""
    return Column(first), *(Column(title, right=True) for title in others)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The titles and each row as one line, at most `width` cells long, if that is given."""
    grid = [[column.title for column in columns], *([plain(cell) for cell in row] for row in rows)]
    widths = [max(cells(line[place]) for line in grid) for place in range(len(columns))]
    kept = _fitting(columns, widths, width)
    lines = [
        _GAP.join(pad(line[place], widths[place], right=columns[place].right) for place in kept).rstrip()
        for line in grid
    ]
    return [line if width is None else clip(line, width) for line in lines]


_LEAST_LAST = 16
"""Cells that the last column can do with, since its text may be cut."""


def _fitting(columns: Sequence[Column], widths: Sequence[int], width: int | None) -> list[int]:
    """The places of the columns that there is room for, in their order."""
    kept, last = list(range(len(columns))), len(columns) - 1

    def needed() -> int:
        return sum(min(widths[place], _LEAST_LAST) if place == last else widths[place] for place in kept) + len(
            _GAP
        ) * (len(kept) - 1)

    while width is not None and len(kept) > 1 and needed() > width:
        kept.remove(max(kept, key=lambda place: columns[place].rank))
    return kept
