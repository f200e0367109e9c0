"""A request that waits at the gate: its body, read ahead, and what is decided about it."""

from __future__ import annotations

import asyncio
from enum import Enum
from functools import cached_property

from pydantic import BaseModel, ValidationError

from llm_serve.web.answer import Answer
from llm_serve.web.asgi import Message, Receive

_LOOK_AGAIN_S = 1.0
READ_AHEAD_BYTES = 256 << 20
"""The most that the bodies of all who wait may take; what is longer waits in the network."""


class Verdict(Enum):
    """What becomes of a request that waited."""

    admitted = "admitted"
    full = "full"
    stopping = "stopping"
    late = "late"
    gone = "gone"


class Budget:
    """Bytes that may still be read ahead."""

    def __init__(self, left: int = READ_AHEAD_BYTES) -> None:
        self.left = left


class ReadAhead:
    """A request's body, read while the request waits, so that a client that leaves is noticed."""

    def __init__(self, receive: Receive, budget: Budget) -> None:
        self._receive, self._budget = receive, budget
        self._body = bytearray()
        self._taken = 0
        self._is_whole = self._is_delivered = self._has_left = False
        self._pending: asyncio.Task[Message] | None = None

    async def until_client_leaves(self) -> None:
        """Read the body, as far as the budget goes, and return when the client has gone."""
        while not self._has_left:
            while self._budget.left <= 0 and not self._is_whole:  # noqa: ASYNC110 - rare, and others make room
                await asyncio.sleep(_LOOK_AGAIN_S)
            if self._pending is None:
                self._pending = asyncio.ensure_future(self._receive())
            message = await asyncio.shield(self._pending)
            self._pending = None
            self._keep(message)

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._has_left = True
            return
        piece = message.get("body", b"")
        self._body += piece
        self._taken += len(piece)
        self._budget.left -= len(piece)
        self._is_whole = not message.get("more_body")

    async def stop_watching(self, watcher: asyncio.Task[None], *, is_over: bool) -> None:
        """End the watch. A read that is under way is kept for the one who reads next, unless all is over."""
        watcher.cancel()
        await asyncio.wait({watcher})
        if is_over and self._pending is not None:
            self._pending.cancel()
        self._budget.left += self._taken
        self._taken = 0

    async def __call__(self) -> Message:
        """What the application calls as `receive`."""
        if self._body or (self._is_whole and not self._is_delivered):
            body, self._body, self._is_delivered = bytes(self._body), bytearray(), True
            return {"type": "http.request", "body": body, "more_body": not self._is_whole}
        if self._has_left:
            return {"type": "http.disconnect"}
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return await pending
        return await self._receive()

    def wants_stream(self) -> bool:
        """True once the body is here and asks for a stream."""
        return self._is_whole and self._asks_for_stream

    @cached_property
    def _asks_for_stream(self) -> bool:
        try:
            return bool(_Wish.model_validate_json(bytes(self._body)).stream)
        except ValidationError:
            return False


class _Wish(BaseModel):
    """What of a request's body is of interest here."""

    stream: bool | None = None


class Waiter:
    """One request that waits."""

    def __init__(self, body: ReadAhead, answer: Answer) -> None:
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
