"""The page on which front ends write what the others may want to know."""

from __future__ import annotations

import os
import time

from llm_serve.core.admission import IDLE, Load
from llm_serve.core.company import NEVER, Other
from llm_serve.core.tally import Tally
from llm_serve.host.board import Board, Row, Seat


def test_what_one_writes_the_others_read_in_any_process() -> None:
    """The memory is the same one; no row runs into the next."""
    board = Board(3)
    if (child := os.fork()) == 0:
        seat = Seat(Board(3, board.descriptor), 1)
        seat.row.turned_at = time.monotonic()
        seat.tell_gate(inside=2, let_in=1, waiting=3, first_since=17.0)
        seat.tell_work(given=5, suspects=1)
        seat.tell_load(Load(4, 2, 0.5))
        seat.tell_waiting(b"key", 3)
        seat.tell_waiting(b"key", -1)
        tally = Tally()
        tally.move_to(seat.row.tally)
        tally.count(prompt=6, generated=2, first_tokens_s=[])
        os._exit(0)
    os.waitpid(child, 0)

    other = Other(inside=2, let_in=1, waiting=3, first_since=17.0, given=5, suspects=1)
    assert (Other(goes_first=True), other) == (Seat(board, 2).others()[0], board.rows[1].as_other(0))
    assert Seat(board, 2).others()[1].goes_first
    assert Load(4, 2, 0.5) == board.newest_load()[1]
    assert [6.0, 2.0] == list(board.rows[1].tally)[:2]
    assert [2, 0, 2] == [Seat(board, place).waiting(b"key") for place in range(3)]
    assert {0.0} == {row.cells[row.first + n] for row in (board.rows[0], board.rows[2]) for n in range(Row.width)}


def test_a_row_that_is_cleared_says_nothing() -> None:
    """As before its front end was there."""
    board = Board(2)
    seat = Seat(board, 1)
    seat.tell_gate(inside=2, let_in=1, waiting=3, first_since=NEVER)
    seat.tell_load(Load(1, 1, 1.0))
    seat.tell_waiting(b"key", 1)

    seat.row.clear()

    assert 0 == Seat(board, 0).waiting(b"key")

    assert (Other(goes_first=False), (0.0, IDLE)) == (board.rows[1].as_other(0), board.newest_load())


def test_keys_that_share_a_line_are_not_to_be_guessed() -> None:
    """Each board hashes them in its own way, and all who look at it in the same."""
    first, second = Board(2), Board(2)
    keys = [bytes([number]) for number in range(64)]

    assert [*map(first.line_of, keys)] != [*map(second.line_of, keys)]
    assert [*map(first.line_of, keys)] == [*map(Board(2, first.descriptor).line_of, keys)]


def test_connections_go_to_who_has_fewest_of_those_that_take_them() -> None:
    """One that does not accept, or whose loop stands still, takes none and keeps none away."""
    board = Board(3)
    seats = [Seat(board, place) for place in range(3)]
    for seat, connections in zip(seats, (2, 1, 0), strict=True):
        seat.tell_connections(connections, accepts=True)
        seat.row.turned_at = time.monotonic()

    def takers() -> list[int]:
        return [seat.place for seat in seats if seat.row.accepts and seat.is_least_connected()]

    assert [2] == takers()
    seats[2].row.turned_at -= 60
    assert [1, 2] == takers()
    seats[2].tell_connections(0, accepts=False)
    assert [1] == takers()
    seats[1].tell_connections(2, accepts=True)
    assert [0, 1] == takers()
