"""The machine's GPUs, through NVIDIA's management library. It needs no CUDA context, so nothing is put on a GPU.

No error of NVML leaves this module: what it does not know is absent, and `problems` says why.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_serve.core.evidence import Holder

_EVENT_WAIT_MS = 1000


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    memory_total_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one GPU at one moment."""

    used: int
    free: int
    total: int


class Gpus(Protocol):
    """What the rest of the daemon knows of GPUs."""

    reason: str
    """Why there are none; empty where there are."""
    is_permanent: bool
    """True where waiting for them is no use."""

    def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that answer now."""

    def memory(self, index: int) -> GpuMemory | None:
        """None where it cannot be read."""

    def holders(self, indices: Collection[int], *, without: Collection[int]) -> tuple[Holder, ...]:
        """Processes that hold memory of these GPUs, but for the pids named."""

    def xids(self) -> tuple[int, ...]:
        """NVIDIA's error numbers since `forget_xids`, each once."""

    def forget_xids(self) -> None:
        """What was reported so far is of no interest any more."""

    def problems(self) -> tuple[str, ...]:
        """What could not be asked, in words."""

    def close(self) -> None:
        """Let go of the library."""


class NoGpus:
    """Where there is no GPU, no driver or no library."""

    def __init__(self, reason: str, *, is_permanent: bool = False) -> None:
        self.reason, self.is_permanent = reason, is_permanent

    def devices(self) -> tuple[Gpu, ...]:
        """None."""
        return ()

    def memory(self, index: int) -> GpuMemory | None:  # noqa: ARG002 - the protocol's
        """Not known."""
        return None

    def holders(self, indices: Collection[int], *, without: Collection[int]) -> tuple[Holder, ...]:  # noqa: ARG002
        """Nobody."""
        return ()

    def xids(self) -> tuple[int, ...]:
        """None."""
        return ()

    def forget_xids(self) -> None:
        """Nothing to forget."""

    def problems(self) -> tuple[str, ...]:
        """The reason."""
        return (self.reason,)

    def close(self) -> None:
        """Nothing to let go of."""


def open_gpus() -> Gpus:
    """The GPUs, or why there are none."""
    try:
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return NoGpus("the package nvidia-ml-py is not installed", is_permanent=True)
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return NoGpus(_why(error), is_permanent="version mismatch" in str(error).lower())
    return Nvml(library)


def _why(error: Exception) -> str:
    text = str(error)
    if "Library Not Found" in text or "Shared Library" in text:
        return "NVIDIA's driver is not installed (libnvidia-ml.so.1 is not there)"
    if "Driver Not Loaded" in text:
        return "NVIDIA's driver is not loaded"
    if "version mismatch" in text.lower():
        return "NVIDIA's library was updated under the running driver (driver/library version mismatch): reboot"
    return f"NVML: {text}"


class Nvml:
    """GPUs as NVML shows them. `library` is pynvml, or what behaves like it."""

    reason, is_permanent = "", False

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._problems: dict[str, str] = {}
        self._xids: set[int] = set()
        self._is_closed = threading.Event()
        threading.Thread(target=self._listen, name="gpu-events", daemon=True).start()

    def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that answer now; one that has fallen off the bus is missing."""
        count = self._ask("the number of GPUs", lambda: int(self._nvml.nvmlDeviceGetCount())) or 0
        found = (self._ask(f"GPU {index}", lambda index=index: self._gpu(index)) for index in range(count))
        return tuple(gpu for gpu in found if gpu is not None)

    def _gpu(self, index: int) -> Gpu:
        nvml, handle = self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            pci_bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
            memory_total_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        )

    def memory(self, index: int) -> GpuMemory | None:
        """What is used and free now."""

        def ask() -> GpuMemory:
            found = self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByIndex(index))
            return GpuMemory(int(found.used), int(found.free), int(found.total))

        memory: GpuMemory | None = self._ask(f"the memory of GPU {index}", ask)
        return memory

    def holders(self, indices: Collection[int], *, without: Collection[int]) -> tuple[Holder, ...]:
        """Compute and graphics processes, the largest first. Memory that the driver does not tell counts as 0."""
        found = {(index, pid): used for index in indices for pid, used in self._processes(index) if pid not in without}
        holders = (Holder(index, pid, _process_name(pid), used) for (index, pid), used in found.items())
        return tuple(sorted(holders, key=lambda holder: -holder.used_bytes))

    def _processes(self, index: int) -> Iterator[tuple[int, int]]:
        nvml = self._nvml
        for list_them in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            ask = lambda list_them=list_them: list_them(nvml.nvmlDeviceGetHandleByIndex(index))  # noqa: E731
            for process in self._ask(f"the processes of GPU {index}", ask) or ():
                yield int(process.pid), int(process.usedGpuMemory or 0)

    def xids(self) -> tuple[int, ...]:
        """As the driver reported them; devices that report none have none here."""
        return tuple(sorted(self._xids))

    def forget_xids(self) -> None:
        """Begin anew."""
        self._xids = set()

    def problems(self) -> tuple[str, ...]:
        """The last error of each question that has one."""
        return tuple(f"{what}: {error}" for what, error in self._problems.items())

    def _ask(self, what: str, question: Any) -> Any:
        try:
            answer = question()
        except self._nvml.NVMLError as error:
            self._problems[what] = str(error)
            return None
        self._problems.pop(what, None)
        return answer

    def _listen(self) -> None:
        """Collect Xids for as long as the library is open. Runs in a thread: waiting for events blocks."""
        nvml = self._nvml
        events = self._ask("the event set", nvml.nvmlEventSetCreate)
        if events is None:
            return
        registered = 0
        for gpu in self.devices():
            register = lambda gpu=gpu: nvml.nvmlDeviceRegisterEvents(  # noqa: E731
                nvml.nvmlDeviceGetHandleByIndex(gpu.index), nvml.nvmlEventTypeXidCriticalError, events
            )
            self._ask(f"the events of GPU {gpu.index}", register)
            registered += f"the events of GPU {gpu.index}" not in self._problems
        while registered and not self._is_closed.is_set():
            try:
                event = nvml.nvmlEventSetWait(events, _EVENT_WAIT_MS)
            except nvml.NVMLError as error:
                if "timeout" not in str(error).lower():
                    time.sleep(1)  # a lost GPU answers at once, for ever
                continue
            self._xids.add(int(event.eventData))

    def close(self) -> None:
        """Let go of the library."""
        self._is_closed.set()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _process_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        return Path(words[0]).name or Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process of another user or container"
