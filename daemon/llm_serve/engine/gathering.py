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
from typing import Any

_WINDOW_S = 0.05
_BUSY, _IDLE = 0.8, 0.5
"""Shares of the time in which the loop's thread is on a CPU: above one pieces gather longer, below the other less."""
_BEATS_S = (0.0, 0.01, 0.02, 0.03, 0.05)
"""Time between two pieces of one answer, at least. The last is still twenty pieces a second."""


class Beat:
    """How long pieces gather at the moment, and whose do."""

    def __init__(self) -> None:
        self._level = 0
        self._since, self._used = time.monotonic(), time.thread_time()
        self._gathering: list[asyncio.Event] = []

    def interval_s(self) -> float:
        """Seconds between two pieces, by how busy the calling thread was lately. 0 while it has air."""
        now = time.monotonic()
        if now - self._since >= _WINDOW_S:
            used = time.thread_time()
            self._judge((used - self._used) / (now - self._since))
            self._since, self._used = now, used
        return _BEATS_S[self._level]

    def _judge(self, busy: float) -> None:
        if busy > _BUSY:
            self._level = min(self._level + 1, len(_BEATS_S) - 1)
        elif busy < _IDLE:
            self._level = max(self._level - 1, 0)

    def wait(self, ready: asyncio.Event, interval_s: float) -> None:
        """Set it with the next beat."""
        if not self._gathering:
            asyncio.get_running_loop().call_later(interval_s, self._beat)
        self._gathering.append(ready)

    def _beat(self) -> None:
        gathering, self._gathering = self._gathering, []
        for ready in gathering:
            ready.set()


_BEAT = Beat()


def install() -> None:
    """Give AsyncLLM collectors that can wait. A second call does nothing."""
    module: Any = importlib.import_module("vllm.v1.engine.async_llm")
    if not issubclass(module.RequestOutputCollector, _Waits):
        module.RequestOutputCollector = _collector(module.RequestOutputCollector)


class _Waits:
    """Marks a collector that can."""


def _collector(kind: Any) -> Any:
    class Collector(kind, _Waits):  # type: ignore[misc]  # vLLM's types are Any here
        """Between the engine's outputs and the one who sends them: what is there is merged until it is asked for."""

        output: Any
        has_spoken = False

        def put(self, output: Any) -> None:
            """Keep it, and wake the one who sends it now or with the next beat."""
            is_between = self.has_spoken and not getattr(output, "finished", True)
            self.has_spoken = True
            if is_between and self.output is None and (interval_s := _BEAT.interval_s()):
                self.output = output
                _BEAT.wait(self.ready, interval_s)
                return
            super().put(output)
            if not is_between:
                self.ready.set()

    return Collector
