"""The machine's GPUs, through NVIDIA's management library. It needs no CUDA context, so nothing is put on a GPU.

No error of NVML leaves this module: what it does not know is absent, and `problems` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llm_serve.core.evidence import Holder
from llm_serve.core.telemetry import Reading, reasons

_EVENT_WAIT_MS = 1000
_LONGEST_NAME = 64
_P2P_READ, _P2P_WRITE = 0, 1  # nvml.h; the Python package has a tuple for the first
_NO_P2P = {
    1: "the chipset does not support it",
    2: "the GPUs do not support it",
    3: "they hang on different I/O hubs",
    4: "it is switched off in the driver's registry",
    5: "not supported",
}
"""NVML's nvmlGpuP2PStatus_t; 0 is fine, and 6 is not known."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    memory_total_bytes: int
    capability: tuple[int, int] | None = None
    """Of CUDA; None where the driver does not say."""


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

    def without_p2p(self, indices: Collection[int]) -> tuple[str, ...]:
        """Pairs of these GPUs that cannot reach each other's memory, in words; not those of which nothing is known."""

    def read(self, gpu: Gpu) -> Reading:
        """What its sensors say now."""

    def slowdown_celsius(self, gpu: Gpu) -> float | None:
        """Where its hardware begins to slow itself down; None where it does not tell."""

    def xids(self, indices: Collection[int] | None = None) -> tuple[int, ...]:
        """NVIDIA's error numbers since `forget_xids`, each once; of these GPUs, or of all."""

    def forget_xids(self) -> None:
        """Begin to listen, or begin anew: what was reported so far is of no interest any more."""

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

    def without_p2p(self, indices: Collection[int]) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """No pair is known."""
        return ()

    def read(self, gpu: Gpu) -> Reading:
        """Nothing but its name."""
        return Reading(gpu.index, gpu.uuid, gpu.name)

    def slowdown_celsius(self, gpu: Gpu) -> float | None:  # noqa: ARG002 - the protocol's
        """Not known."""
        return None

    def xids(self, indices: Collection[int] | None = None) -> tuple[int, ...]:  # noqa: ARG002 - the protocol's
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
    """The GPUs, or why there are none. The driver sees a GPU that came later only when it is opened anew."""
    try:
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return NoGpus("the package nvidia-ml-py is not installed", is_permanent=True)
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        is_mismatch = getattr(error, "value", None) == library.NVML_ERROR_LIB_RM_VERSION_MISMATCH
        return NoGpus(_why(library, error), is_permanent=is_mismatch)
    gpus = Nvml(library)
    if not gpus.devices() and not gpus.problems():
        gpus.close()
        return NoGpus("NVIDIA's driver shows no GPU")
    return gpus


def _why(library: Any, error: Exception) -> str:
    """In words, by NVML's numbers: their texts are the Python package's and vary."""
    match getattr(error, "value", None):
        case library.NVML_ERROR_LIBRARY_NOT_FOUND:
            return "NVIDIA's driver is not installed (libnvidia-ml.so.1 is not there)"
        case library.NVML_ERROR_DRIVER_NOT_LOADED:
            return "NVIDIA's driver is not loaded"
        case library.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return "NVIDIA's library was updated under the running driver (driver/library version mismatch): reboot"
    return f"NVIDIA's driver does not answer ({error})"


