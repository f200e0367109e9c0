"""A page of memory on which the front ends of one instance write what the others, and the supervisor, may want to know.

Each has a row of its own that nobody else writes, of numbers that are each written at once; so there are no locks, and
nobody waits for anybody. The memory has no name: it goes with the last process that has it, whatever ends that.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import MutableSequence
from typing import Any, ClassVar

from llm_serve.core.admission import IDLE, Load
from llm_serve.core.company import NEVER, Other
from llm_serve.core.tally import WIDTH as TALLY_WIDTH

FRESH_S = 1.0
"""A front end whose loop has not turned for so long keeps nobody from a turn at its gate or at the door."""
_BYTES = 8
_LINES = 256
_SALT_BYTES = 8
"""At the head of the memory. It makes the hash one that nobody can look for somebody else's line with."""


class _Cell:
    """One number of a row."""

    def __init__(self) -> None:
        self._place = 0

    def __set_name__(self, owner: type[Row], name: str) -> None:
        self._place = owner.width
        owner.width += 1

    def __get__(self, row: Row, owner: type[Row]) -> float:
        return row.cells[row.first + self._place]

    def __set__(self, row: Row, value: float) -> None:
        row.cells[row.first + self._place] = value


class _Cells:
    """Several numbers of a row, as a part of the memory itself."""

    def __init__(self, count: int) -> None:
        self._place, self._count = 0, count

    def __set_name__(self, owner: type[Row], name: str) -> None:
        self._place = owner.width
        owner.width += self._count

    def __get__(self, row: Row, owner: type[Row]) -> MutableSequence[float]:
        first = row.first + self._place
        return row.cells[first : first + self._count]


class Row:
    """What one front end says of itself. All of it is zero before it is there, and after its end.

    Times are monotonic seconds, which all processes of a machine share.
    """

    width: ClassVar[int] = 0

    turned_at = _Cell()
    """When its loop last turned."""
    heard = _Cell()
    """How many orders it has carried out."""
    epoch = _Cell()
    """The engine that it gives requests to; 0 while there is none."""
    connections = _Cell()
    """Connections that it holds; counted only while `accepts` is 1."""
    accepts = _Cell()
    in_flight = _Cell()
    """Requests at its gate, those that wait included."""
    waiting = _Cell()
    inside = _Cell()
    let_in = _Cell()
    first_since = _Cell()
    given = _Cell()
    suspects = _Cell()
    """See company.Other; `first_since` is 0 where that is NEVER."""
    lost = _Cell()
    """How many of its requests were with the engine that was lost last, the one of the epoch `lost_epoch`."""
    lost_epoch = _Cell()
    unfinished = _Cell()
    """Requests that the engine owes it an answer for."""
    stepped_at = _Cell()
    """When a step of the engine last got anywhere, as far as this one knows."""
    loaded_at = _Cell()
    running = _Cell()
    queued = _Cell()
    kv_cache_usage = _Cell()
    """What the engine last told it of its work, and when: the engine tells one of them after each step."""
    tally = _Cells(TALLY_WIDTH)
    """What its clients have got so far; see core/tally.py."""
    lines = _Cells(_LINES)
    """How many wait at its gate, by a hash of their keys: two keys may share a line."""

    def __init__(self, cells: MutableSequence[float], place: int) -> None:
        self.cells, self.place, self.first = cells, place, _SALT_BYTES // _BYTES + place * self.width

    def clear(self) -> None:
        """Forget it: it has ended."""
        for number in range(self.first, self.first + self.width):
            self.cells[number] = 0.0

    @property
    def turns(self) -> bool:
        """True while the loop of its front end turns: what another one says may be long over."""
        return time.monotonic() - self.turned_at < FRESH_S

    def as_other(self, place: int) -> Other:
        """How it looks to the front end in `place`."""
        return Other(
            inside=int(self.inside),
            let_in=int(self.let_in),
            waiting=int(self.waiting),
            first_since=(self.first_since or NEVER) if self.turns else NEVER,
            given=int(self.given),
            suspects=int(self.suspects),
            goes_first=self.place < place,
        )


class Board:
    """The rows of all front ends. `descriptor` is what another process needs, beside the number of places."""

    def __init__(self, places: int, descriptor: int | None = None) -> None:
        size = _SALT_BYTES + places * Row.width * _BYTES
        if descriptor is None:
            descriptor = os.memfd_create("llm-serve-board", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, os.urandom(_SALT_BYTES), 0)
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, size)
        self._salt = memory[:_SALT_BYTES]
        cells: Any = memoryview(memory).cast("d")
        self.rows = tuple(Row(cells, place) for place in range(places))

    def line_of(self, key: bytes) -> int:
        """The place among a row's `lines` where those of this key are counted."""
        return int.from_bytes(hashlib.blake2b(key, digest_size=4, key=self._salt).digest(), "big") % _LINES

    def newest_load(self) -> tuple[float, Load]:
        """The engine's work as it told any of them last, and when that was: 0 when it has not."""
        row = max(self.rows, key=lambda row: row.loaded_at)
        if not row.loaded_at:
            return 0.0, IDLE
        return row.loaded_at, Load(int(row.running), int(row.queued), row.kv_cache_usage)


class Seat:
    """One front end's place at the board: it writes its own row, and reads those of the others (a Company)."""

    def __init__(self, board: Board, place: int) -> None:
        self.board, self.place, self.row = board, place, board.rows[place]

    def others(self) -> tuple[Other, ...]:
        """The others; what they have in the engine is there whether their loops turn or not."""
        return tuple(row.as_other(self.place) for row in self.board.rows if row.place != self.place)

    def tell_gate(self, *, inside: int, let_in: int, waiting: int, first_since: float) -> None:
        """What this front end's gate has let in and keeps waiting."""
        row = self.row
        row.inside, row.let_in, row.waiting = inside, let_in, waiting
        row.first_since = 0.0 if first_since == NEVER else first_since

    def tell_work(self, *, given: int, suspects: int) -> None:
        """What of it is with the engine."""
        self.row.suspects = suspects
        self.row.given = given

    def waiting(self, key: bytes) -> int:
        """How many of this key wait at the others' gates."""
        line = self.board.line_of(key)
        return int(sum(row.lines[line] for row in self.board.rows if row.place != self.place))

    def tell_waiting(self, key: bytes, change: int) -> None:
        """So many more of this key, or fewer, wait at this front end's gate."""
        self.row.lines[self.board.line_of(key)] += change

    def tell_load(self, load: Load) -> None:
        """The engine has told this one of its work."""
        row = self.row
        row.running, row.queued, row.kv_cache_usage = load.running, load.waiting, load.kv_cache_usage
        row.loaded_at = time.monotonic()

    def tell_connections(self, number: int, *, accepts: bool) -> None:
        """This front end holds so many connections, and takes more or not."""
        self.row.connections, self.row.accepts = number, accepts

    def is_least_connected(self) -> bool:
        """True when no other one that accepts connections holds fewer."""
        others = (row for row in self.board.rows if row.place != self.place and row.accepts and row.turns)
        return all(self.row.connections <= other.connections for other in others)
