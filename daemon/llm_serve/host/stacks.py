"""Where processes stand, before they are killed for standing still."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

_MOST_THREADS = 16
_CANNOT_RUN = ("T", "t", "Z", "X")
"""Stopped by a signal or by a debugger, or ended."""


async def dump(processes: Iterable[psutil.Process], *, wait_s: float = 1.0) -> tuple[str, ...]:
    """Lines on what the kernel knows of each process: states and function names, nothing of its memory.

    Those that can run write their own Python stacks to stderr, and get `wait_s` seconds for it. Only a process that
    handles SIGUSR1, as faulthandler does, is signalled: any other would die of it.
    """
    alive = [process for process in processes if process.is_running()]
    lines = tuple(line for process in alive for line in _seen(process.pid))
    asked = [_ask(process) for process in alive]
    if any(asked):
        await asyncio.sleep(wait_s)
    return lines


def _ask(process: psutil.Process) -> bool:
    """Let the process write its stacks, if it can. A stopped one would do it when it is continued, which is never."""
    status = _fields(Path(f"/proc/{process.pid}/status"))
    handled = int(status.get("SigCgt", "0"), 16) >> (signal.SIGUSR1 - 1) & 1
    if not handled or status.get("State", "").startswith(_CANNOT_RUN):
        return False
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGUSR1)
        return True
    return False


def where(pid: int) -> str:
    """One line: who it is, its state, and the kernel function in which it waits."""
    folder = Path(f"/proc/{pid}")
    return f"{_name(folder)}: {_fields(folder / 'status').get('State', 'gone')}, waits in {_wait(folder)}"


def _name(folder: Path) -> str:
    return f"{_fields(folder / 'status').get('Name', 'process')} (pid {folder.name})"


def _seen(pid: int) -> Iterator[str]:
    folder = Path(f"/proc/{pid}")
    name = _name(folder)
    yield where(pid)
    if stack := _read(folder / "stack"):
        # "[<0>] futex_wait_queue+0x5e/0x90", innermost first
        yield f"{name}: kernel stack: {' < '.join(line.split()[-1] for line in stack.splitlines() if line.strip())}"
    threads = _threads(folder)
    for own, place in threads[:_MOST_THREADS]:
        yield f"{name}: thread {own.get('Name')} ({own.get('Pid')}): {own.get('State')}, waits in {place}"
    if len(threads) > _MOST_THREADS:
        yield f"{name}: {len(threads) - _MOST_THREADS} more threads"


def _threads(folder: Path) -> list[tuple[dict[str, str], str]]:
    """Status and place of each thread but the main one; those that do not simply sleep come first."""
    tasks: list[Path] = []
    with contextlib.suppress(OSError):
        tasks = sorted((folder / "task").iterdir(), key=lambda task: int(task.name))
    found = [(_fields(task / "status"), _wait(task)) for task in tasks if task.name != folder.name]
    living = [thread for thread in found if thread[0]]
    return sorted(living, key=lambda thread: thread[0].get("State", "").startswith("S"))


def _wait(folder: Path) -> str:
    """The kernel function in which it sleeps."""
    place = _read(folder / "wchan")
    return "nothing" if place in ("", "0") else place


def _fields(status: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in _read(status).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""
