"""Waits for GPUs: for the driver and the devices at boot, and for their memory after an engine.

A call into a driver can take seconds, and one that hangs never returns: each has a thread of its own, so that the
daemon's loop goes on and its end waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from llm_serve.core.devices import Device
from llm_serve.core.errors import HostError
from llm_serve.core.evidence import Holder
from llm_serve.host.nvml import Gpu, Gpus

_LOOK_EVERY_S = 1.0
_SAMPLE_EVERY_S = 0.05
DEVICE_NODES = (Path("/dev/nvidia-uvm"), Path("/dev/nvidiactl"))
_ENDING = ("Z", "X")
_PATIENCE_S = 5.0
"""What a driver needs to wake a GPU."""
_SILENT = "NVIDIA's driver does not answer"
_ADVICE = (
    "Look at nvidia-smi and at the kernel log (journalctl -k -g NVRM). gpu.wait_timeout_s is how long a start waits."
)

Tell = Callable[[str], None]
_Answer = TypeVar("_Answer")


async def wait_for_gpus(  # noqa: PLR0913 - each by its name
    look: Callable[[], Gpus],
    wanted: tuple[Device, ...] | None,
    is_needed: bool,  # noqa: FBT001 - a fact about the build, said by name where it is called
    *,
    timeout_s: float,
    tell: Tell,
    nodes: tuple[Path, ...] = DEVICE_NODES,
) -> tuple[Gpu, ...]:
    """The GPUs that an instance will use: those `wanted`, in that order, or all; none at once where none is needed.

    `look` is called in a thread, never twice at a time. `tell` gets a sentence whenever the reason for waiting
    changes. Raises HostError when they are not there after `timeout_s` seconds, or never will be.
    """
    if not is_needed and wanted is None:
        return ()
    deadline, told = time.monotonic() + timeout_s, ""
    asking: asyncio.Future[_Sight] | None = None
    while True:
        asking = asking or _in_thread(lambda: _see(look(), wanted, nodes))
        # The last look has its time, too: else the reason at the limit would be that nothing was answered at once.
        await asyncio.wait({asking}, timeout=min(_PATIENCE_S, max(_LOOK_EVERY_S, deadline - time.monotonic())))
        sight = asking.result() if asking.done() else _Sight((), _SILENT)
        if not sight.missing:
            return sight.usable
        if sight.is_final:
            raise HostError(f"{sight.missing}. Waiting does not help.")
        if time.monotonic() >= deadline:
            raise HostError(f"{sight.missing}, after {timeout_s:g} s. {_ADVICE}")
        if sight.missing != told:
            told = sight.missing
            tell(f"waiting: {told}")
        if asking.done():
            asking = None
            await asyncio.sleep(_LOOK_EVERY_S)


class _Sight(NamedTuple):
    """One look at the machine."""

    usable: tuple[Gpu, ...]
    missing: str
    """What is not there yet, in words; empty when all is."""
    is_final: bool = False
    """True when it stays so."""


def _see(gpus: Gpus, wanted: tuple[Device, ...] | None, nodes: tuple[Path, ...]) -> _Sight:
    there = gpus.devices()
    known = by_name(there)
    usable = there if wanted is None else tuple(known[name] for name in wanted if name in known)
    return _Sight(usable, _missing(gpus, there, wanted, nodes), gpus.is_permanent)


def by_name(gpus: tuple[Gpu, ...]) -> Mapping[Device, Gpu]:
    """Each GPU by everything that an instance file may call it."""
    return {name: gpu for gpu in gpus for name in (gpu.index, gpu.uuid, gpu.pci_bus_id.upper())}


def _missing(gpus: Gpus, there: tuple[Gpu, ...], wanted: tuple[Device, ...] | None, nodes: tuple[Path, ...]) -> str:
    if gpus.reason:
        return gpus.reason
    known = by_name(there)
    absent = [name for name in wanted or () if name not in known]
    if absent or not there:
        which = f"GPU {', '.join(map(_short, absent))}" if absent else "a GPU"
        # By the names that are asked for: who has written a UUID looks for UUIDs.
        is_by_index = all(isinstance(name, int) for name in absent)
        shown = ", ".join(_described(gpu, is_short=is_by_index) for gpu in there) or "none"
        told = "".join(f"; {problem}" for problem in gpus.problems())
        return f"{which} is not there: the driver shows {len(there)} GPU{'s' * (len(there) != 1)} ({shown}){told}"
    if without := [str(node) for node in nodes if not node.exists()]:
        return f"{', '.join(without)} is not there: the driver's module is not loaded whole (modprobe nvidia-uvm)"
    return ""


def _short(name: Device) -> str:
    return str(name).removeprefix("GPU-")


def _described(gpu: Gpu, *, is_short: bool) -> str:
    short = f"{gpu.index} {gpu.name}"
    return short if is_short else f"{short} {gpu.uuid} at {gpu.pci_bus_id}"


async def wait_for_memory(  # noqa: PLR0913 - each by its name
    gpus: Gpus,
    indices: Collection[int],
    *,
    needed_free_bytes: int | None,
    own_pids: Collection[int],
    timeout_s: float,
    tell: Tell,
) -> tuple[Holder, ...]:
    """Wait until an engine that ended has given its memory back, at most `timeout_s` seconds.

    That is so when no process that has ended holds any, used memory stands still, and `needed_free_bytes` are free on
    each GPU. Returns nobody then, and else who still holds some, `own_pids` left out, and has told so. Never raises.
    """
    if not indices or gpus.reason:
        return ()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_until_back(gpus, indices, needed_free_bytes), timeout_s)
        return ()
    holders: tuple[Holder, ...] = ()
    who = _SILENT
    with contextlib.suppress(TimeoutError):
        ask = _in_thread(lambda: gpus.holders(indices, without=own_pids))
        holders = await asyncio.wait_for(ask, _LOOK_EVERY_S)
        who = "; ".join(map(str, holders)) or "nobody that the driver names holds it"
    tell(f"GPU memory is not back after {timeout_s:g} s: {who}")
    return holders


async def _until_back(gpus: Gpus, indices: Collection[int], needed_free_bytes: int | None) -> None:
    before = None
    while True:
        now, is_ending = await _in_thread(lambda: (_memory(gpus, indices), _is_ending(gpus, indices)))
        is_enough = needed_free_bytes is None or all(free >= needed_free_bytes for _, free in now)
        if now == before and is_enough and not is_ending:
            return
        before = now
        await asyncio.sleep(_SAMPLE_EVERY_S)


def _memory(gpus: Gpus, indices: Collection[int]) -> list[tuple[int, int]]:
    """(used, free) of each GPU that answers."""
    return [(memory.used, memory.free) for index in indices if (memory := gpus.memory(index)) is not None]


def _is_ending(gpus: Gpus, indices: Collection[int]) -> bool:
    """True while the driver still clears up after a process: it counts as ended before its memory is free."""
    return any(_state(holder.pid) in _ENDING for holder in gpus.holders(indices, without=()))


def _state(pid: int) -> str:
    """The letter after the name in /proc/PID/stat; empty where there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1]
    return ""


def _in_thread(question: Callable[[], _Answer]) -> asyncio.Future[_Answer]:
    """The answer of a call that may hang. A pool's thread would be waited for at the daemon's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Answer] = loop.create_future()

    def settle(answer: Callable[[], None]) -> None:
        if not future.done():
            answer()

    def run() -> None:
        try:
            answer = partial(future.set_result, question())
        except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
            answer = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits
            loop.call_soon_threadsafe(settle, answer)

    threading.Thread(target=run, name="gpu-driver", daemon=True).start()
    return future