class Nvml:
    """GPUs as NVML shows them. `library` is pynvml, or what behaves like it, and is open."""

    reason, is_permanent = "", False

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._problems: dict[str, str] = {}
        self._xids: set[tuple[int | None, int]] = set()
        self._all_xids: Counter[tuple[int | None, int]] = Counter()
        self._listener: threading.Thread | None = None
        self._is_closed = threading.Event()

    def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that answer now; one that has fallen off the bus is missing."""
        count = self._ask("the number of GPUs", lambda: int(self._nvml.nvmlDeviceGetCount())) or 0
        found = (self._ask(f"GPU {index}", partial(self._gpu, index)) for index in range(count))
        return tuple(gpu for gpu in found if gpu is not None)

    def _gpu(self, index: int) -> Gpu:
        nvml, handle = self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            pci_bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
            memory_total_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            capability=self._capability(handle),
        )

    def _capability(self, handle: Any) -> tuple[int, int] | None:
        with contextlib.suppress(self._nvml.NVMLError):
            major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(handle)
            return int(major), int(minor)
        return None

    def memory(self, index: int) -> GpuMemory | None:
        """What is used and free now."""

        def ask() -> GpuMemory:
            found = self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByIndex(index))
            return GpuMemory(int(found.used), int(found.free), int(found.total))

        return self._ask(f"the memory of GPU {index}", ask)

    def holders(self, indices: Collection[int], *, without: Collection[int]) -> tuple[Holder, ...]:
        """Compute and graphics processes, the largest first. Memory that the driver does not tell counts as 0."""
        found = (
            Holder(index, pid, _process_name(pid), used)
            for index in indices
            for pid, used in self._used_by(index).items()
            if pid not in without
        )
        return tuple(sorted(found, key=lambda holder: -holder.used_bytes))

    def _used_by(self, index: int) -> Mapping[int, int]:
        """Bytes by pid. A process is in one list once for each MIG instance, and may be in both lists."""
        nvml = self._nvml
        used: dict[int, int] = {}
        for list_them in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            ask = lambda list_them=list_them: list_them(nvml.nvmlDeviceGetHandleByIndex(index))  # noqa: E731
            listed: Counter[int] = Counter()
            for process in self._ask(f"the processes of GPU {index}", ask) or ():
                listed[int(process.pid)] += process.usedGpuMemory if isinstance(process.usedGpuMemory, int) else 0
            used |= {pid: max(amount, used.get(pid, 0)) for pid, amount in listed.items()}
        return used

    def without_p2p(self, indices: Collection[int]) -> tuple[str, ...]:
        """Pairs by the driver's word. It does not know of an IOMMU, or of ACS, that drops what is written."""
        nvml = self._nvml

        def ask(first: int, second: int) -> int:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in (first, second)]
            return max(int(nvml.nvmlDeviceGetP2PStatus(*handles, way)) for way in (_P2P_READ, _P2P_WRITE))

        pairs = [(one, two, self._ask(f"P2P of GPU {one} and {two}", partial(ask, one, two)))
                 for one, two in combinations(indices, 2)]  # fmt: skip
        return tuple(f"GPU {one} and {two} ({_NO_P2P[status]})" for one, two, status in pairs if status in _NO_P2P)

    def read(self, gpu: Gpu) -> Reading:
        """Sensor by sensor: one that this GPU does not have, or that does not answer, leaves the others alone."""
        nvml, memory = self._nvml, self.memory(gpu.index)
        milliwatts = self._sensor(gpu, "power", nvml.nvmlDeviceGetPowerUsage)
        limit = self._sensor(gpu, "power limit", nvml.nvmlDeviceGetEnforcedPowerLimit)
        busy = self._sensor(gpu, "utilization", nvml.nvmlDeviceGetUtilizationRates)
        bits = self._sensor(gpu, "clocks", nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return Reading(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            temperature_celsius=self._sensor(
                gpu,
                "temperature",
                lambda handle: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            power_limit_watts=None if limit is None else limit / 1000,
            memory_used_bytes=memory.used if memory else None,
            memory_total_bytes=memory.total if memory else None,
            utilization_ratio=None if busy is None else busy.gpu / 100,
            throttle_reasons=None if bits is None else reasons(bits),
            ecc_errors=self._ecc_errors(gpu),
            xids={
                str(xid): count for (index, xid), count in self._all_xids.copy().items() if index in {gpu.index, None}
            },
            processes=self.holders([gpu.index], without=()),
        )

    def slowdown_celsius(self, gpu: Gpu) -> float | None:
        """As the device tells it; newer ones tell only how far away from it they are now."""
        nvml, kind = self._nvml, self._nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        told = self._sensor(
            gpu, "slow-down threshold", lambda handle: nvml.nvmlDeviceGetTemperatureThreshold(handle, kind)
        )
        if told:
            return float(told)
        now = self._sensor(
            gpu, "temperature", lambda handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        )
        margin = self._sensor(gpu, "thermal margin", nvml.nvmlDeviceGetMarginTemperature)
        return None if now is None or margin is None else float(now + margin)

    def _ecc_errors(self, gpu: Gpu) -> Mapping[str, int]:
        nvml = self._nvml
        kinds = {
            "corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        counts = {
            kind: self._sensor(gpu, f"{kind} ECC errors", partial(_total_ecc_errors, nvml, number))
            for kind, number in kinds.items()
        }
        return {kind: count for kind, count in counts.items() if count is not None}

    def _sensor(self, gpu: Gpu, name: str, question: Callable[[Any], _Answer]) -> _Answer | None:
        """None also where the device has none: that is no problem."""
        nvml = self._nvml

        def ask() -> _Answer | None:
            try:
                return question(nvml.nvmlDeviceGetHandleByIndex(gpu.index))
            except nvml.NVMLError as error:
                if getattr(error, "value", None) in {nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
                    return None
                raise

        return self._ask(f"the {name} of GPU {gpu.index}", ask)

    def xids(self, indices: Collection[int] | None = None) -> tuple[int, ...]:
        """As the driver reported them; GPUs that report none have none here."""
        # A GPU that cannot be told counts as one of ours: better one cause too many than none.
        found = {xid for index, xid in self._xids.copy() if indices is None or index is None or index in indices}
        return tuple(sorted(found))

    def forget_xids(self) -> None:
        """Begin to listen, or begin anew."""
        self._xids = set()
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, name="gpu-events", daemon=True)
            self._listener.start()

    def problems(self) -> tuple[str, ...]:
        """The last error of each question that has one."""
        return tuple(f"{what}: {error}" for what, error in self._problems.copy().items())

    def _ask(self, what: str, question: Callable[[], _Answer]) -> _Answer | None:
        try:
            answer = question()
        except self._nvml.NVMLError as error:
            self._problems[what] = str(error)
            return None
        self._problems.pop(what, None)
        return answer

    def _listen(self) -> None:
        """Collect Xids until `close`. Runs in a thread, because waiting for events blocks.

        It opens the library for itself (NVML counts): one that is shut down under a waiting thread ends the process.
        """
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            try:
                events = self._ask("the events", nvml.nvmlEventSetCreate)
                if events is not None:
                    self._collect(events)
                    nvml.nvmlEventSetFree(events)
            finally:
                nvml.nvmlShutdown()

    def _collect(self, events: Any) -> None:
        indices = self._register(events)
        while indices and not self._is_closed.is_set():
            try:
                event = self._nvml.nvmlEventSetWait(events, _EVENT_WAIT_MS)
            except self._nvml.NVMLError as error:
                if getattr(error, "value", None) != self._nvml.NVML_ERROR_TIMEOUT:
                    self._is_closed.wait(_EVENT_WAIT_MS / 1000)  # a lost GPU answers at once, for ever
                continue
            seen = (indices.get(_address(event.device)), int(event.eventData))
            self._xids.add(seen)
            self._all_xids[seen] += 1

    def _register(self, events: Any) -> Mapping[int, int]:
        """The GPUs that will report: index by the address of the handle, since a lost GPU does not tell its index."""
        nvml = self._nvml

        def register(index: int) -> int:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            return _address(handle)

        answers = (
            (gpu.index, self._ask(f"the events of GPU {gpu.index}", partial(register, gpu.index)))
            for gpu in self.devices()
        )
        return {address: index for index, address in answers if address is not None}

    def close(self) -> None:
        """Let go of the library; the listener follows within a second."""
        self._is_closed.set()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _total_ecc_errors(library: Any, kind: int, handle: Any) -> int:
    """Over the life of the GPU, so that the driver's restart takes nothing away."""
    return int(library.nvmlDeviceGetTotalEccErrors(handle, kind, library.NVML_AGGREGATE_ECC))


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _process_name(pid: int) -> str:
    """The program without its folder and arguments, or the title that it gave itself."""
    with contextlib.suppress(OSError):
        word = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[0]
        name = Path(word).name if word.startswith("/") else word
        return name[:_LONGEST_NAME] or Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "a process of another user or container"
