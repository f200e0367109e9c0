"""A running engine, or a start of one -> nothing.

An engine leaves sockets, temporary files, shared memory and, when it was hurt, processes behind; all of them are ended
or removed here, after a failure as after a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from llm_serve.engine import attach, forkserver
from llm_serve.engine.running import Engine
from llm_serve.host import interpreter, processes, stacks
from llm_serve.host.logs import get_logger

_KILL_TIMEOUT_S = 10.0
_UNKILLABLE_S = 20.0
"""Beyond that: a process that has GBs to give back takes seconds, one that is stuck in a driver for ever."""
_ASK_TIMEOUT_S = 5.0
_TEMPORARY_PREFIX = "llm-serve-"
_LEFTOVERS = "shared-memory.txt"


@dataclass(frozen=True, slots=True)
class Places:
    """Where an instance keeps its sockets (gone after a stop) and its memory of things (kept)."""

    runtime: Path
    state: Path


class Ending:
    """Ends the engines of one instance, and knows where they may have left something."""

    def __init__(self, places: Places) -> None:
        self._runtime, self._leftovers = places.runtime, places.state / _LEFTOVERS
        self._there_before = processes.shared_memory_of_python()
        self._noted: frozenset[Path] = frozenset()
        self.spared: set[int] = set()
        """The pids of processes below this one that outlive engines: front ends, and what holds weights."""

    def begin(self) -> None:
        """An engine is about to be started: what comes into /dev/shm from now on may be its."""
        self._there_before = processes.shared_memory_of_python()

    def make_folders(self, epoch: int) -> tuple[Path, Path]:
        """A private place for sockets (short path: 107 characters is the limit) and one for temporary files."""
        sockets = self._runtime / f"e{epoch}"
        _remove((sockets,))
        sockets.mkdir(mode=0o700)
        return sockets, Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{self._runtime.name}-e{epoch}-"))

    def note_leftovers(self) -> None:
        """Write down what is in /dev/shm now, for the next life, should this one end without a word."""
        mapped = processes.shared_memory_of([*self.engine_processes(), *self._own_processes()])
        if mapped != self._noted:
            with contextlib.suppress(OSError):
                self._leftovers.write_text("\n".join(map(str, mapped)))
                self._noted = mapped

    async def kill(self, engine: Engine) -> None:
        """End an engine that is dead or stands still: nothing is asked, all requests hear of it, nothing is left."""
        await processes.kill_all([*self.engine_processes(), *engine.processes], timeout_s=_KILL_TIMEOUT_S)
        attach.tell_requests(engine.llm)
        await self.stop(engine)

    async def remains(self, engine: Engine | None = None) -> tuple[str, ...]:
        """What outlives its kill for longer than `_UNKILLABLE_S`, in words: it is stuck in the kernel."""
        killed = [*self.engine_processes(), *(engine.processes if engine else ())]
        left = {process.pid for process in await processes.kill_all(killed, timeout_s=_UNKILLABLE_S)}
        return tuple(stacks.where(pid) for pid in sorted(left))

    async def kill_rest(self) -> None:
        """End whatever runs below the daemon, but for the fork server, and remove what it had in memory."""
        await self.clear(())

    def engine_processes(self) -> list[psutil.Process]:
        """Every process below the daemon that is an engine's."""
        server = forkserver.running_pid()
        return processes.descendants(without=self.spared | ({server} if server else set()))

    def pids(self) -> set[int]:
        """The daemon and every process below it."""
        return {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}

    async def stop(self, engine: Engine) -> None:
        """End an engine, asked first, then killed; on return nothing of it is left."""
        living = self.engine_processes()
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

    async def abandon(self, building: asyncio.Task[Engine], folders: tuple[Path, ...]) -> None:
        """Kill a start. Its thread ends by itself when its processes are gone."""
        for _ in range(20):
            is_stuck = bool(await self.clear(folders))
            done, _ = await asyncio.wait({building}, timeout=0.5)
            if done or is_stuck:
                break
        if building.done() and not building.cancelled() and building.exception() is None:
            await self.stop(building.result())
        await self.clear(folders)

    async def clear(self, folders: tuple[Path, ...]) -> list[psutil.Process]:
        """End every process of an engine and remove what it had. Returns the processes that cannot be ended."""
        left = await processes.kill_all(self.engine_processes(), timeout_s=_KILL_TIMEOUT_S)
        await self._sweep(folders)
        return left

    def close(self) -> None:
        """End the fork server and let go of what this process itself has in /dev/shm. For the end of the daemon."""
        forkserver.forget(processes.unlink_all(processes.shared_memory_of(self._own_processes())))
        forkserver.stop()
        _remove((self._runtime / "mp",))
        with contextlib.suppress(OSError):  # the state folder may have become read-only
            self._leftovers.unlink(missing_ok=True)

    async def _sweep(self, folders: tuple[Path, ...]) -> None:
        """Remove what the processes of an engine, which are gone, have left.

        Of /dev/shm that is what has come since its start and nobody maps any more. To ask its processes what they have
        mapped is not enough: one that ends by itself is gone before it can be asked.
        """
        orphans = await asyncio.to_thread(processes.orphaned_shared_memory, self._there_before)
        forkserver.forget(processes.unlink_all(orphans))
        _remove(folders)

    def _own_processes(self) -> list[psutil.Process]:
        """The daemon, the fork server and whatever else outlives engines."""
        pids = (os.getpid(), forkserver.running_pid(), *self.spared)
        return [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]


def free_dead_engines() -> None:
    """Free what engines that are gone still hold in this process, their tokenizers for the most part: 40 MB each.

    vLLM 0.32 remembers by the method which arguments a tokenizer's chat template takes, and so keeps every tokenizer.
    In a fork of the fork server, which has seen to that, what the server has loaded is not looked at.
    """
    functions = sys.modules.get("vllm.utils.func_utils")
    with contextlib.suppress(AttributeError):
        functions._supports_kw.cache_clear()  # type: ignore[union-attr]  # noqa: SLF001 - it has no other name
    interpreter.collect_frozen()


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
