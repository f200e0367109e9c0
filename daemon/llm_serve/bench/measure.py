"""A whole load test: step after step, each with a warm-up apart, and the server watched meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from typing import Any

import aiohttp

from llm_serve.bench.client import Asking, Server
from llm_serve.bench.load import Loop, Tally
from llm_serve.bench.server import keep_observing, model_of, observe
from llm_serve.core.bottleneck import Evidence, Measured, Observation, Verdict, judge
from llm_serve.core.figures import figures
from llm_serve.core.workload import Ask, Step, closed_steps, made_up

_WARM_UP_STREAMS = 8
"""Of a step whose streams are not known: one of an open loop."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load test does.

    Without `steps`, those of a closed loop that fit the server; without `prompts`, those of the scenario. With
    `requests` a step of a closed loop sends so many a stream, instead of lasting `seconds`.
    """

    scenario: str = "short"
    prompts: tuple[Ask, ...] = ()
    steps: tuple[Step, ...] = ()
    seconds: float = 30.0
    requests: int | None = None
    warm_up: int = 1
    is_even: bool = False
    seed: int = 0
    timeout_s: float = 600.0
    model: str | None = None
    asking: Asking = field(default_factory=lambda: Asking(model=""))

    def asks(self) -> Iterator[Ask]:
        """The requests, for ever."""
        if self.prompts:
            return cycle(self.prompts)
        return made_up(self.scenario, random.Random(self.seed).random)  # noqa: S311 - no secret


@dataclass(slots=True)
class Report:
    """What a load test has found so far; `verdict` is None as long as nothing has been measured."""

    url: str
    model: str
    plan: Plan
    started: float
    steps: list[Measured] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """What limits the server."""
        return judge(self.steps) if self.steps else None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        plan, verdict = self.plan, self.verdict
        return {
            "url": self.url,
            "model": self.model,
            "started": self.started,
            "scenario": None if plan.prompts else plan.scenario,
            "prompts": len(plan.prompts) or None,
            "thinking": plan.asking.thinking,
            "ignore_eos": plan.asking.ignore_eos,
            "arrivals": "constant" if plan.is_even else "poisson",
            "seed": plan.seed,
            "interrupted": self.is_interrupted,
            "steps": [
                each.figures.to_json() | {"evidence": None if each.evidence is None else asdict(each.evidence)}
                for each in self.steps
            ],
            "verdict": None if verdict is None else verdict.to_json(),
        }


Progress = Callable[[str, Tally | None], None]
"""Told what is being done, and how far it is; None when a step is over."""


async def measure(server: Server, plan: Plan, stop: asyncio.Event, tell: Progress) -> Report:
    """Run all steps, or those before the stop. Raises HostError or ConfigError when there is nobody to test."""
    async with server.session(plan.timeout_s) as session:
        model = plan.model or await model_of(session, server)
        report = Report(server.socket or server.url, model, plan, time.time())
        asking, asks = replace(plan.asking, model=model), plan.asks()
        loop = Loop(session, asking, asks, stop)
        for step in plan.steps or await _fitting(session, server):
            if not stop.is_set() and plan.warm_up:
                await _warm_up(loop, step, plan, tell)
            if not stop.is_set() and (measured := await _step(session, loop, step, plan, tell)) is not None:
                report.steps.append(measured)
        report.is_interrupted = stop.is_set()
        return report


async def _fitting(session: aiohttp.ClientSession, server: Server) -> tuple[Step, ...]:
    seen = await observe(session)
    slots = seen.max_num_seqs if seen is not None else None
    return closed_steps(None if slots is None else int(slots), server.max_queued)


async def _warm_up(loop: Loop, step: Step, plan: Plan, tell: Progress) -> None:
    streams, tally = step.streams or _WARM_UP_STREAMS, Tally()
    with _telling(tell, f"{step}: warming up", tally):
        await loop.closed(tally, streams, requests=plan.warm_up * streams)


async def _step(session: aiohttp.ClientSession, loop: Loop, step: Step, plan: Plan, tell: Progress) -> Measured | None:
    """Measure one step. None when it was interrupted before anything had come back."""
    tally, seen = Tally(), list[Observation]()
    # Ten looks at least; not more than one a second, because each costs the server some milliseconds.
    watch = asyncio.create_task(keep_observing(session, min(1.0, plan.seconds / 10), seen))
    with _telling(tell, str(step), tally):
        if step.rate is not None:
            await loop.open(tally, step.rate, seconds=plan.seconds, seed=None if plan.is_even else plan.seed)
        else:
            whole = plan.requests * (step.streams or 1) if plan.requests is not None else 0
            seconds = plan.seconds if plan.requests is None else None
            await loop.closed(tally, step.streams or 1, seconds=seconds, requests=whole)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    tell(str(step), None)
    if not tally.samples:
        return None
    found = figures(step, tally.samples, began_s=tally.began_s, until_s=tally.until_s, generator=tally.generator)
    during = [each for each in seen if each.at_s <= tally.began_s + found.seconds]
    return Measured(found, Evidence.of(during) if during else None)


@contextlib.contextmanager
def _telling(tell: Progress, what: str, tally: Tally) -> Iterator[None]:
    """Tell of this tally twice a second."""

    async def tick() -> None:
        while True:
            tell(what, tally)
            await asyncio.sleep(0.5)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
