"""Where processes stand, before they are killed for standing still."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

_MOST_THREADS = 16


async def dump(processes: Iterable[psutil.Process], *, wait_s: float = 1.0) -> tuple[str, ...]:
    """Lines on what the kernel knows of each process. Those that can run write their own Python stacks to stderr.

    `wait_s` is what they get for it. Only a process that handles SIGUSR1, as faulthandler does, is signalled: any
    other would die of it.
    """
    alive = [process for process in processes if process.is_running()]
    lines = tuple(line for process in alive for line in _seen(process.pid))
    asked = [_ask(process.pid) for process in alive]
    if any(asked):
        await asyncio.sleep(wait_s)
    return lines


def _ask(pid: int) -> bool:
    """Let the process write its stacks, if it can. A stopped one would do it when it is continued: never."""
    status = _status(pid)
    handled = int(status.get("SigCgt", "0"), 16) >> (signal.SIGUSR1 - 1) & 1
    if not handled or status.get("State", "").startswith("T"):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR1)
        return True
    return False


def _seen(pid: int) -> Iterator[str]:
    status = _status(pid)
    name = f"{status.get('Name', 'process')} (pid {pid})"
    yield f"{name}: {status.get('State', 'gone')}, waits in {_read(f'/proc/{pid}/wchan') or 'nothing'}"
    if stack := _read(f"/proc/{pid}/stack"):
        yield f"{name}: kernel stack: {' < '.join(line.split()[-1] for line in stack.splitlines() if line.split())}"
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir())[:_MOST_THREADS]:
            if task.name != str(pid):
                own = _status(pid, task.name)
                where = _read(f"{task}/wchan") or "nothing"
                yield f"{name}: thread {own.get('Name')}: {own.get('State')}, waits in {where}"


def _status(pid: int, thread: str = "") -> dict[str, str]:
    text = _read(f"/proc/{pid}/task/{thread}/status" if thread else f"/proc/{pid}/status")
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        text = Path(path).read_text(errors="replace").strip()
        return "" if text == "0" else text
    return ""
