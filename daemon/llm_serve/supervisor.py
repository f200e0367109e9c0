"""Runs the machine: feeds it facts, carries out its orders, and is the only writer of the instance's state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from llm_serve import __version__, metrics
from llm_serve.core import actions, events, guard, machine, stall, states
from llm_serve.core.admission import Load
from llm_serve.core.course import Course, Floors
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.fallbacks import AUTO_BACKENDS
from llm_serve.core.policy import Choices, Limits
from llm_serve.core.progress import SERVING, Phase
from llm_serve.core.settings import Settings
from llm_serve.core.states import State
from llm_serve.core.status import FrontEndStatus, Snapshot
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import Factory, Origin
from llm_serve.engine_room import EngineRoom
from llm_serve.front_ends.protocols import Entrance
from llm_serve.host import boot, processes
from llm_serve.host.logs import get_logger
from llm_serve.host.systemd import Notifier
from llm_serve.instance import Host, Instance, installed_vllm, ready_host

if TYPE_CHECKING:
    from llm_serve.engine.steps import StepWatch
    from llm_serve.front_ends.pool import FrontEnds

_WATCH_EVERY_S = 0.5
_EXTEND_EVERY_S, _EXTEND_BY_S = 2.5, 30.0
_LOG_STATS_EVERY_S = 10.0
_GRACE_S = 60.0
_WAITING = Phase("waiting", 0.0)
_FINISHING = Phase("finishing requests in flight", 0.0)


class Supervisor:
    """One instance from its first second to its last."""

    def __init__(
        self,
        instance: Instance,
        notifier: Notifier,
        factory: Factory,
        collector: Collector,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._instance, self._notifier, self._factory, self._collector = instance, notifier, factory, collector
        self._situation = machine.Situation(_limits(instance.settings), Course(instance.plan), since=time.monotonic())
        self._started = time.monotonic()
        self._vllm_version = installed_vllm()  # read once: it takes a descriptor, and there may be none later
        self._on_ready = on_ready
        self._events: asyncio.Queue[events.Event] = asyncio.Queue()
        self._heard = 0
        self._turn = asyncio.Event()
        self._files = {0: instance}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = EngineRoom(factory, self._events.put_nowait, self._spawn)
        self._draining: asyncio.Task[None] | None = None
        self._failed_at: float | None = None
        self._bug: BaseException | None = None
        self._host: Host | None = None
        self._looked_at = self._busy_at = time.monotonic()
        self._stalled_s = 0.0
        self.gate: Entrance | None = None
        self._front_ends: Callable[[], tuple[FrontEndStatus, ...]] = tuple
        self._load: Callable[[StepWatch], Load] = lambda steps: steps.load
        self.on_change: Callable[[Instance], None] = lambda _: None
        """Called when another reading of the file counts from now on."""
        self._on_news: Callable[[Snapshot], None] = lambda _: None
        self.reload_failed: str | None = None
        """Why the last reload changed nothing, for people to see."""

    def join(self, front_ends: FrontEnds) -> None:
        """Serve with several front ends, of which this process has one."""
        self.gate = self._room.crew = front_ends
        self._front_ends, self._on_news = front_ends.status, front_ends.tell
        self._load = lambda _: front_ends.load
        self._factory.party, front_ends.spared = front_ends.party, self._factory.ending.spared
        front_ends.found_dead, front_ends.abort = self._room.found_dead, self._room.abort_requests_of
        self._spawn(front_ends.run(lambda: self._room.survivor, lambda: self._factory.environ))

    # What others may read or say.
    def snapshot(self) -> Snapshot:
        """The instance as it is now."""
        now, settings, engine = self._situation, self._instance.settings, self._room.engine
        phase, load = self._phase(), self._load(engine.steps) if engine else None
        return Snapshot(
            instance=settings.name,
            model=settings.model,
            state=now.state.value,
            why=now.why,
            since=time.time() - (time.monotonic() - now.since),
            started=time.time() - (time.monotonic() - self._started),
            uptime_s=round(time.monotonic() - self._started, 3),
            phase=phase.name,
            progress=phase.ratio,
            version=__version__,
            vllm_version=self._vllm_version,
            pid=os.getpid(),
            listen=settings.server.listen,
            source=settings.source,
            epoch=now.epoch,
            rung=now.course.rung,
            steps=tuple(step.reason for step in now.course.steps),
            max_model_len=self._factory.built.max_model_len,
            max_num_seqs=self._factory.built.max_num_seqs,
            asked=dict(now.course.asked.to_json()),
            engine_starts=now.epoch,
            last_failure=str(now.last_failure) if now.last_failure else None,
            failures=self._host.postmortem.last if self._host else (),
            seconds_since_engine_step=self._seconds_since_step(),
            engine_stalled_s=round(self._stalled_s, 3) if engine else 0.0,
            max_queued=settings.server.max_queued,
            requests_held=self.gate.held if self.gate else 0,
            requests_in_flight=self.gate.in_flight if self.gate else 0,
            requests_running=load.running if load else 0,
            requests_waiting=load.waiting if load else 0,
            kv_cache_usage=round(load.kv_cache_usage, 4) if load else None,
            is_drained=now.is_drained,
            too_hot=now.too_hot,
            reload_failed=self.reload_failed,
            engine_network=str(self._factory.network),
            engine_pids=tuple(process.pid for process in engine.processes) if engine else (),
            weight_pids=self._factory.weights.pids,
            memory_bytes=processes.resident_bytes(),
            front_ends=self._front_ends(),
            gpus=self._host.telemetry.readings() if self._host else (),
            engine_arguments=dict(now.course.plan.to_json()),
        )

    def _seconds_since_step(self) -> float | None:
        if (engine := self._room.engine) is None or engine.steps.last_step_at is None:
            return None
        return round(time.monotonic() - engine.steps.last_step_at, 3)

    def _phase(self) -> Phase:
        """How far a start has come; once there was none to wait for, the state itself."""
        if self._situation.state is State.reloading and self._room.engine is not None:
            return _FINISHING
        if self._situation.state in states.HOLDING:
            return self._collector.phase or _WAITING
        return SERVING if self._situation.state is State.serving else Phase(self._situation.state.value, 0.0)

    def request_stop(self) -> None:
        """Ask for the end; a second time, ask for it now. Safe as a signal handler."""
        self._events.put_nowait(events.StopRequested())

    @property
    def instance(self) -> Instance:
        """What is served at present."""
        return self._instance

    @property
    def situation(self) -> machine.Situation:
        """What the machine knows at present."""
        return self._situation

    async def tell(self, event: events.Event) -> machine.Situation:
        """Tell the machine a fact, and return what the situation is after it."""
        self._events.put_nowait(event)
        number = self._heard + self._events.qsize()
        return await self.until(lambda _: self._heard >= number)

    async def until(self, is_so: Callable[[machine.Situation], bool]) -> machine.Situation:
        """Return the situation when it is so, or when it is final."""
        while not is_so(self._situation) and self._situation.state not in states.FINAL:
            await self._turn.wait()
        return self._situation

    async def offer(self, instance: Instance, *, needs_engine: bool) -> machine.Situation:
        """Let what was read of a changed file count from now on, if the machine takes it."""
        assert self._host is not None, "a file is read again only while an engine is up"
        number = max(self._files) + 1
        self._files[number] = instance
        host = self._host.serving(instance)
        course = await asyncio.to_thread(host.memory.recall, instance.plan) if needs_engine else None
        return await self.tell(events.FileChanged(number, _limits(instance.settings), course))

    def _adopt(self, number: int) -> None:
        """This reading of the file counts from now on; the last one may have to come back."""
        self._files = {each: file for each, file in self._files.items() if each in {self._situation.file, number}}
        self._instance = instance = self._files[number]
        self._factory.read_from(Origin(instance.settings.source, instance.text))
        self._host = self._host and self._host.serving(instance)
        self.on_change(instance)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this beside everything else; an error in it ends the instance."""
        self._spawn(work)

    async def run(self, architectures: list[str]) -> int:
        """Serve until told to stop or until nothing helps any more. Returns the exit status."""
        for watch in (self._tell_service_manager(), self._extend_start(), self._watch_engine(), self._log_stats()):
            self._spawn(watch)
        try:
            return await self._run(architectures)
        finally:
            for task in self._tasks:
                task.cancel()
            self._factory.close()
            if self._host is not None:
                self._host.telemetry.close()

    async def _run(self, architectures: list[str]) -> int:
        try:
            boot.check_host(os.environ, self._instance.settings.server.allow_env)
            if not self._instance.asks_driver:
                self._factory.prepare(self._instance.plan, architectures)
        except (ConfigError, HostError) as error:
            return self._end(actions.Exit(error.exit_status, str(error)))
        self._spawn(self._wait_for_host(architectures))
        while True:
            event = await self._events.get()
            before = self._situation
            after, orders = machine.step(before, event, time.monotonic())
            if after.file != before.file:
                self._adopt(after.file)
            self._situation = after
            self._note(before, event)
            for order in orders:
                if isinstance(order, actions.Exit):
                    return self._end(order)
                await self._carry_out(order)

    async def _wait_for_host(self, architectures: list[str]) -> None:
        """GPUs first, then what was learned on them."""
        tell = lambda why: self._events.put_nowait(events.HostWaits(why))  # noqa: E731 - one expression, used once
        try:
            self._host = await ready_host(self._instance, self._factory, self._collector, tell)
            self._factory.prepare(self._instance.plan, architectures)
        except (ConfigError, HostError) as error:
            self._events.put_nowait(events.HostMissing(error.exit_status, str(error)))
        else:
            self._room.postmortem = self._host.postmortem
            course = await asyncio.to_thread(self._host.memory.recall, self._instance.plan)
            self._events.put_nowait(events.HostReady(course))

    def _note(self, before: machine.Situation, event: events.Event) -> None:
        """One journal entry for every change of state, and one for every failure."""
        now = self._situation
        if isinstance(event, events.EngineFailed) and event.epoch == before.epoch:
            self._failed_at = self._failed_at or time.monotonic()
        if now.course != before.course and now.course.steps:
            get_logger().warning("the plan has changed", rung=now.course.rung, reason=now.course.steps[-1].reason)
        if now.trials_failed > before.trials_failed:
            get_logger().warning("the larger plan has failed again", rung=now.course.rung, why=now.why)
        if now.state is not before.state:
            get_logger().info(f"{before.state} -> {now.state}", state=now.state.value, why=now.why, epoch=now.epoch)
        self._say_what_is()
        self._heard += 1
        self._turn.set()
        self._turn = asyncio.Event()

    async def _carry_out(self, order: actions.Action) -> None:
        assert self.gate is not None, "the gate is set before run()"
        match order:
            case actions.StartEngine(epoch, reason, plan):
                metrics.engine_starts.labels(reason).inc()
                self._stalled_s = 0.0
                self._room.build(epoch, plan, self._instance)
            case actions.Remember(course) if self._host is not None:
                await self._host.memory.remember(course)
            case actions.RetireEngine(epoch):
                self._room.retire(epoch)
            case actions.Pause(epoch, seconds):
                self._spawn(self._pause(epoch, seconds))
            case actions.OpenGate():
                self._open_gate(self.gate)
            case actions.Announce():
                self._announce()
            case actions.CloseGate(refuse):
                self._close_gate(self.gate, refuse=refuse)
            case actions.CutRequests():
                self._room.cut_requests(self._situation.why)
            case actions.Drain():
                self._begin_drain(self.gate)
            case actions.StopEngine():
                self._spawn(self._room.stop())

    def _open_gate(self, gate: Entrance) -> None:
        """As wide as the engine's batch; from now on the gate knows of every step."""
        slots, engine = self._factory.built.max_num_seqs, self._room.engine
        if engine is not None:
            engine.steps.tell(gate.note)
            slots = slots and slots * (engine.args.data_parallel_size or 1)
        gate.open(self._room.app, slots)

    def _close_gate(self, gate: Entrance, *, refuse: bool) -> None:
        if not refuse:
            return gate.hold()
        self._notifier.stopping()
        return gate.refuse("this instance is stopping.", 5)

    def _announce(self) -> None:
        if self._failed_at is not None:
            metrics.recovery_seconds.observe(time.monotonic() - self._failed_at)
            self._failed_at = None
        self._notifier.ready()
        self._on_ready()

    async def _pause(self, epoch: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._host is not None and self._host.memory.was_reset():
            get_logger().info("what was learned has been forgotten, as asked")
            self._events.put_nowait(events.Forgotten())
        self._events.put_nowait(events.PauseOver(epoch))

    # Watches.
    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            self._looked_at = time.monotonic()
            self._watch_heat()
            if (engine := self._room.engine) is None or self._situation.state not in states.WATCHED:
                continue
            if engine.is_dead:
                self._room.found_dead(engine.epoch)
                continue
            self._stalled_s = await self._room.stalled_for_s(engine)
            if self._stalled_s > self._instance.settings.recovery.stall_timeout_s:
                self._room.found_stalled(engine.epoch, self._stalled_s)
            elif self._situation.state is State.serving:
                self._look_up()

    def _watch_heat(self) -> None:
        """Pause admission while a GPU is too hot; while none tells its temperature, all stays as it is."""
        gpus, was = self._host.telemetry.readings() if self._host else (), self._situation.too_hot
        why = guard.too_hot(gpus, self._instance.settings.gpu.pause_above_celsius, is_paused=bool(was))
        if why is not None and bool(why) != bool(was):
            self._events.put_nowait(events.Heated(why) if why else events.Cooled())

    def _look_up(self) -> None:
        """Try a larger plan when there has been nothing to do for a while, and it is time."""
        now, wait_s = self._situation, self._instance.settings.recovery.step_up_after_s
        if self.gate is None or self.gate.in_flight or not wait_s or not now.course.rung:
            self._busy_at = time.monotonic()
        elif stall.is_step_up_due(
            on_plan_s=time.monotonic() - now.since,
            idle_s=time.monotonic() - self._busy_at,
            wait_s=wait_s,
            trials_failed=now.trials_failed,
        ):
            self._busy_at = time.monotonic()
            self._events.put_nowait(events.StepUpDue())

    def _begin_drain(self, gate: Entrance) -> None:
        """A stop in the middle of a reload has the whole drain time, whatever of the reload's has passed."""
        if self._draining is not None:
            self._draining.cancel()
        self._draining = self._spawn(self._drain(gate))

    async def _drain(self, gate: Entrance) -> None:
        timeout_s = self._instance.settings.server.drain_timeout_s
        deadline = time.monotonic() + timeout_s
        while gate.in_flight > gate.held and self._room.engine is not None:
            if time.monotonic() > deadline:
                at_work = gate.in_flight - gate.held
                get_logger().warning("drain deadline passed", seconds=timeout_s, in_flight=at_work)
                break
            await asyncio.sleep(0.05)
        self._events.put_nowait(events.Drained())

    async def _tell_service_manager(self) -> None:
        """The watchdog hears from this loop, the one that judges health, and from nobody else."""
        pause_s, last = min(1.0, (self._notifier.watchdog_s or 30.0) / 4), _WAITING
        while True:
            if self._is_in_order():
                self._notifier.alive()
            self._say_what_is()
            if self._situation.state in states.HOLDING and (phase := self._phase()) != last:
                last = phase
                get_logger().info(f"{phase.name}, {phase.ratio:.0%}", state=self._situation.state.value)
            await asyncio.sleep(pause_s)

    def _say_what_is(self) -> None:
        now = self.snapshot()
        self._notifier.status(now.line)
        self._on_news(now)

    def _is_in_order(self) -> bool:
        """False when a rule of this class is broken, so that systemd ends us: the watch sleeps, or a hang goes on."""
        now, recovery = time.monotonic(), self._instance.settings.recovery
        engine_hangs = (
            self._room.engine is not None
            and self._situation.state in states.WATCHED
            and now - self._looked_at > recovery.stall_timeout_s + _GRACE_S
        )
        starts_for_ever = (
            self._situation.state in states.HOLDING
            and self._room.is_building
            and now - (self._situation.starts or (now,))[-1] > recovery.start_timeout_s + _GRACE_S
        )
        return not engine_hangs and not starts_for_ever

    async def _extend_start(self) -> None:
        """Ask for more start time, but only while something is being done."""
        self._notifier.extend_start(_EXTEND_BY_S)
        while True:
            await asyncio.sleep(_EXTEND_EVERY_S)
            is_starting = self._situation.state in states.HOLDING or self._situation.state is State.draining
            # Requests that finish before a reload are work as well, and have a deadline of their own.
            is_busy = self._phase() is _FINISHING or self._factory.idle_s < 2 * _EXTEND_EVERY_S
            if is_starting and is_busy:
                self._notifier.extend_start(_EXTEND_BY_S)

    async def _log_stats(self) -> None:
        while True:
            await asyncio.sleep(_LOG_STATS_EVERY_S)
            if (engine := self._room.engine) is not None and self._situation.state in states.WATCHED:
                with contextlib.suppress(Exception):
                    await engine.llm.do_log_stats()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        """A bug in a task of ours must be heard; left alone it would be a silent hang."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            get_logger().critical("internal error", exc_info=error)
            self._bug = error
            self._events.put_nowait(events.StopRequested())

    def _end(self, order: actions.Exit) -> int:
        log = get_logger()
        if self._bug is not None:
            order = actions.Exit(70, f"stopped after an internal error: {self._bug!r}")
        (log.info if order.status == 0 else log.critical)("exit", status=order.status, why=order.why)
        self._notifier.status(order.why)
        return order.status


def _limits(settings: Settings) -> Limits:
    recovery = settings.recovery
    floors = Floors(recovery.floor_max_model_len, recovery.floor_max_num_seqs)
    backends = AUTO_BACKENDS if recovery.attention_backends == "auto" else recovery.attention_backends
    choices = Choices(floors, backends)
    return Limits(recovery.restart_limit, recovery.restart_window_s, choices, jitter=random.random())  # noqa: S311
