"""Finds, measures and ends processes, and removes the shared memory that they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import psutil

MARKER = "LLM_SERVE_RUNTIME"
"""In the environment of every process of an engine: the runtime folder of the instance that started it.

SPT_NOENV has to stand beside it: setproctitle, with which vLLM names its processes, else writes over the environment
that others can read.
"""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the place itself, no temporary file
_NAMES_OF_PYTHON = ("psm_", "sem.mp-")
_SECOND_LOOK_S = 0.05


def descendants(*, without: Iterable[int] = ()) -> list[psutil.Process]:
    """Every living process below this one, except those named and Python's own resource trackers."""
    skipped = set(without)
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.pid not in skipped and not _is_tracker(process)]


def children(process: psutil.Process) -> list[psutil.Process]:
    """Every process below another one; none when that has ended."""
    with contextlib.suppress(psutil.Error, OSError):
        return list(process.children(recursive=True))
    return []


def strays(marker: str, *, without: Iterable[int] = ()) -> list[psutil.Process]:
    """Living processes that an earlier life of an instance has left: they carry its mark and are not below this one.

    Only those of this user count: root could read everybody's environment.
    """
    spared = {os.getpid(), *without, *(process.pid for process in children(psutil.Process()))}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.uids().effective == os.geteuid()
            if is_ours and process.pid not in spared and process.environ().get(MARKER) == marker and is_alive(process):
                found.append(process)
    return found


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in word for word in process.cmdline())
    return True


def shared_memory_of(processes: Iterable[psutil.Process]) -> frozenset[Path]:
    """The /dev/shm files that these processes have mapped.

    Found by inode: the C library makes a semaphore under another name first, which is what a map goes on showing.
    """
    mapped = _mapped(process.pid for process in processes)
    return frozenset(path for path in _SHARED_MEMORY.iterdir() if _inode(path) in mapped) if mapped else frozenset()


def shared_memory_of_python() -> frozenset[Path]:
    """What Python's multiprocessing has put into /dev/shm for this user."""
    found = set()
    for path in _SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):
            if path.name.startswith(_NAMES_OF_PYTHON) and path.stat().st_uid == os.geteuid():
                found.add(path)
    return frozenset(found)


def orphaned_shared_memory(without: Collection[Path]) -> frozenset[Path]:
    """What of it no process maps any more, but for the paths named.

    Its maker maps it right after making it, so a second look, a moment later, decides.
    """
    orphans = _unmapped(shared_memory_of_python().difference(without))
    if orphans:
        time.sleep(_SECOND_LOOK_S)
    return _unmapped(orphans)


def _unmapped(paths: frozenset[Path]) -> frozenset[Path]:
    mapped = _mapped(psutil.pids()) if paths else set()
    return frozenset(path for path in paths if _inode(path) not in mapped)


def _mapped(pids: Iterable[int]) -> set[int]:
    """Inodes of files in /dev/shm that these processes have mapped."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            found |= {int(line.split()[4]) for line in maps.splitlines() if str(_SHARED_MEMORY) in line}
    return found


def _inode(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return None


def is_shared_memory(name: str) -> bool:
    """True for the name of a file directly in /dev/shm."""
    return Path(name).parent == _SHARED_MEMORY


def unlink_all(paths: Iterable[Path]) -> list[Path]:
    """Remove files that may be gone already. Returns those that were still there."""
    removed = []
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path)
    return removed


async def kill_all(processes: Iterable[psutil.Process], *, timeout_s: float) -> list[psutil.Process]:
    """SIGKILL these processes and wait until they are gone. Returns those that were not gone in time."""
    alive = list(processes)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = asyncio.get_running_loop().time() + timeout_s
    while alive := [process for process in alive if is_alive(process)]:
        if asyncio.get_running_loop().time() >= deadline:
            break
        await asyncio.sleep(0.02)
    return alive


def is_alive(process: psutil.Process) -> bool:
    """True while the process runs; a zombie has ended."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def is_there(pid: int) -> bool:
    """True while a process with this pid runs."""
    with contextlib.suppress(psutil.Error):
        return is_alive(psutil.Process(pid))
    return False


def progress_mark(processes: Iterable[psutil.Process]) -> tuple[float, int]:
    """CPU seconds used and bytes read so far: work that is under way changes at least one of them."""
    cpu_s, bytes_read = 0.0, 0
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            bytes_read += process.io_counters().read_bytes
    return cpu_s, bytes_read


def holder_of_port(port: int) -> str | None:
    """Who listens on a TCP port, as "name (pid N)", where that can be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            where: Any = connection.laddr
            if connection.status == psutil.CONN_LISTEN and where.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return None


def resident_bytes(pid: int | None = None) -> int:
    """Memory of a process, without `pid` this one's; 0 when it cannot be read, as for want of a descriptor."""
    with contextlib.suppress(psutil.Error, OSError):
        return int(psutil.Process(pid or os.getpid()).memory_info().rss)
    return 0
