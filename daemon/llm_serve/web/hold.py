"""A request at the gate: its body, read before it is let in, and what is decided about it while it waits."""

from __future__ import annotations

import asyncio
from enum import Enum
from functools import cached_property

from pydantic import BaseModel, ValidationError

from llm_serve.web.answer import Answer
from llm_serve.web.asgi import Message, Receive

_LOOK_AGAIN_S = 1.0
READ_AHEAD_BYTES = 256 << 20
"""The most that the bodies of all who are not let in yet may take; what is longer waits in the network."""
_FREE_BYTES = 64 << 10
"""What every body may take outside of that: as much as the server reads of a connection unasked."""


class Verdict(Enum):
    """What becomes of a request that waited."""

    admitted = "admitted"
    full = "full"
    stopping = "stopping"
    late = "late"
    gone = "gone"


class Reading(Enum):
    """How far a body was read."""

    whole = "whole"
    too_long = "too long"
    no_room = "no room"
    cut = "cut"


class Budget:
    """Bytes that bodies may still take, from their first to the moment when the model takes them over.

    When there are none left, whoever was first to take some may go on alone: so one of them always gets done.
    """

    def __init__(self, left: int = READ_AHEAD_BYTES) -> None:
        self.left = left
        self._taken: dict[Body, int] = {}

    def allows(self, body: Body) -> bool:
        """True when this body may grow."""
        return self.left > 0 or next(iter(self._taken), None) is body

    def take(self, body: Body, size: int) -> None:
        """This body has grown by so many bytes."""
        self.left -= size
        self._taken[body] = self._taken.get(body, 0) + size

    def give_back(self, body: Body) -> None:
        """All that this body took is free again."""
        self.left += self._taken.pop(body, 0)


class Body:
    """A request's body, read before the request is let in: one that is slow to come keeps no place from others.

    While the request waits, a client that leaves is noticed. Every body may take a little outside of the budget, so
    that a few clients with long ones cannot keep everybody else out.
    """

    def __init__(self, receive: Receive, budget: Budget) -> None:
        self._receive, self._budget = receive, budget
        self._body = b""
        self._is_delivered = self._has_left = False
        self._pending: asyncio.Task[Message] | None = None

    async def read(self, max_bytes: int, patience_s: float) -> Reading:
        """Read all of it, and wait at most so long for room in the budget. `close` gives the room back."""
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            if not await self._find_room(size, patience_s):
                return Reading.no_room
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return Reading.cut
            piece, more = message.get("body", b""), bool(message.get("more_body"))
            size += len(piece)
            if size > max_bytes:
                return Reading.too_long
            if size > _FREE_BYTES:
                self._budget.take(self, min(len(piece), size - _FREE_BYTES))
            pieces.append(piece)
        self._body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return Reading.whole

    async def _find_room(self, size: int, patience_s: float) -> bool:
        """True when the next piece may be read. Left in the network meanwhile, it is not its client who is slow."""
        while size >= _FREE_BYTES and not self._budget.allows(self):
            if patience_s <= 0:
                return False
            await asyncio.sleep(min(patience_s, _LOOK_AGAIN_S))
            patience_s -= _LOOK_AGAIN_S
        return True

    @property
    def content(self) -> bytes:
        """What was read; empty once it was delivered."""
        return self._body

    def close(self) -> None:
        """Give the room in the budget back."""
        self._budget.give_back(self)

    async def until_client_leaves(self) -> None:
        """Return when the client has gone."""
        while not self._has_left:
            if self._pending is None:
                self._pending = asyncio.ensure_future(self._receive())
            message = await asyncio.shield(self._pending)
            self._pending = None
            self._has_left = message["type"] == "http.disconnect"

    async def until_the_end(self) -> None:
        """Return when the client has gone, or its answer is complete; for while nobody else looks."""
        pending, self._pending = self._pending, None
        message = await (pending or self._receive())
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._has_left = True

    async def stop_watching(self, watcher: asyncio.Task[None], *, is_over: bool) -> None:
        """End the watch. A look that is under way is kept for the one who looks next, unless all is over."""
        watcher.cancel()
        await asyncio.wait({watcher})
        if is_over and self._pending is not None:
            self._pending.cancel()

    async def __call__(self) -> Message:
        """What the application calls as `receive`."""
        if not self._is_delivered:
            body, self._body, self._is_delivered = self._body, b"", True
            self.close()
            return {"type": "http.request", "body": body, "more_body": False}
        if self._has_left:
            return {"type": "http.disconnect"}
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return await pending
        return await self._receive()

    def wants_stream(self) -> bool:
        """True when it asks for a stream."""
        return self._asks_for_stream

    @cached_property
    def _asks_for_stream(self) -> bool:
        try:
            return bool(_Wish.model_validate_json(self._body).stream)
        except ValidationError:
            return False


class _Wish(BaseModel):
    """What of a request's body is of interest here."""

    stream: bool | None = None


class Waiter:
    """One request that waits."""

    def __init__(self, body: Body, answer: Answer) -> None:
        self.body, self._answer = body, answer
        self._decided: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

    def decide(self, verdict: Verdict) -> None:
        """Say what becomes of it. Admitted, it has a place inside until its answer is over."""
        self._answer.has_place = verdict is Verdict.admitted
        self._decided.set_result(verdict)

    async def wait(self, timeout_s: float) -> Verdict:
        """Wait for a decision, and for the client to stay."""
        reading = asyncio.create_task(self.body.until_client_leaves())
        is_over = True
        try:
            waited_for: set[asyncio.Future[Verdict] | asyncio.Task[None]] = {self._decided, reading}
            done, _ = await asyncio.wait(waited_for, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._decided.done():  # also when it was a moment after the end of the wait: the place is taken
                is_over = (verdict := self._decided.result()) is not Verdict.admitted
                return verdict
            return Verdict.gone if done else Verdict.late
        finally:
            await self.body.stop_watching(reading, is_over=is_over)
