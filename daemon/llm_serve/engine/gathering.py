"""Lets pieces of streamed answers gather while the event loop has no air, so that each costs its share less often.

A piece of an answer costs the loop 20 to 60 µs, however many tokens it has. When a loop is busy nearly all the time,
requests that come wait for it at each of their steps, and the engine waits for them. Then streams speak a little less
often: in the beat of one timer for all of them, which is what they would come to by themselves when the loop is too
late, but sooner. The first piece of an answer and the last never wait.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from typing import Any

_WINDOW_S = 0.05
_BUSY, _IDLE = 0.8, 0.5
"""Shares of the time in which the loop's thread is on a CPU: above one pieces gather longer, below the other less."""
BEATS_S = (0.0, 0.01, 0.02, 0.03, 0.05)
"""Time between two pieces of one answer, at least. The last is still twenty pieces a second."""


class Beat:
    """How long pieces gather at the moment, and whose do. `used_s` tells how long the loop's thread was on a CPU."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, used_s: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._used_s = clock, used_s
        self._level = 0
        self._since, self._used = clock(), -1.0  # it is made in another thread than the loop's
        self._gathering: list[asyncio.Event] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def interval_s(self) -> float:
        """Seconds between two pieces, by how busy the calling thread was lately. 0 while it has air."""
        now = self._clock()
        if now - self._since >= _WINDOW_S:
            used = self._used_s()
            if self._used >= 0:
                self._judge((used - self._used) / (now - self._since))
            self._since, self._used = now, used
        return BEATS_S[self._level]

    def _judge(self, busy: float) -> None:
        if busy > _BUSY:
            self._level = min(self._level + 1, len(BEATS_S) - 1)
        elif busy < _IDLE:
            self._level = max(self._level - 1, 0)

    def wait(self, ready: asyncio.Event, interval_s: float) -> None:
        """Set it with the next beat."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # none is set, or by a loop that has ended
            loop.call_later(interval_s, self._beat)
            self._loop, self._gathering = loop, []
        self._gathering.append(ready)

    def _beat(self) -> None:
        self._loop = None
        gathering, self._gathering = self._gathering, []
        for ready in gathering:
            ready.set()


def install() -> None:
    """Give AsyncLLM collectors that can wait. A second call does nothing."""
    module: Any = importlib.import_module("vllm.v1.engine.async_llm")
    if not issubclass(module.RequestOutputCollector, _Waits):
        module.RequestOutputCollector = collector(module.RequestOutputCollector, Beat())


class _Waits:
    """Marks a collector that can."""


def collector(kind: Any, beat: Beat) -> Any:
    """VLLM's collector (`kind`), in this beat."""

    class Collector(kind, _Waits):  # type: ignore[misc]  # vLLM's types are Any here
        """Between the engine's outputs and the one who sends them: what is there is merged until it is asked for."""

        output: Any
        has_spoken = False

        def put(self, output: Any) -> None:
            """Keep it, and wake the one who sends it now or with the next beat."""
            is_between = self.has_spoken and not getattr(output, "finished", True)
            self.has_spoken = True
            if is_between and self.output is None and (interval_s := beat.interval_s()):
                self.output = output
                beat.wait(self.ready, interval_s)
                return
            super().put(output)
            if not is_between:
                self.ready.set()

    return Collector
