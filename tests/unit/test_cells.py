"""Text in cells, figures in words, tables, and sparklines: what fits, and what it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from llm_serve.core.terminal import words
from llm_serve.core.terminal.cells import between, cells, clip, pad, plain
from llm_serve.core.terminal.sparkline import BLOCKS, sparkline
from llm_serve.core.terminal.table import Column, table

WIDTHS = st.integers(0, 120)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("two\nlines\tand  blanks ", "two lines and blanks"),
        ("\x1b]0;owned\x07\x1b[2Jred", "]0;owned[2Jred"),
        ("a\u202eb\u200bx\u0301", "abx"),
        ("e\u0301", "é"),
        ("模型", "模型"),
        ("\udcff", ""),
    ],
)
def test_plain_text_moves_no_cursor(text: str, shown: str) -> None:
    """A model's name or an error of another program cannot draw on the operator's terminal."""
    assert shown == plain(text)


@given(st.text())
def test_plain_text_is_one_line_that_a_terminal_shows_as_it_is(text: str) -> None:
    """Whatever it was; and it can be encoded."""
    shown = plain(text)

    assert shown.isprintable()
    assert plain(shown) == shown
    assert shown == shown.encode().decode()


@given(st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF)), WIDTHS)
def test_cut_text_is_never_longer_than_its_place(text: str, width: int) -> None:
    """By our own measure for all characters; what fits is not cut."""
    shown = clip(plain(text), width)

    assert cells(shown) <= width
    assert shown == plain(text) or cells(plain(text)) > width


@given(st.text("ab 模型é…▁█°", max_size=60), st.text("ab 模型", max_size=20), WIDTHS)
def test_cells_are_counted_as_a_terminal_library_does(left: str, right: str, width: int) -> None:
    """Rich, which has tables of its own, sees the same width."""
    assert cell_len(left) == cells(left)
    assert max(cell_len(left), width) == cell_len(pad(left, width))
    assert width == cell_len(between(left, right, width)) or width < 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (3, "3.0"),
        (0.034, "0.03"),
        (0.5, "0.50"),
        (7.13, "7.13"),
        (71.26, "71.3"),
        (99.96, "100"),
        (12345.6, "12346"),
    ],
)
def test_a_number_has_three_digits_that_matter(value: float | None, text: str) -> None:
    """No more, and no fewer before the point."""
    assert text == words.number(value)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0123, "12 ms"), (0.34, "0.34 s"), (7.125, "7.12 s"), (125.0, "125 s")]
)
def test_a_short_time_is_told_with_its_unit(value: float | None, text: str) -> None:
    """Milliseconds below a tenth of a second."""
    assert text == words.seconds(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h"), (-5, "0 s")],
)
def test_an_age_is_told_in_two_units(seconds: int, text: str) -> None:
    """The two that matter; a clock that was set back does not make it negative."""
    assert text == words.age(seconds)


COLUMNS = (Column("name"), Column("count", 1, right=True), Column("model", 3), Column("why", 2))
ROWS = (("a", "1", "Qwen/Qwen2.5-7B", "nothing at all happened"), ("bbbb", "12345", "m", "-"))


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (None, "name  count  model            why"),
        (60, "name  count  model            why"),
        (40, "name  count  why"),
        (15, "name  count"),
        (6, "name"),
    ],
)
def test_a_narrow_table_has_the_columns_that_matter(width: int | None, titles: str) -> None:
    """The least important go first, whole; the last is cut before."""
    lines = table(COLUMNS, ROWS, width)

    assert titles == lines[0]
    assert 3 == len(lines)


def test_figures_stand_to_the_right() -> None:
    """As in any table."""
    assert ["name  count  why", "a         1  nothing at all ha…", "bbbb  12345  -"] == table(COLUMNS, ROWS, 31)


@given(st.lists(st.tuples(*[st.text(max_size=30)] * 4), max_size=5), st.integers(1, 100))
def test_no_line_of_a_table_is_longer_than_its_place(rows: list[tuple[str, ...]], width: int) -> None:
    """Whatever is in it; and each row is one line."""
    lines = table(COLUMNS, rows, width)

    assert len(rows) + 1 == len(lines)
    assert all(cells(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("values", "width", "top", "shown"),
    [
        ([], 4, None, "    "),
        ([0, 0], 4, None, "  ▁▁"),
        ([0, 1, 2, 4], 4, None, "▁▄▅█"),
        ([0, 1, 2, 4], 2, None, "▅█"),
        ([0.001, 1.0], 2, 1.0, "▂█"),
        ([1, None, 1], 5, None, "  █ █"),
        ([5.0], 1, 1.0, "█"),
        ([3], 0, None, ""),
        ([3], -2, None, ""),
    ],
)
def test_a_sparkline_shows_the_newest_values(
    values: list[float | None], width: int, top: float | None, shown: str
) -> None:
    """A little differs from nothing, and nothing from what is not known."""
    assert shown == sparkline(values, width, top)


@given(st.lists(st.none() | st.floats(0, 1e12), max_size=50), st.integers(0, 60), st.none() | st.floats(0, 1e12))
def test_a_sparkline_fills_its_place_and_keeps_the_order(
    values: list[float | None], width: int, top: float | None
) -> None:
    """One block for each, and a larger value has no lower block."""
    shown = sparkline(values, width, top)

    assert width == len(shown)
    newest = values[-width:] if width else []
    known = sorted(
        (value, block) for value, block in zip(newest, shown[width - len(newest) :], strict=True) if value is not None
    )
    heights = [BLOCKS.index(block) for _, block in known]
    assert sorted(heights) == heights
