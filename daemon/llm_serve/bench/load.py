"""One step of load: so many requests always running, or requests on a schedule that waits for no answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field

import aiohttp

from llm_serve.bench import client
from llm_serve.core.figures import Generator, Sample, percentile
from llm_serve.core.workload import Ask, arrivals

_TICK_S = 0.02
_AFTER_ERROR_S = 0.1
"""Pause of a stream whose request failed: a server that refuses at once is not to be asked as fast as it can refuse."""


@dataclass(slots=True)
class Tally:
    """What has been sent and answered so far. Times are of time.perf_counter()."""

    began_s: float = field(default_factory=time.perf_counter)
    until_s: float | None = None
    sent: int = 0
    samples: list[Sample] = field(default_factory=list)
    generator: Generator = field(default_factory=Generator)

    @property
    def running(self) -> int:
        """How many are on their way; after the step, how many were interrupted."""
        return self.sent - len(self.samples)


class Loop:
    """Sends requests over one session. When `stop` is set, what runs is given up and the tally stays as it is."""

    def __init__(
        self, session: aiohttp.ClientSession, asking: client.Asking, asks: Iterator[Ask], stop: asyncio.Event
    ) -> None:
        self._session, self._asking, self._asks, self._stop = session, asking, asks, stop

    async def closed(self, tally: Tally, streams: int, *, seconds: float | None = None, requests: int = 0) -> None:
        """Keep so many requests running for this long, and let them finish; or until so many have been sent."""
        tally.began_s = time.perf_counter()
        tally.until_s = None if seconds is None else tally.began_s + seconds

        async def stream() -> None:
            while tally.sent < requests if tally.until_s is None else time.perf_counter() < tally.until_s:
                await self._one(tally)
                if tally.samples[-1].error is not None:
                    await asyncio.sleep(_AFTER_ERROR_S)

        await self._watched(tally, _all(stream() for _ in range(streams)))

    async def open(self, tally: Tally, rate: float, *, seconds: float, seed: int | None) -> None:
        """Send at this rate for this long, evenly without a seed, and let all finish."""
        luck = None if seed is None else random.Random(seed).random  # noqa: S311 - no secret
        tally.began_s = time.perf_counter()

        async def schedule() -> None:
            async with asyncio.TaskGroup() as running:
                for at in arrivals(rate, seconds, luck):
                    due_s = tally.began_s + at
                    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    running.create_task(self._one(tally, due_s))

        await self._watched(tally, schedule())

    async def _one(self, tally: Tally, due_s: float | None = None) -> None:
        tally.sent += 1
        late_s = 0.0 if due_s is None else time.perf_counter() - due_s
        tally.samples.append(await client.ask(self._session, self._asking, next(self._asks), late_s=late_s))

    async def _watched(self, tally: Tally, load: Coroutine[None, None, None]) -> None:
        """Run the load to its end or until the stop, and note how the generator itself did meanwhile."""
        work, stop = asyncio.create_task(load), asyncio.create_task(self._stop.wait())
        late: list[float] = []
        watch = asyncio.create_task(_lateness(late))
        cpu_s = time.process_time()
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        ended_s = time.perf_counter()
        if not work.done():
            tally.until_s = ended_s if tally.until_s is None else min(ended_s, tally.until_s)
            work.cancel()
        stop.cancel()
        watch.cancel()
        tally.generator = Generator(
            percentile(late or [0.0], 0.99),
            max(late, default=0.0),
            (time.process_time() - cpu_s) / (ended_s - tally.began_s),
        )
        await asyncio.wait({work})
        if not work.cancelled():
            work.result()


async def _all(each: Iterator[Coroutine[None, None, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for one in each:
            group.create_task(one)


async def _lateness(late: list[float]) -> None:
    """Note how much later than asked for this loop wakes up."""
    while True:
        due_s = time.perf_counter() + _TICK_S
        await asyncio.sleep(_TICK_S)
        late.append(time.perf_counter() - due_s)
