"""Few requests at a time on their way from the gate to the engine, where front ends share one.

That way costs milliseconds of the event loop: to parse, to render a template, to tokenize. Of many requests that come
at once, each would do its first step before any does its second, and the first would reach the engine along with the
last. One after the other they need as long in all, but half as long on average, and the engine begins with the first.
A front end that is alone has no CPU to spare for that: there the engine waits for all of them either way.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

WIDTH = 4
"""More than one, for steps that are taken in threads (templates, tokenizers, images) leave the loop to others."""
_PATIENCE_S = 0.05
"""Whoever is on the way for longer (a long text, an image) is read beside the loop, in nobody's way. A loop that is
late by as much has more to do than requests, which would only wait longer for it one by one: then all are let in."""


class Doorway:
    """Lets requests in, in their order: `width` at a time, and as many more each `patience_s`; all when it is late."""

    def __init__(self, width: float = math.inf, patience_s: float = _PATIENCE_S) -> None:
        self._width, self._patience_s = width, patience_s
        self._on_their_way = 0
        self._due_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> Step:
        """Return when it is this one's turn."""
        if not self._waiting and self._on_their_way < self._width:
            self._on_their_way += 1
            return Step(self)
        loop = asyncio.get_running_loop()
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
        return Step(self)

    def left(self) -> None:
        """One is not on its way any more."""
        self._on_their_way -= 1
        if self._on_their_way < self._width:
            self._let_in(1)

    def _tick(self) -> None:
        """Time has passed: the next ones, or everybody where the loop is late."""
        self._timer = None
        loop = asyncio.get_running_loop()
        is_late = loop.time() - self._due_at > self._patience_s
        self._let_in(math.inf if is_late else self._width)
        if self._waiting:
            self._wait(loop)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_at = loop.time() + self._patience_s
        self._timer = loop.call_at(self._due_at, self._tick)

    def _let_in(self, number: float) -> None:
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
