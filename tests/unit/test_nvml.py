"""NVML's answers as the daemon sees them.

There is no GPU where these tests run: the functions are hand-made, with the errors and numbers of the real package, and
a test compares their names with it. The same code was seen with one real GPU.
"""

# ruff: noqa: N802, N803, N815 - the names are NVIDIA's

from __future__ import annotations

import ctypes
import inspect
import itertools
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.evidence import Holder
from llm_serve.core.telemetry import THROTTLE_REASONS, Reading, reasons
from llm_serve.host import nvml
from llm_serve.host.nvml import Gpu, GpuMemory, NoGpus, Nvml, open_gpus

GIB = 1 << 30
NOBODY = 1 << 30
WAIT_S = 10.0


def failing(value: int) -> Callable[..., Any]:
    """A function of NVML that fails."""

    def fail(*_: object) -> None:
        raise pynvml.NVMLError(value)

    return fail


@dataclass
class Device:
    """One physical GPU."""

    name: Any = "NVIDIA H200"
    used: int = 0
    is_lost: bool = False
    compute: list[tuple[int, Any]] = field(default_factory=list)
    graphics: list[tuple[int, Any]] = field(default_factory=list)
    has_sensors: bool = True


class Library:
    """What the daemon uses of pynvml, with as many GPUs as it is given."""

    NVMLError = pynvml.NVMLError
    NVML_ERROR_DRIVER_NOT_LOADED = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    NVML_ERROR_TIMEOUT = pynvml.NVML_ERROR_TIMEOUT
    NVML_ERROR_NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
    NVML_ERROR_FUNCTION_NOT_FOUND = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    NVML_MEMORY_ERROR_TYPE_CORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_AGGREGATE_ECC = pynvml.NVML_AGGREGATE_ECC
    nvmlEventTypeXidCriticalError = pynvml.nvmlEventTypeXidCriticalError

    def __init__(self, *devices: Device) -> None:
        self.given = devices
        self.p2p: dict[tuple[int, int, int], int] = {}
        self.opened = 0
        self.waits = 0
        self.freed = 0
        self.opened_while_waiting: list[int] = []
        self.registered: list[int] = []
        self.events: queue.Queue[Any] = queue.Queue()

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.given)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:
        if index >= len(self.given):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if self.given[index].is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle(index)

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p) -> str:
        return f"GPU-{index_of(handle)}"

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p) -> Any:
        return self.given[index_of(handle)].name

    def nvmlDeviceGetCudaComputeCapability(self, handle: ctypes.c_void_p) -> tuple[int, int]:
        if not self.given[index_of(handle)].has_sensors:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 9, 0

    def nvmlDeviceGetPciInfo(self, handle: ctypes.c_void_p) -> Any:
        return SimpleNamespace(busId=f"00000000:{index_of(handle):02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, version: int | None = None) -> Any:
        used = self.given[index_of(handle)].used
        return SimpleNamespace(used=used, free=141 * GIB - used, total=141 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: ctypes.c_void_p) -> list[Any]:
        return listed(self.given[index_of(handle)].compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: ctypes.c_void_p) -> list[Any]:
        return listed(self.given[index_of(handle)].graphics)

    def _sensor(self, handle: ctypes.c_void_p, value: Any) -> Any:
        if not self.given[index_of(handle)].has_sensors:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlDeviceGetTemperature(self, handle: ctypes.c_void_p, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return int(self._sensor(handle, 61))

    def nvmlDeviceGetTemperatureThreshold(self, handle: ctypes.c_void_p, threshold: int) -> int:
        assert threshold == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return int(self._sensor(handle, 92))

    def nvmlDeviceGetMarginTemperature(self, handle: ctypes.c_void_p) -> int:
        return int(self._sensor(handle, 27))

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p) -> int:
        return int(self._sensor(handle, 699_500))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p) -> int:
        return int(self._sensor(handle, 700_000))

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p) -> Any:
        return self._sensor(handle, SimpleNamespace(gpu=97, memory=40))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: ctypes.c_void_p) -> int:
        return int(
            self._sensor(handle, pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown)
        )

    def nvmlDeviceGetTotalEccErrors(self, handle: ctypes.c_void_p, errorType: int, counterType: int) -> int:
        assert counterType == pynvml.NVML_AGGREGATE_ECC
        return int(self._sensor(handle, {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 12}.get(errorType, 1)))

    def nvmlDeviceGetP2PStatus(self, device1: ctypes.c_void_p, device2: ctypes.c_void_p, p2pIndex: int) -> int:
        assert type(p2pIndex) is int, "the package has a tuple for NVML_P2P_CAPS_INDEX_READ"
        pair = (index_of(device1), index_of(device2))
        return int(self.p2p.get((*pair, p2pIndex), pynvml.NVML_P2P_STATUS_OK))

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlEventSetFree(self, eventSet: str) -> None:
        self.freed += 1

    def nvmlDeviceRegisterEvents(self, handle: ctypes.c_void_p, eventTypes: int, eventSet: str) -> None:
        assert eventTypes == self.nvmlEventTypeXidCriticalError
        self.registered.append(index_of(handle))

    def nvmlEventSetWait(self, eventSet: str, timeoutms: int) -> Any:
        self.waits += 1
        try:
            event = self.events.get(timeout=timeoutms / 1000)
        except queue.Empty:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT) from None
        finally:
            self.opened_while_waiting.append(self.opened)
        if isinstance(event, int):
            raise pynvml.NVMLError(event)
        return SimpleNamespace(device=handle(event[0]), eventData=event[1])


