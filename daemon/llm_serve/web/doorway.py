"""Few requests at a time on their way from the gate to the engine.

That way costs milliseconds of the event loop: to parse, to render a template, to tokenize. Of many requests that come
at once, each would do its first step before any does its second, and the first would reach the engine along with the
last. One after the other most arrive sooner, and the engine begins with the first; the last ones may arrive later.
"""

from __future__ import annotations

import asyncio
from collections import deque

_WIDTH = 4
"""More than one, for steps that are taken in threads (templates, tokenizers, images) leave the loop to others."""
_EVERY_S = 0.004
"""Whoever is on the way, another one follows after that: what takes long (a long text, an image) is read beside the
loop, in nobody's way. A loop that is late by as much has more to do than requests, which would only wait longer for
it one by one: then all are let in."""


class Doorway:
    """Lets requests in, in their order: `width` at a time, one more each `every_s`; all when the loop is late."""

    def __init__(self, width: int = _WIDTH, every_s: float = _EVERY_S) -> None:
        self._width, self._every_s = width, every_s
        self._on_their_way = 0
        self._due_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> Step:
        """Return when it is this one's turn."""
        loop = asyncio.get_running_loop()
        if self._waiting or self._on_their_way >= self._width:
            turn = loop.create_future()
            self._waiting.append(turn)
            if self._timer is None:
                self._wait(loop)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self.left()  # it had been let in at that moment
                raise
        else:
            self._on_their_way += 1
        return Step(self)

    def left(self) -> None:
        """One is not on its way any more."""
        self._on_their_way -= 1
        if self._waiting and self._on_their_way < self._width:
            self._let_in(1)

    def _tick(self) -> None:
        """Time has passed: the next one, or everybody where the loop is late."""
        self._timer = None
        loop = asyncio.get_running_loop()
        is_late = loop.time() - self._due_at > self._every_s
        self._let_in(len(self._waiting) if is_late else 1)
        if self._waiting:
            self._wait(loop)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_at = loop.time() + self._every_s
        self._timer = loop.call_at(self._due_at, self._tick)

    def _let_in(self, number: int) -> None:
        while number and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has gone
                turn.set_result(None)
                self._on_their_way += 1
                number -= 1


class Step:
    """One request on its way."""

    __slots__ = ("_doorway",)

    def __init__(self, doorway: Doorway) -> None:
        self._doorway: Doorway | None = doorway

    def leave(self) -> None:
        """The engine has it, or it is over. A second call does nothing."""
        if self._doorway is not None:
            self._doorway.left()
            self._doorway = None
