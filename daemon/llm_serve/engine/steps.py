"""Watches the steps of one engine: when did the last one get anywhere, and is there work that waits for the next?

vLLM's own health looks at a flag, which a frozen engine never sets, and a loop that turns without scheduling anything
would answer any question. So only what the scheduler reports counts: tokens, or numbers that moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from llm_serve.core import tally
from llm_serve.core.admission import IDLE, Load


class StepWatch(StatLoggerBase):  # type: ignore[misc]  # vLLM's types are Any here
    """vLLM tells it about every step of every core of one engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: dict[int, tuple[float, ...]] = {}
        self.last_step_at: float | None = None
        self.running = self.waiting = 0
        self._unfinished: Callable[[], int] = int
        self._elsewhere: Callable[[], int] = int
        self._tell: Callable[[Load], None] | None = None
        self._busy_since: float | None = None

    def attach(self, unfinished: Callable[[], int]) -> None:
        """Say how to ask for the number of requests that the engine has not finished."""
        self._unfinished = unfinished

    def share(self, elsewhere: Callable[[], int]) -> None:
        """Say how to ask for the same number of other clients of the engine."""
        self._elsewhere = elsewhere

    @property
    def unfinished(self) -> int:
        """How many requests of this client the engine has not finished."""
        return self._unfinished()

    def heard_of_step(self, at: float) -> None:
        """Another client of the engine was told of a step at that time."""
        self.last_step_at = max(at, self.last_step_at or 0.0)

    def tell(self, note: Callable[[Load], None]) -> None:
        """Call `note` with the work of all cores after every step from now on."""
        self._tell = note

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002 - vLLM's signature
        engine_idx: int = 0,
    ) -> None:
        """Take note of one step."""
        mark = self._marks.get(engine_idx)
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            mark = (self.running, self.waiting, scheduler_stats.kv_cache_usage)
        # A long prompt gives no token for many steps, but each of them fills more of the KV cache.
        if iteration_stats is not None or mark != self._marks.get(engine_idx):
            self.last_step_at = self._clock()
        if mark is not None:
            self._marks[engine_idx] = mark
        if self._tell is None:
            return  # the first token of all is no client's
        if iteration_stats is not None:
            tally.HERE.count(
                prompt=iteration_stats.num_prompt_tokens,
                generated=iteration_stats.num_generation_tokens,
                first_tokens_s=iteration_stats.time_to_first_tokens_iter,
            )
        if scheduler_stats is not None:
            self._tell(self.load)

    @property
    def load(self) -> Load:
        """The work of all cores, as their last steps told."""
        if not self._marks:
            return IDLE
        running, waiting, used = zip(*self._marks.values(), strict=True)
        return Load(int(sum(running)), int(sum(waiting)), max(used))

    def log_engine_initialized(self) -> None:
        """Nothing: readiness is the first token's matter."""

    def stalled_for_s(self) -> float:
        """Seconds for which work has been there and no step got anywhere; 0 when there is no work."""
        now = self._clock()
        if not self._unfinished() + self._elsewhere():
            self._busy_since = None
            return 0.0
        self._busy_since = self._busy_since or now
        return now - max(self._busy_since, self.last_step_at or 0.0)

    def waiting_for(self) -> str:
        """What the engine has not finished, in words."""
        scheduler = f"the scheduler last had {self.running} running, {self.waiting} waiting"
        return f"{self._unfinished() + self._elsewhere()} requests unfinished; {scheduler}"