FUNCTIONS = [name for name, member in vars(Library).items() if name.startswith("nvml") and callable(member)]


def handle(index: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(0x1000 * (index + 1))


def index_of(handle: ctypes.c_void_p) -> int:
    return (handle.value or 0) // 0x1000 - 1


def listed(processes: list[tuple[int, Any]]) -> list[Any]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


Open = Callable[..., tuple[Nvml, Library]]


@pytest.fixture
def open_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Open GPUs whose library is a fake with these devices; all are closed after the test."""
    monkeypatch.setattr(nvml, "_EVENT_WAIT_MS", 20)
    opened: list[Nvml] = []

    def open_one(*devices: Device, **functions: Any) -> tuple[Nvml, Library]:
        library = Library(*devices)
        for name, function in functions.items():
            setattr(library, name, function)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        gpus = open_gpus()
        assert isinstance(gpus, Nvml), gpus.reason
        opened.append(gpus)
        return gpus, library

    yield open_one
    for gpus in opened:
        gpus.close()
        if gpus._listener:
            gpus._listener.join(WAIT_S)


def eventually(look: Callable[[], object], expected: object) -> None:
    """Assert that something becomes what is expected."""
    deadline = time.monotonic() + WAIT_S
    while (seen := look()) != expected:
        assert time.monotonic() < deadline, f"{seen!r}, not {expected!r}, after {WAIT_S} s"
        time.sleep(0.005)


def test_the_fake_is_like_the_real_package() -> None:
    """Every name of it is there in the installed nvidia-ml-py, and takes as many arguments."""
    counts = {name: len(inspect.signature(getattr(Library, name)).parameters) - 1 for name in FUNCTIONS}

    assert {name: len(inspect.signature(getattr(pynvml, name)).parameters) for name in FUNCTIONS} == counts
    assert 24 == len(FUNCTIONS)


# What there is.
def test_gpus_are_described(open_with: Open) -> None:
    """Index, uuid, name, PCI address and memory, whether the package answers in text or in bytes."""
    gpus, _ = open_with(Device(), Device(name=b"NVIDIA L4", used=3 * GIB))

    assert (
        Gpu(0, "GPU-0", "NVIDIA H200", "00000000:00:00.0", 141 * GIB, (9, 0)),
        Gpu(1, "GPU-1", "NVIDIA L4", "00000000:01:00.0", 141 * GIB, (9, 0)),
    ) == gpus.devices()
    assert GpuMemory(used=3 * GIB, free=138 * GIB, total=141 * GIB) == gpus.memory(1)
    assert ("", False, ()) == (gpus.reason, gpus.is_permanent, gpus.problems())


READ, WRITE = 0, 1


def test_pairs_without_p2p_are_named(open_with: Open) -> None:
    """Of the GPUs asked for, in either direction, with the driver's reason; what it does not know is no pair."""
    gpus, library = open_with(Device(), Device(), Device(), Device(is_lost=True))
    library.p2p = {
        (0, 1, READ): pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED,
        (1, 2, WRITE): pynvml.NVML_P2P_STATUS_NOT_SUPPORTED,
        (0, 2, READ): pynvml.NVML_P2P_STATUS_UNKNOWN,
    }

    assert ("GPU 0 and 1 (the chipset does not support it)", "GPU 1 and 2 (not supported)") == gpus.without_p2p(
        (0, 1, 2)
    )
    assert () == gpus.without_p2p((0, 2)) == gpus.without_p2p((1,)) == gpus.without_p2p(())
    assert () == gpus.without_p2p((0, 3))
    assert "P2P of GPU 0 and 3: GPU is lost" in gpus.problems()


def test_every_reason_against_p2p_has_words() -> None:
    """Each status of nvml.h but that of success and the unknown one."""
    named = {value for name, value in vars(pynvml).items() if name.startswith("NVML_P2P_STATUS_")}

    assert named - {pynvml.NVML_P2P_STATUS_OK, pynvml.NVML_P2P_STATUS_UNKNOWN} == set(nvml._NO_P2P)
    assert nvml._P2P_WRITE == pynvml.NVML_P2P_CAPS_INDEX_WRITE


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-ml-py there are no GPUs, and waiting does not help."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    gpus = open_gpus()

    assert ("the package nvidia-ml-py is not installed", True) == (gpus.reason, gpus.is_permanent)


@pytest.mark.parametrize(
    ("value", "reason", "is_permanent"),
    [
        pytest.param(12, "driver is not installed (libnvidia-ml.so.1 is not there)", False, id="no library"),
        pytest.param(9, "driver is not loaded", False, id="not loaded"),
        pytest.param(18, "driver/library version mismatch): reboot", True, id="mismatch"),
        pytest.param(999, "driver does not answer (Unknown Error)", False, id="unknown"),
        pytest.param(4, "driver does not answer (Insufficient Permissions)", False, id="permissions"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, value: int, reason: str, is_permanent: bool
) -> None:
    """What nvmlInit fails with is told in words, and whether it can pass."""
    library = Library(Device())
    monkeypatch.setattr(library, "nvmlInit", failing(value))
    monkeypatch.setitem(sys.modules, "pynvml", library)

    gpus = open_gpus()

    assert gpus.reason.endswith(reason)
    assert is_permanent == gpus.is_permanent
    assert () == gpus.devices()


def test_a_driver_without_gpus_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is let go of again; one that comes later needs a new look."""
    library = Library()
    monkeypatch.setitem(sys.modules, "pynvml", library)

    gpus = open_gpus()

    assert ("NVIDIA's driver shows no GPU", False) == (gpus.reason, gpus.is_permanent)
    assert 0 == library.opened


def test_where_there_are_none_every_answer_is_empty() -> None:
    """The rest of the daemon asks without asking first."""
    gpus = NoGpus("why")
    gpus.forget_xids()
    gpus.close()

    assert ((), None, (), ()) == (gpus.devices(), gpus.memory(0), gpus.holders([0], without=[]), gpus.xids([0]))
    assert ("why",) == gpus.problems()


def test_this_machine_has_gpus_or_a_reason() -> None:
    """The real library, or its absence: there are GPUs or there is a sentence."""
    gpus = open_gpus()
    try:
        assert bool(gpus.devices() or gpus.problems()) is True
        assert (not gpus.reason) == isinstance(gpus, Nvml)
    finally:
        gpus.close()


# What gets lost.
def test_a_gpu_that_is_lost_is_missing_and_told(open_with: Open) -> None:
    """The others go on answering; nothing is raised, and a GPU that comes back is no problem any more."""
    gpus, library = open_with(Device(compute=[(NOBODY, GIB)]), Device())
    library.given[0].is_lost = True

    assert [1] == [gpu.index for gpu in gpus.devices()]
    assert gpus.memory(0) is None
    assert () == gpus.holders([0, 1], without=())
    assert (
        "GPU 0: GPU is lost",
        "the memory of GPU 0: GPU is lost",
        "the processes of GPU 0: GPU is lost",
    ) == gpus.problems()

    library.given[0].is_lost = False

    assert [0, 1] == [gpu.index for gpu in gpus.devices()]
    assert gpus.memory(0) is not None
    assert 1 == len(gpus.holders([0, 1], without=()))
    assert () == gpus.problems()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_error_of_nvml_gets_out(open_with: Open, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Whichever function fails from now on, the answers are values."""
    gpus, library = open_with(Device(compute=[(NOBODY, GIB)]))
    monkeypatch.setattr(library, function, failing(999))

    gpus.forget_xids()

    assert len(gpus.devices()) <= 1
    assert gpus.memory(0) in (None, GpuMemory(0, 141 * GIB, 141 * GIB))
    assert len(gpus.holders([0], without=())) <= 1
    assert () == gpus.xids()
    gpus.close()
    assert gpus._listener
    gpus._listener.join(WAIT_S)
    assert not gpus._listener.is_alive()


# Who holds memory.
def test_holders_are_the_others_and_the_largest_first(open_with: Open) -> None:
    """Compute and graphics processes of the GPUs asked for, once each, without those that are named."""
    first = Device(compute=[(NOBODY, GIB), (NOBODY + 1, 5 * GIB)], graphics=[(NOBODY, GIB), (NOBODY + 2, 2 * GIB)])
    gpus, _ = open_with(first, Device(compute=[(NOBODY + 3, 9 * GIB)]), Device(compute=[(NOBODY, 3 * GIB)]))

    found = gpus.holders([0, 2], without={NOBODY + 1})

    assert [(2, NOBODY, 3 * GIB), (0, NOBODY + 2, 2 * GIB), (0, NOBODY, GIB)] == [
        (holder.gpu, holder.pid, holder.used_bytes) for holder in found
    ]


@pytest.mark.parametrize("used", [None, "N/A", 0])
def test_memory_that_the_driver_does_not_tell_counts_as_none(open_with: Open, used: Any) -> None:
    """The process is still named."""
    gpus, _ = open_with(Device(compute=[(NOBODY, used)]))

    assert (Holder(0, NOBODY, "a process of another user or container", 0),) == gpus.holders([0], without=())


def test_a_process_in_two_mig_instances_holds_both_parts(open_with: Open) -> None:
    """Where a GPU is divided, the physical one is listed, and a process of it is in the list once for each instance."""
    gpus, _ = open_with(Device(compute=[(NOBODY, GIB), (NOBODY, 2 * GIB)], graphics=[(NOBODY, GIB)]))

    assert ["GPU-0"] == [gpu.uuid for gpu in gpus.devices()]
    assert [3 * GIB] == [holder.used_bytes for holder in gpus.holders([0], without=())]


PROCESSES = st.lists(st.tuples(st.integers(NOBODY, NOBODY + 4), st.none() | st.integers(0, 1 << 40)), max_size=8)


@given(compute=PROCESSES, graphics=PROCESSES)
def test_every_process_is_named_once(compute: list[tuple[int, Any]], graphics: list[tuple[int, Any]]) -> None:
    """Whatever the two lists hold: each pid once, in falling order, with no less than any of its entries."""
    found = Nvml(Library(Device(compute=compute, graphics=graphics))).holders([0], without=())
    used = {holder.pid: holder.used_bytes for holder in found}

    assert {pid for pid, _ in compute + graphics} == set(used)
    assert len(found) == len(used)
    assert all(used[pid] >= (amount or 0) for pid, amount in compute + graphics)
    assert all(one.used_bytes >= other.used_bytes for one, other in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("/usr/local/bin/serve-it", "serve-it"),
        ("VLLM::Worker_TP0", "VLLM::Worker_TP0"),
        ("sshd: root@pts/0", "sshd: root@pts/0"),
        ("x" * 1000, "x" * 64),
        ("", "sleep"),
    ],
)
def test_a_holder_s_name_has_no_arguments(open_with: Open, title: str, name: str) -> None:
    """Arguments may hold secrets: it is the program or the title it gave itself, the kernel's name if it has none."""
    with subprocess.Popen([title, "600"], executable="/usr/bin/sleep") as child:
        gpus, _ = open_with(Device(compute=[(child.pid, GIB)]))
        try:
            eventually(lambda: [holder.name for holder in gpus.holders([0], without=())], [name])
        finally:
            child.kill()


# Xids.
def test_xids_are_those_of_the_gpus_asked_for(open_with: Open) -> None:
    """Sorted, each once; an event of a GPU that cannot be told counts for every question."""
    gpus, library = open_with(Device(), Device())
    gpus.forget_xids()
    for event in ((0, 79), (1, 31), (0, 79), (7, 48), (0, 13)):
        library.events.put(event)

    eventually(gpus.xids, (13, 31, 48, 79))
    assert [(13, 48, 79), (31, 48), (48,)] == [gpus.xids(each) for each in ([0], [1], [])]
    assert [0, 1] == library.registered


def test_nobody_listens_before_it_is_asked_for(open_with: Open) -> None:
    """A look at what is there starts no thread."""
    gpus, library = open_with(Device())
    gpus.devices()

    assert gpus._listener is None
    assert () == gpus.xids()
    assert 0 == library.waits


def test_what_was_before_is_forgotten(open_with: Open) -> None:
    """A new engine is not blamed for the last one's errors; one thread goes on listening."""
    gpus, library = open_with(Device())
    gpus.forget_xids()
    listener = gpus._listener
    library.events.put((0, 31))
    eventually(gpus.xids, (31,))

    gpus.forget_xids()
    assert () == gpus.xids()
    library.events.put((0, 43))

    eventually(gpus.xids, (43,))
    assert listener is gpus._listener


def test_a_lost_gpu_does_not_end_the_listening(open_with: Open) -> None:
    """It fails at once, for ever: the thread waits in between, and what another GPU reports still arrives."""
    gpus, library = open_with(Device())
    for _ in range(3):
        library.events.put(pynvml.NVML_ERROR_GPU_IS_LOST)
    library.events.put((0, 79))
    began = time.monotonic()
    gpus.forget_xids()

    eventually(gpus.xids, (79,))
    assert 3 * 0.02 <= time.monotonic() - began


def test_gpus_that_report_nothing_have_none(open_with: Open) -> None:
    """Where events are not supported the thread ends, nothing is found, and it is told."""
    gpus, library = open_with(Device(), nvmlDeviceRegisterEvents=failing(pynvml.NVML_ERROR_NOT_SUPPORTED))
    gpus.forget_xids()
    assert gpus._listener
    gpus._listener.join(WAIT_S)

    assert not gpus._listener.is_alive()
    assert ((), ("the events of GPU 0: Not Supported",)) == (gpus.xids(), gpus.problems())
    assert 0 == library.waits


def test_the_library_stays_open_under_the_listener(open_with: Open) -> None:
    """Closing while it waits must not take the library away from it; in the end nothing is left open."""
    gpus, library = open_with(Device())
    gpus.forget_xids()
    eventually(lambda: library.waits > 0, expected=True)

    gpus.close()
    assert gpus._listener
    gpus._listener.join(WAIT_S)

    assert not gpus._listener.is_alive()
    assert min(library.opened_while_waiting) >= 1
    assert (0, 1) == (library.opened, library.freed)


def test_the_thread_holds_up_nobody_s_end(open_with: Open) -> None:
    """A daemon that ends does not wait for a driver."""
    gpus, _ = open_with(Device())
    gpus.forget_xids()

    assert gpus._listener
    assert gpus._listener.daemon


# What its sensors say.
def test_a_gpu_is_read(open_with: Open) -> None:
    """Watts, degrees, shares and bytes, reasons by name, and who holds its memory."""
    gpus, _ = open_with(Device(used=3 * GIB, compute=[(NOBODY, 2 * GIB)]))

    reading = gpus.read(gpus.devices()[0])

    assert Reading(
        index=0, uuid="GPU-0", name="NVIDIA H200", temperature_celsius=61.0, power_watts=699.5, power_limit_watts=700.0,
        memory_used_bytes=3 * GIB, memory_total_bytes=141 * GIB, utilization_ratio=0.97,
        throttle_reasons=("sw_power_cap", "hw_thermal_slowdown"), ecc_errors={"corrected": 12, "uncorrected": 1},
        processes=(Holder(0, NOBODY, "a process of another user or container", 2 * GIB),),
    ) == reading  # fmt: skip
    assert ("power limit", "too hot, says the hardware") == reading.slowed_by


def test_a_gpu_without_sensors_is_no_problem(open_with: Open) -> None:
    """What a device does not have is absent, and nobody is told of it."""
    gpus, _ = open_with(Device(has_sensors=False))

    reading = gpus.read(gpus.devices()[0])

    assert Reading(0, "GPU-0", "NVIDIA H200", memory_used_bytes=0, memory_total_bytes=141 * GIB) == reading
    assert () == gpus.problems()


def test_the_slow_down_is_told_as_a_threshold_or_as_a_margin(open_with: Open) -> None:
    """Newer devices do not tell the threshold any more, or tell 0; then it is so far from the temperature of now."""
    gpus, library = open_with(Device(), Device(has_sensors=False))
    first, second = gpus.devices()

    assert 92.0 == gpus.slowdown_celsius(first)
    for told in (failing(pynvml.NVML_ERROR_NOT_SUPPORTED), lambda handle, threshold: 0):
        library.nvmlDeviceGetTemperatureThreshold = told  # type: ignore[method-assign]
        assert 61.0 + 27.0 == gpus.slowdown_celsius(first)
    assert gpus.slowdown_celsius(second) is None
    assert () == gpus.problems()
    assert NoGpus("none").slowdown_celsius(first) is None


def test_a_gpu_that_is_lost_leaves_its_name(open_with: Open) -> None:
    """Every question fails, none of them to the caller, and it is said."""
    gpus, library = open_with(Device(), Device())
    first, second = gpus.devices()
    library.given[1].is_lost = True

    assert Reading(1, "GPU-1", "NVIDIA H200") == gpus.read(second)
    assert any("the temperature of GPU 1" in each for each in gpus.problems())
    assert 61.0 == gpus.read(first).temperature_celsius


def test_xids_are_counted_over_all_engines(open_with: Open) -> None:
    """A new engine forgets what the last one met; the counter goes on."""
    gpus, library = open_with(Device())
    gpus.forget_xids()
    for xid in (79, 13, 13):
        library.events.put((0, xid))
    eventually(gpus.xids, (13, 79))
    gpus.forget_xids()
    library.events.put((0, 13))
    eventually(gpus.xids, (13,))

    assert {"79": 1, "13": 3} == gpus.read(gpus.devices()[0]).xids


@pytest.mark.parametrize("name", THROTTLE_REASONS)
def test_reasons_have_nvidia_s_bits(name: str) -> None:
    """The table is NVML's own."""
    theirs = "nvmlClocksEventReason" + "".join(part.capitalize() for part in name.split("_"))

    assert getattr(pynvml, theirs) == THROTTLE_REASONS[name][0]
    assert (name,) == reasons(THROTTLE_REASONS[name][0])
    assert NoGpus("none").read(Gpu(0, "u", "n", "p", 1)).throttle_reasons is None
