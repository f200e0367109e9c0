"""systemd, the clocks, NUMA nodes and the kernel's log, as this machine has them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

from llm_serve.core.doctor.machine import ClockFacts, KernelLogFacts, NumaFacts, SystemdFacts
from llm_serve.host.doctor.gpus import numa_node, opened
from llm_serve.host.kernel_log import KernelLog

_UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
)
_UNIT = "llm-serve@.service"
_ANSWER_TIMEOUT_S = 5.0
_WAIT_S = 0.25
_ADJTIMEX_BYTES = 256
"""More than the kernel's struct timex (208 on 64 bits)."""
_TIME_ERROR = 5
_KILLED = re.compile(r"Killed process \d", re.IGNORECASE)
_HARDWARE = re.compile(r"Machine check|\[Hardware Error\]|hardware memory|EDAC", re.IGNORECASE)


def systemd_facts() -> SystemdFacts:
    """The version that is installed, and whether it runs the machine."""
    unit = next((f"{folder}/{_UNIT}" for folder in _UNIT_FOLDERS if Path(folder, _UNIT).exists()), "")
    version = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["systemctl", "--version"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True).stdout
        version = int(found[1]) if (found := re.match(r"systemd (\d+)", said)) else None
    return SystemdFacts(version, Path("/run/systemd/system").is_dir(), unit)


def clock_facts(clocksource: Path = Path("/sys/devices/system/clocksource/clocksource0")) -> ClockFacts:
    """Both clocks over a short wait, and what the kernel knows of the wall clock."""
    monotonic, raw = _two_clocks()
    time.sleep(_WAIT_S)
    monotonic_after, raw_after = _two_clocks()
    source = ""
    with contextlib.suppress(OSError):
        source = (clocksource / "current_clocksource").read_text().strip()
    return ClockFacts(
        now=time.time(),
        installed=Path(__file__).stat().st_ctime,
        is_synchronised=_is_synchronised(),
        elapsed_monotonic_s=monotonic_after - monotonic,
        elapsed_raw_s=raw_after - raw,
        source=source,
    )


def _two_clocks() -> tuple[float, float]:
    """Both at one moment: of several looks the one that took the least time, since a busy machine may interrupt any."""
    looks = []
    for _ in range(10):
        before = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        monotonic = time.clock_gettime(time.CLOCK_MONOTONIC)
        after = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        looks.append((after - before, monotonic, (before + after) / 2))
    return min(looks)[1:]


def _is_synchronised() -> bool | None:
    """As the kernel keeps it for everybody, whoever sets the clock; None where it does not answer (a sandbox)."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_ADJTIMEX_BYTES))
    return None if state < 0 else bool(state != _TIME_ERROR)


def numa_facts(folder: Path = Path("/sys/devices/system/node")) -> NumaFacts:
    """Nodes, and where the GPUs are."""
    nodes = {}
    for node in folder.glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            nodes[int(node.name.removeprefix("node"))] = cpus_in((node / "cpulist").read_text())
    with opened() as gpus:
        at = {gpu.index: numa_node(gpu.pci_bus_id) for gpu in gpus.devices()}
    known = {gpu: node for gpu, node in at.items() if node is not None}
    return NumaFacts(nodes, known, frozenset(os.sched_getaffinity(0)))


def cpus_in(text: str) -> frozenset[int]:
    """{0, 1, 2, 5} from "0-2,5"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def kernel_log_facts(device: Path = Path("/dev/kmsg")) -> KernelLogFacts:
    """What the log holds since the boot."""
    log = KernelLog(device, from_boot=True)
    try:
        if log.reason:
            return KernelLogFacts(log.reason)
        lines = log.lines_since_start()
        return KernelLogFacts(
            xids=Counter(log.xids()),
            kills=sum(bool(_KILLED.search(line)) for line in lines),
            hardware=tuple(line for line in lines if _HARDWARE.search(line)),
        )
    finally:
        log.close()
