"""The machine around: systemd, the clocks, NUMA nodes, and what the kernel's log tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llm_serve.core.doctor.findings import Finding, good, not_known, note, problem

LEAST_SYSTEMD, BEST_SYSTEMD = 252, 254
"""252 is tested; 254 knows RestartSteps= and keeps descriptors over a restart that fails."""


@dataclass(frozen=True, slots=True)
class SystemdFacts:
    """`version` is None where there is none; `is_booted` tells whether it runs this machine."""

    version: int | None = None
    is_booted: bool = False
    unit: str = ""
    """The file of the unit, empty where it is not installed."""


def judge_systemd(facts: SystemdFacts) -> Finding:
    """Whether the unit works here as it is meant."""
    if facts.version is None or not facts.is_booted:
        found = "systemd does not run this machine" + (
            f" (version {facts.version} is installed)" if facts.version else ""
        )
        means = "As in most containers: nothing restarts the daemon, and no socket outlives it."
        return note(
            "systemd", found, means, "Let the container's own policy restart `llm-serve run NAME` (--restart always)."
        )
    unit = f", {facts.unit}" if facts.unit else ", the unit llm-serve@.service is not installed"
    if facts.version < LEAST_SYSTEMD:
        means = f"The unit is tested with {LEAST_SYSTEMD} and newer."
        return note("systemd", f"systemd {facts.version}{unit}", means, "A newer distribution: Debian 12 has 252.")
    if facts.version < BEST_SYSTEMD:
        means = "Pauses between restarts do not grow (RestartSteps= is not known yet); all else works."
        return note("systemd", f"systemd {facts.version}{unit}", means)
    return good("systemd", f"systemd {facts.version}{unit}")


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """Seconds. `elapsed_monotonic_s` and `elapsed_raw_s` are one short wait on two clocks."""

    now: float
    installed: float
    """When this program was installed: the wall clock cannot be right before that."""
    is_synchronised: bool | None = None
    elapsed_monotonic_s: float = 0.0
    elapsed_raw_s: float = 0.0
    source: str = ""


def judge_clock(facts: ClockFacts) -> Iterator[Finding]:
    """The wall clock, which logs and certificates need, and the monotonic one, which every time-out needs."""
    cure = "timedatectl set-ntp true (systemd-timesyncd or chrony)"
    if facts.now < facts.installed - 86400:
        means = "Certificates look as if they were not valid yet: downloads from the hub fail; logs lie."
        yield problem("clock", "the wall clock stands before this program was installed", means, cure)
    elif facts.is_synchronised is None:
        yield not_known("clock", "the kernel does not say whether the clock is synchronised", cure=cure)
    elif not facts.is_synchronised:
        means = "Time-outs do not depend on it; logs of several machines cannot be compared."
        yield note("clock", "the wall clock is not synchronised, says the kernel", means, cure)
    else:
        yield good("clock", "the wall clock is synchronised")
    drift = abs(facts.elapsed_monotonic_s - facts.elapsed_raw_s)
    found = f"monotonic clock by {facts.source or 'an unknown source'}"
    if facts.elapsed_monotonic_s <= 0 or drift > 0.01 + 0.05 * facts.elapsed_raw_s:
        times = f"{facts.elapsed_monotonic_s:.3f} s on one clock were {facts.elapsed_raw_s:.3f} s on the other"
        means = "Every time-out, and the watchdog, runs by it: false alarms, or none."
        yield problem(
            "clock.monotonic",
            f"{found}: {times}",
            means,
            "clocksource=tsc on the kernel's command line; update the hypervisor",
        )
    elif facts.source in {"hpet", "acpi_pm", "refined-jiffies", "jiffies"}:
        means = "Each look at the clock is a slow access to a device; an engine looks thousands of times a second."
        yield note(
            "clock.monotonic",
            found,
            means,
            "clocksource=tsc tsc=reliable on the kernel's command line, if the TSC is stable",
        )
    else:
        yield good("clock.monotonic", found)


@dataclass(frozen=True, slots=True)
class NumaFacts:
    """Nodes with their CPUs, the node of each GPU (-1: not told), and the CPUs that this process may use."""

    nodes: Mapping[int, frozenset[int]] = field(default_factory=dict)
    gpu_nodes: Mapping[int, int] = field(default_factory=dict)
    allowed: frozenset[int] = frozenset()


def judge_numa(facts: NumaFacts) -> Iterator[Finding]:
    """Whether the CPUs near the GPUs may be used."""
    if not facts.nodes:
        yield not_known("numa", "the kernel shows no NUMA nodes")
        return
    places = "; ".join(f"GPU {gpu} at node {node}" for gpu, node in sorted(facts.gpu_nodes.items()) if node >= 0)
    found = f"{len(facts.nodes)} NUMA node{'s' * (len(facts.nodes) != 1)}" + (f": {places}" if places else "")
    far = [
        gpu
        for gpu, node in sorted(facts.gpu_nodes.items())
        if node in facts.nodes and not facts.nodes[node] & facts.allowed
    ]
    if far:
        which = ", ".join(f"GPU {gpu}" for gpu in far)
        means = "Every launch and copy goes through the other socket."
        cpus = spans(facts.nodes[facts.gpu_nodes[far[0]]])
        yield note(
            "numa",
            f"{found}; no CPU near {which} may be used",
            means,
            f"CPUAffinity={cpus} in the unit, or taskset -c {cpus}",
        )
        return
    if len(facts.nodes) > 1 and len({node for node in facts.gpu_nodes.values() if node >= 0}) > 1:
        means = "An instance whose GPUs are at one node is a little faster than one that is spread."
        yield note("numa", found, means, "gpu.devices with GPUs of one node, NUMAPolicy= and CPUAffinity= in the unit")
        return
    yield good("numa", found)


def spans(numbers: frozenset[int]) -> str:
    """{0, 1, 2, 5} as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


@dataclass(frozen=True, slots=True)
class KernelLogFacts:
    """What the log still holds since the boot: Xids by number and kills for memory; or why it cannot be read."""

    reason: str = ""
    xids: Mapping[int, int] = field(default_factory=dict)
    kills: int = 0
    hardware: tuple[str, ...] = ()
    """Lines on broken memory and processors."""


def judge_kernel_log(facts: KernelLogFacts) -> Iterator[Finding]:
    """What went wrong before, which no counter shows any more."""
    if facts.reason:
        yield not_known(
            "kernel_log",
            facts.reason,
            "GPU errors and kills for memory since the boot are not seen.",
            "sudo llm-serve doctor",
        )
        return
    if facts.xids:
        which = ", ".join(f"{xid} ({count}x)" for xid, count in sorted(facts.xids.items()))
        means = "Errors of GPUs since the boot: 13, 31, 43, 45 are of programs; 48, 63, 64, 79, 94, 95 of hardware."
        yield note(
            "kernel_log.xid",
            f"Xid {which}",
            means,
            "journalctl -k -g Xid; NVIDIA's Xid catalogue says what to do for each",
        )
    if facts.kills:
        means = "The kernel ended processes for want of memory since the boot."
        yield note(
            "kernel_log.memory",
            f"{facts.kills} processes killed for memory",
            means,
            "journalctl -k -g 'Killed process'",
        )
    if facts.hardware:
        means = "Main memory or a processor reports faults."
        yield problem(
            "kernel_log.hardware", facts.hardware[-1], means, "Test the memory (memtest86+), replace what is named."
        )
    if not (facts.xids or facts.kills or facts.hardware):
        yield good("kernel_log", "no GPU error, no kill for memory and no hardware error since the boot")
