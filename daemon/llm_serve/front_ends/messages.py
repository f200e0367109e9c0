"""What the supervisor orders of the front ends beside its own, what they report, and the pipe that carries both.

A pipe keeps the order, and that is relied upon: what an order says holds when the next one is read. Numbers that change
all the time are not sent; they stand on the board (host/board.py).
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any

from prometheus_client.metrics_core import Metric

from llm_serve.core.settings import Settings
from llm_serve.core.status import Snapshot

_LENGTH = struct.Struct("!Q")


# Orders.
@dataclass(frozen=True, slots=True)
class Attach:
    """The engine of this epoch is being started: make a client for it. `offer` is engine/attach.py's."""

    epoch: int
    offer: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bind:
    """The engine of this epoch works: give it requests. `ready` is what it has said of itself at its start."""

    epoch: int
    tasks: tuple[str, ...]
    ready: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unbind:
    """The engine of this epoch is gone, or is about to go: what was given to it goes to the next."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Judge:
    """Why the engine that was unbound last has ended. `everywhere` is how many requests it took along."""

    may_be_a_request: bool
    everywhere: int


@dataclass(frozen=True, slots=True)
class Open:
    """Let requests through, to an engine that runs so many of them at once."""

    slots: int | None


@dataclass(frozen=True, slots=True)
class Hold:
    """Make requests wait."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer 503 from now on, also to those that wait."""

    message: str
    retry_after_s: int


@dataclass(frozen=True, slots=True)
class Cut:
    """End every request with an error that says why; no engine follows."""

    why: str


@dataclass(frozen=True, slots=True)
class Ban:
    """Refuse requests with this fingerprint for so long: one has killed engines."""

    fingerprint: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """The file was read again, and says this."""

    settings: Settings
    keys: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tell:
    """What the instance is now, for those who ask a front end."""

    now: Snapshot


@dataclass(frozen=True, slots=True)
class Count:
    """Report all counters as Counted."""


@dataclass(frozen=True, slots=True)
class End:
    """Accept nothing more, finish what was accepted, and end."""


TO_THE_GATE = (Open, Hold, Refuse)
"""Those whose being heard is waited for."""
Order = Attach | Bind | Unbind | Judge | Open | Hold | Refuse | Cut | Ban | Reconfigure | Tell | Count | End


# Facts.
@dataclass(frozen=True, slots=True)
class Attached:
    """Requests reach the engine of this epoch from here. `after_s` is how long that took since it worked."""

    epoch: int
    after_s: float


@dataclass(frozen=True, slots=True)
class FoundDead:
    """A request has met a dead engine."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Banned:
    """A request of this fingerprint has killed engines."""

    fingerprint: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Counted:
    """All counters, as they were when the last Count was read."""

    families: tuple[Metric, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Logged:
    """Something to be logged where the supervisor logs."""

    level: str
    event: str
    values: Mapping[str, Any]


Fact = Attached | FoundDead | Banned | Counted | Logged
Message = Order | Fact


class Pipe:
    """One end of a pipe: messages go out without waiting, and come in one at a time.

    Both ends are the same program's, a fork of which has the other one: so they may be pickled.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._expected: int | None = None

    @classmethod
    async def over(cls, connected: socket.socket) -> Pipe:
        """A pipe over one end of a socket pair."""
        return cls(*await asyncio.open_connection(sock=connected))

    def send(self, message: Message) -> None:
        """Send it; to one who is gone it is lost, and `receive` tells of that."""
        body = bytes(ForkingPickler.dumps(message))
        if not self._writer.is_closing():
            self._writer.write(_LENGTH.pack(len(body)) + body)

    async def receive(self) -> Message | None:
        """The next message; None when the other end is gone."""
        try:
            if self._expected is None:  # else the last call was given up in the middle
                (self._expected,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            body = await self._reader.readexactly(self._expected)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._expected = None
        message: Message = pickle.loads(body)  # noqa: S301 - see the class
        return message

    def close(self) -> None:
        """Let go of this end."""
        self._writer.close()
