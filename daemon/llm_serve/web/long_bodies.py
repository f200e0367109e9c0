"""Long bodies are looked at one after the other, and the event loop has air in between.

A body is parsed on the loop, by us and again by vLLM's handler: a few milliseconds for a picture, up to half a second
for thirty megabytes of small values. Whoever sends such bodies as fast as they are refused would keep the loop from
everybody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

LONG_BYTES = 128 << 10
_PAUSE = 12.0
"""So many times as long as we took for one, the next one waits. vLLM takes some twice as long for it: a quarter of the
loop's time is for long bodies, at most."""


class LongBodies:
    """Lets them in one by one."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._turn = asyncio.Lock()

    async def look(self, at: Callable[[bytes], Found], body: bytes) -> Found:
        """What `at` finds in this body, when it is its turn; others have theirs before and after."""
        if len(body) < LONG_BYTES:
            return at(body)
        await self._turn.acquire()
        took_s = 0.0
        try:
            await asyncio.sleep(0)  # whoever has come while its pieces were put together
            began = self._clock()
            found = at(body)
            took_s = self._clock() - began
        finally:
            asyncio.get_running_loop().call_later(took_s * _PAUSE, self._turn.release)
        await asyncio.sleep(took_s)  # and before vLLM parses it
        return found
