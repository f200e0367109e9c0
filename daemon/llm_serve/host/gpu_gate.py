"""Waits for GPUs: for the driver and the devices at boot, and for their memory after an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path

from llm_serve.core.errors import HostError
from llm_serve.core.evidence import Holder
from llm_serve.host.nvml import Gpu, Gpus

_LOOK_EVERY_S = 1.0
_SAMPLE_EVERY_S = 0.25
_DEVICE_NODES = (Path("/dev/nvidia-uvm"), Path("/dev/nvidiactl"))

Tell = Callable[[str], None]


async def wait_for_gpus(  # noqa: PLR0913 - each by its name
    look: Callable[[], Gpus],
    wanted: tuple[int, ...] | None,
    is_needed: bool,  # noqa: FBT001 - a fact about the build, said by name where it is called
    *,
    timeout_s: float,
    tell: Tell,
    nodes: tuple[Path, ...] = _DEVICE_NODES,
) -> tuple[Gpu, ...]:
    """The GPUs that an instance will use: those `wanted`, or all there are; none at once where none is needed.

    `tell` gets a sentence whenever the reason for waiting changes. Raises HostError when they are not there after
    `timeout_s`, or never will be.
    """
    if not is_needed and wanted is None:
        return ()
    deadline, told = time.monotonic() + timeout_s, ""
    while True:
        gpus = look()
        found = gpus.devices()
        missing = _missing(gpus, found, wanted, nodes)
        if not missing:
            return tuple(gpu for gpu in found if wanted is None or gpu.index in wanted)
        if gpus.is_permanent:
            raise HostError(f"{missing}. Waiting does not help.")
        if time.monotonic() >= deadline:
            raise HostError(
                f"{missing}, after {timeout_s:g} s. Look at `nvidia-smi` and at the kernel log for NVRM; "
                f"gpu.wait_timeout_s is how long a start waits."
            )
        if missing != told:
            told = missing
            tell(f"waiting: {missing}")
        await asyncio.sleep(_LOOK_EVERY_S)


def _missing(gpus: Gpus, found: tuple[Gpu, ...], wanted: tuple[int, ...] | None, nodes: tuple[Path, ...]) -> str:
    """What is not there yet, in words; empty when all is."""
    if gpus.reason:
        return gpus.reason
    shown = ", ".join(f"{gpu.index} {gpu.name}" for gpu in found) or "no GPU"
    absent = [index for index in wanted or () if index not in {gpu.index for gpu in found}]
    if absent or not found:
        which = f"GPU {', '.join(map(str, absent))}" if absent else "a GPU"
        return f"{which} is not there: the driver shows {shown}"
    if without := [str(node) for node in nodes if not node.exists()]:
        return f"{', '.join(without)} is not there: the driver's module is not loaded whole (modprobe nvidia-uvm)"
    return ""


async def wait_for_memory(  # noqa: PLR0913 - each by its name
    gpus: Gpus,
    indices: Collection[int],
    *,
    needed_free_bytes: int | None,
    own_pids: Collection[int],
    timeout_s: float,
    tell: Tell,
) -> tuple[Holder, ...]:
    """Wait until an engine that ended has given its memory back: used memory stands still, and enough is free.

    Returns who still holds some at the time limit, and has told so; nobody where all is well.
    """
    if not indices:
        return ()
    deadline = time.monotonic() + timeout_s
    before = _memory(gpus, indices)
    while time.monotonic() < deadline:
        await asyncio.sleep(_SAMPLE_EVERY_S)
        now = _memory(gpus, indices)
        is_enough = needed_free_bytes is None or all(free >= needed_free_bytes for _, free in now)
        if now == before and is_enough:
            return ()
        before = now
    holders = gpus.holders(indices, without=own_pids)
    who = "; ".join(map(str, holders)) or "nobody that the driver names holds it"
    tell(f"GPU memory is not back after {timeout_s:g} s: {who}")
    return holders


def _memory(gpus: Gpus, indices: Collection[int]) -> list[tuple[int, int]]:
    """(used, free) of each GPU that answers."""
    return [(memory.used, memory.free) for index in indices if (memory := gpus.memory(index)) is not None]
