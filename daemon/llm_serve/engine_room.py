"""The engine of the moment: built, put behind vLLM's handlers, ended, and explained when it has ended by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from llm_serve import metrics
from llm_serve.core import events, stall
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.evidence import Failure
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import NO_REQUEST
from llm_serve.engine.factory import Factory, StartError
from llm_serve.engine.running import Engine
from llm_serve.front_ends.protocols import Crew, Nobody
from llm_serve.host import interpreter
from llm_serve.host.logs import get_logger
from llm_serve.instance import Instance
from llm_serve.postmortem import Postmortem

_CANCEL_S = 15.0
_BURY_S = 5.0
_ABORT_S = 5.0
_COMPILING_AFTER_S = 5.0


class EngineRoom:
    """There is one engine at most, and what happens to it is told as facts.

    `say` takes a fact, `spawn` runs work beside everything else.
    """

    def __init__(
        self,
        factory: Factory,
        say: Callable[[events.Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._factory, self._say, self._spawn = factory, say, spawn
        self.postmortem: Postmortem | None = None
        """Who explains; known before the first engine is built."""
        self.engine: Engine | None = None
        self.app: Any = None
        """vLLM's HTTP application, from the first engine on."""
        self.crew: Crew = Nobody()
        """The front ends beside this process."""
        self.survivor: Any = None
        """From the first engine on."""
        self._lost = 0
        self._progress = stall.Progress()
        self._building: asyncio.Task[None] | None = None
        self._burying: asyncio.Task[None] | None = None

    @property
    def is_building(self) -> bool:
        """True while an engine starts."""
        return self._building is not None and not self._building.done()

    def build(self, epoch: int, plan: EnginePlan, instance: Instance) -> None:
        """Begin to build an engine."""
        self._building = self._spawn(self._build(epoch, plan, instance))

    def retire(self, epoch: int) -> None:
        """Begin to end an engine that is well; if it has died meanwhile, its burial tells."""
        self._burying = self._spawn(self._retire(epoch))

    def found_dead(self, epoch: int) -> None:
        """A request, or the watch, has met a dead engine."""
        self._lose(epoch, lambda postmortem, engine: postmortem.of_death(engine))

    def found_stalled(self, epoch: int, seconds: float) -> None:
        """The watch has seen no step for so long."""
        self._lose(epoch, lambda postmortem, engine: postmortem.of_stall(engine, seconds))

    def cut_requests(self, why: str) -> None:
        """End every request with an error that says why."""
        self.crew.cut(why)
        if self.survivor is not None:
            self.survivor.end(why)

    async def stop(self) -> None:
        """End whatever there is of an engine. No other follows."""
        if self._burying is not None and not self._burying.done():
            # It removes what the dead engine has left; only its wait for GPU memory can take long.
            await asyncio.wait({self._burying}, timeout=_BURY_S)
        for task in (self._building, self._burying):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_CANCEL_S)
        await self._stop_engine()
        await self._factory.ending.kill_rest()
        self._say(events.EngineStopped())

    async def abort_requests_of(self, place: int) -> None:
        """Have the engine give up the requests of a front end that is gone."""
        from llm_serve.engine import orphans

        if (engine := self.engine) is None:
            return
        try:
            number = await asyncio.wait_for(orphans.abort_requests_of(engine.llm, place), _ABORT_S)
            get_logger().info("what a front end has left in the engine is given up", front_end=place, requests=number)
        except Exception as error:  # noqa: BLE001 - an engine that is dying, too, whose end ends them
            get_logger().warning("the engine did not give up requests", front_end=place, error=repr(error))

    async def stalled_for_s(self, engine: Engine) -> float:
        """Seconds without a step that got anywhere; a compiler at work counts as one."""
        stalled_s = engine.steps.stalled_for_s()
        if stalled_s < _COMPILING_AFTER_S:
            return stalled_s
        marks = await asyncio.to_thread(engine.compiler_marks)
        return min(stalled_s, self._progress.idle_s(marks, time.monotonic()))

    async def _build(self, epoch: int, plan: EnginePlan, instance: Instance) -> None:
        assert self.postmortem is not None, "an engine is started after the host was ready"
        self.postmortem.begin()
        metrics.continuous.engine_starts()
        try:
            with interpreter.loop_first():
                self.engine = await self._factory.build(plan, epoch, instance.settings.recovery)
                self.crew.bind(epoch, self.engine.tasks, self.engine.steps)
                await self._bind(self.engine, instance)
        except (ConfigError, HostError, StartError) as error:
            self.crew.unbind(epoch)
            self._failed(epoch, await self.postmortem.of_start(error))
        except Exception as error:  # noqa: BLE001 - the engine runs, but vLLM's handlers do not take it
            get_logger().error("binding the engine failed", exc_info=error)
            await self._stop_engine()
            self._failed(epoch, await self.postmortem.of_start(error))
        else:
            self._progress = stall.Progress()
            self._say(events.EngineReady(epoch))

    async def _bind(self, engine: Engine, instance: Instance) -> None:
        """Put the engine behind vLLM's handlers."""
        from llm_serve.engine import openai
        from llm_serve.engine.survivor import Survivor

        if self.survivor is None:
            self.survivor = Survivor(self.found_dead, self.crew.company)
            self.survivor.on_ban = self.crew.ban
        self.survivor.attach(engine.llm)
        if self.app is None:
            self.app = await asyncio.to_thread(
                openai.build_app, engine.args, engine.tasks, engine.llm.model_config, instance.routes
            )
        await openai.bind(self.app, self.survivor, engine.args, engine.tasks)
        metrics.continuous.observe()
        self.survivor.bind(engine.llm, engine.epoch)

    def _failed(self, epoch: int, failure: Failure) -> None:
        self._say(events.EngineFailed(epoch, failure, self._factory.built))

    def _lose(self, epoch: int, explain: Callable[[Postmortem, Engine], Awaitable[Failure]]) -> None:
        """From now on there is no engine; why, and when its remains are gone, is found out meanwhile."""
        if (engine := self._unbind(epoch)) is None or (postmortem := self.postmortem) is None:
            return
        self._say(events.EngineLost(epoch))

        async def bury() -> None:
            failure = await explain(postmortem, engine)
            may_be_a_request = failure.kind not in NO_REQUEST
            everywhere = self.crew.judge(self._lost, may_be_a_request=may_be_a_request)
            if self.survivor is not None:
                self.survivor.explain(may_be_a_request=may_be_a_request, everywhere=everywhere)
            self._failed(epoch, failure)

        self._burying = self._spawn(bury())

    async def _retire(self, epoch: int) -> None:
        """What is open goes to the next engine."""
        if (engine := self._unbind(epoch)) is None or self.postmortem is None:
            return
        await self._factory.ending.stop(engine)
        await self.postmortem.wait_for_memory()
        self._say(events.EngineRetired(epoch))

    def _unbind(self, epoch: int) -> Engine | None:
        """The engine with this number, which from now on is given no request. None when it is gone already."""
        if (engine := self.engine) is None or engine.epoch != epoch:
            return None
        self.engine = None
        metrics.continuous.engine_ended()
        if self.survivor is not None:
            self._lost = self.survivor.unbind()
        self.crew.unbind(epoch)
        return engine

    async def _stop_engine(self) -> None:
        if (engine := self.engine) is not None:
            self.engine = None
            self.crew.unbind(engine.epoch)
            await self._factory.ending.stop(engine)
