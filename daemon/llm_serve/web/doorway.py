"""Few requests at a time on their way from the gate to the engine.

That way costs milliseconds of the event loop: to parse, to render a template, to tokenize. Of many requests that come
at once, each would do its first step before any does its second, and the first would reach the engine along with the
last. One after the other they need as long in all, but half as long on average, and the engine begins with the first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

_WIDTH = 4
"""More than one, for steps that are taken in threads (templates, tokenizers, images) leave the loop to others."""
_PATIENCE_S = 0.05
"""Who takes longer than that is no longer in anybody's way: a long text, or an image, is read beside the loop."""


class Step:
    """One request on its way. `leave` may be called more than once."""

    def __init__(self, doorway: Doorway) -> None:
        self._doorway: Doorway | None = doorway
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self.leave)

    def leave(self) -> None:
        """The engine has it, or it takes long, or it is over."""
        if self._doorway is not None:
            self._timer.cancel()
            self._doorway.left()
            self._doorway = None


class Doorway:
    """Lets in `width` at a time, in their order."""

    def __init__(self, width: int = _WIDTH) -> None:
        self._free = width
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> Step:
        """Return when there is room."""
        if self._free:
            self._free -= 1
            return Step(self)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)
            if turn.done() and not turn.cancelled():
                self.left()  # the room that was given to it is another's
            raise
        return Step(self)

    def left(self) -> None:
        """Somebody has left: the next one's turn."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
