"""Where an engine runs: the GPUs that it sees, by names that cannot shift, and the NUMA nodes that these hang on.

Everything is read from the kernel's files; nothing is bound here (see engine/numa.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_serve.host.nvml import Gpu

NO_NUMACTL = "numactl, by which vLLM tries it, is not installed"
_SYSTEM, _STATUS = Path("/sys"), Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Placement:
    """The GPUs that a file names, in its order. Without any, an engine sees what the driver shows and is not bound."""

    gpus: tuple[Gpu, ...] = ()
    nodes: tuple[int, ...] = ()
    """The NUMA node of each of them; none where nothing is to be bound."""
    why_unbound: str = ""
    """Why not, where this machine has more than one node."""

    @property
    def env(self) -> dict[str, str]:
        """What makes CUDA see these GPUs: a UUID means the same one when another has fallen off the bus."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in self.gpus)} if self.gpus else {}

    def __str__(self) -> str:
        """One line for a log."""
        nodes = [f", NUMA node {node}" for node in self.nodes] or [""] * len(self.gpus)
        each = (
            f"GPU {gpu.index} {gpu.name} ({gpu.uuid} at {gpu.pci_bus_id}{node})"
            for gpu, node in zip(self.gpus, nodes, strict=True)
        )
        return ", ".join(each)


def place(gpus: Sequence[Gpu], *, system: Path = _SYSTEM, status: Path = _STATUS) -> Placement:
    """The placement on these GPUs. Never raises: what the kernel does not tell, or does not allow, is a reason."""
    used = tuple(gpus)
    nodes = system / "devices/system/node"
    if len(numbers(_read(nodes / "has_cpu") or _read(nodes / "online"))) < 2:
        return Placement(used)  # one node: everything is near
    if shutil.which("numactl") is None:
        return Placement(used, why_unbound=NO_NUMACTL)
    found: list[int] = []
    for gpu in used:
        node = _node_of(gpu, system)
        if why := _obstacle(gpu, node, nodes, status):
            return Placement(used, why_unbound=why)
        found.append(node)
    return Placement(used, tuple(found))


def _node_of(gpu: Gpu, system: Path) -> int:
    """The NUMA node of a GPU's slot; -1 where the firmware does not tell."""
    domain, _, rest = gpu.pci_bus_id.partition(":")
    with contextlib.suppress(ValueError):
        address = f"{int(domain, 16):04x}:{rest.lower()}"
        return int(_read(system / f"bus/pci/devices/{address}/numa_node") or "-1")
    return -1


def _obstacle(gpu: Gpu, node: int, nodes: Path, status: Path) -> str:
    """Why a process of ours cannot live on the node of this GPU; empty where it can."""
    if node < 0:
        return f"the kernel does not tell which NUMA node GPU {gpu.index} hangs on"
    here = f"NUMA node {node}, on which GPU {gpu.index} hangs"
    if not (cpus := numbers(_read(nodes / f"node{node}/cpulist"))):
        return f"{here}, has no CPUs"
    if not cpus & os.sched_getaffinity(0):
        return f"{here}, has none of the CPUs that this process may use (CPUAffinity=, AllowedCPUs= or a cpuset)"
    allowed = numbers(_field(status, "Mems_allowed_list:"))
    if allowed and node not in allowed:
        return f"{here}, has no memory that this process may use (AllowedMemoryNodes= or a cpuset)"
    return ""


def _field(status: Path, name: str) -> str:
    lines = (line.partition("\t") for line in _read(status).splitlines())
    return next((value.strip() for key, _, value in lines if key == name), "")


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""


def numbers(text: str) -> frozenset[int]:
    """Numbers that the kernel writes as "0-3,8"."""
    found: set[int] = set()
    with contextlib.suppress(ValueError):
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
