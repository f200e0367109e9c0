"""The GPUs one by one, the ways between them, and who holds their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llm_serve.core.doctor.findings import Finding, gib, good, not_known, note, problem

LEAST_CAPABILITY = (7, 5)
_SLOW_LANES = 4
_UNSEEN_BYTES = 1 << 30
"""A driver keeps some hundred MiB of each GPU for itself."""

_FABRIC_NOT_READY = (1, 2)
"""NVML's numbers for "not started" and "in progress"."""

RECOVERY_ACTIONS: Mapping[int, str] = {
    1: "nvidia-smi --gpu-reset -i {index}, with nothing running on it",
    2: "reboot",
    3: "stop all that uses this GPU's links, then nvidia-smi --gpu-reset -i {index}",
    4: "stop all that runs on it, then nvidia-smi --gpu-reset -i {index}",
    5: "recover the IMEX domain",
    6: "nvidia-smi --gpu-reset -i {index}, with nothing running on it (bus reset)",
    7: "reboot",
}
"""What the driver asks for after an error, by NVML's number of it."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU. None where it does not tell. `lanes` and `links` are (now, at most)."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int | None = None
    capability: tuple[int, int] | None = None
    lanes: tuple[int, int] | None = None
    links: tuple[int, int] | None = None
    is_persistent: bool | None = None
    compute_mode: int | None = None
    is_mig: bool | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    recovery_action: int | None = None
    numa_node: int | None = None
    fabric_state: int | None = None


def judge_gpu(gpu: GpuFacts) -> Iterator[Finding]:
    """What one GPU is, and what ails it."""
    check = f"gpu.{gpu.index}"
    capability = "{}.{}".format(*gpu.capability) if gpu.capability else "not known"
    found = f"{gpu.name}, {gib(gpu.total_bytes)}, compute capability {capability}"
    if gpu.capability and gpu.capability < LEAST_CAPABILITY:
        means = "vLLM's kernels begin at {}.{}.".format(*LEAST_CAPABILITY)
        yield problem(check, found, means, "Leave this GPU out (gpu.devices), or use a newer one.")
    else:
        yield good(check, found)
    yield from _ailments(gpu, check)
    yield from _manners(gpu, check)


def _ailments(gpu: GpuFacts, check: str) -> Iterator[Finding]:
    reset = f"Stop what runs on it, then nvidia-smi --gpu-reset -i {gpu.index}, or reboot."
    if gpu.rows_failed:
        yield problem(
            f"{check}.memory", "rows of its memory are broken and no spare ones are left", "Answers may be wrong.",
            "Replace the GPU (nvidia-smi -q -d ROW_REMAPPER shows what the vendor asks for).",
        )  # fmt: skip
    elif gpu.rows_pending:
        means = "The GPU works on; spare rows take the place of the broken ones with the next reset."
        yield note(f"{check}.memory", "rows of its memory are broken and wait to be replaced", means, reset)
    if action := RECOVERY_ACTIONS.get(gpu.recovery_action or 0):
        cure = action.format(index=gpu.index)
        yield problem(f"{check}.recovery", "the driver asks for a recovery after an error", "The GPU may fail.", cure)


def _manners(gpu: GpuFacts, check: str) -> Iterator[Finding]:
    if gpu.fabric_state in _FABRIC_NOT_READY:
        means = "On a machine with NVSwitch CUDA fails until then (Error 802: system not yet initialized)."
        cure = "systemctl enable --now nvidia-fabricmanager, of the driver's own version"
        yield note(f"{check}.fabric", "its NVLink fabric is not set up", means, cure)
    match gpu.compute_mode:
        case 2:
            means = "No process may use CUDA on it."
            yield problem(
                f"{check}.mode", "its compute mode is prohibited", means, f"nvidia-smi -i {gpu.index} -c DEFAULT"
            )
        case 1 | 3:
            means = "One process at a time may use it: two instances cannot share it."
            yield note(f"{check}.mode", "its compute mode is exclusive", means, f"nvidia-smi -i {gpu.index} -c DEFAULT")
    if gpu.is_mig:
        means = "It is split: CUDA sees the parts, and memory figures here are those of the whole."
        yield note(f"{check}.mig", "MIG is on", means, f"nvidia-smi -i {gpu.index} -mig 0 to have it whole")
    if gpu.lanes and gpu.lanes[0] < gpu.lanes[1]:
        means = "Loading weights, and tensor parallel without NVLink, take longer."
        if gpu.lanes[0] < _SLOW_LANES:
            means += " So few lanes point to a riser, or to a slot behind the chipset."
        found = f"uses {gpu.lanes[0]} of the {gpu.lanes[1]} PCIe lanes that it can"
        yield note(f"{check}.pcie", found, means, "Reseat it, or move it to a slot with more lanes.")
    if gpu.is_persistent is False:
        means = "The driver lets go of an idle GPU, and the next start waits some seconds for it."
        yield note(
            f"{check}.persistence", "persistence mode is off", means, "systemctl enable --now nvidia-persistenced"
        )
    if gpu.links and 0 < gpu.links[0] < gpu.links[1]:
        means = "The GPUs exchange less than they could."
        found = f"{gpu.links[0]} of {gpu.links[1]} NVLinks are up"
        yield note(
            f"{check}.nvlink", found, means, "Look at nvidia-smi nvlink -e and at the kernel's log; reseat the bridge."
        )


P2P_STATES: Mapping[int, str] = {
    0: "yes",
    1: "the chipset does not",
    2: "these GPUs do not",
    3: "not between two sockets",
    4: "switched off in the driver",
    5: "not supported",
    6: "not known",
}
"""NVML's answers to "may one write into the other's memory"."""

LEVELS: Mapping[int, str] = {
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one host bridge",
    40: "one NUMA node",
    50: "two sockets",
}
"""NVML's name for what two GPUs have in common."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two GPUs. Numbers are NVML's; None where it does not tell."""

    first: int
    second: int
    p2p: int | None = None
    nvlink: int | None = None
    level: int | None = None

    def __str__(self) -> str:
        ways = ["NVLink"] if self.nvlink == 0 else []
        ways += [LEVELS[self.level]] if self.level is not None and self.level in LEVELS else []
        reach = "P2P" if self.p2p == 0 else f"no P2P: {P2P_STATES.get(6 if self.p2p is None else self.p2p, self.p2p)}"
        return f"{self.first}-{self.second} {reach} ({', '.join(ways) or 'way not known'})"


@dataclass(frozen=True, slots=True)
class PairFacts:
    """All pairs of GPUs; whether an IOMMU translates what they write."""

    pairs: tuple[Pair, ...] = ()
    has_iommu: bool | None = None


def judge_pairs(facts: PairFacts) -> Iterator[Finding]:
    """Whether GPUs reach each other's memory. Nothing to say of one GPU."""
    if not facts.pairs:
        return
    found = "; ".join(map(str, facts.pairs))
    reach = [pair.p2p == 0 for pair in facts.pairs]
    if all(pair.p2p is None for pair in facts.pairs):
        yield not_known("gpu.p2p", found)
    elif all(reach):
        yield good("gpu.p2p", found)
    else:
        means = "Tensor parallel goes through main memory there: slower, and as it is for most consumer cards."
        cure = 'If a start hangs: NCCL_P2P_DISABLE = "1" in [engine.env], disable_custom_all_reduce = true in [engine]'
        yield note("gpu.p2p", found, means, cure)
    if any(reach) and facts.has_iommu:
        means = "P2P through an IOMMU that translates is known to hang or to give wrong numbers on some boards."
        cure = "If tensor parallel hangs: iommu=pt on the kernel's command line, ACS off in the BIOS."
        yield note("gpu.iommu", "an IOMMU is on, and it translates", means, cure)


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A process that holds memory of GPUs, or has an engine's name. `instance` is whose mark it carries, if any."""

    pid: int
    name: str
    user: str = ""
    used_bytes: Mapping[int, int] = field(default_factory=dict)
    instance: str = ""
    is_orphan: bool = False
    """Its parent has ended, and no running instance of ours has it below itself."""

    def __str__(self) -> str:
        amounts = ", ".join(f"{gib(used)} of GPU {gpu}" for gpu, used in sorted(self.used_bytes.items()))
        who = f" of {self.user}" if self.user else ""
        return f"{self.name} (pid {self.pid}){who}" + (f" holds {amounts}" if amounts else "")

    @property
    def is_engine(self) -> bool:
        """True for a process of vLLM's, by the name that it gives itself."""
        return self.name.startswith("VLLM::") or bool(self.instance)


def judge_processes(processes: tuple[ProcessFacts, ...], unseen: Mapping[int, int]) -> Iterator[Finding]:
    """Who holds what. `unseen` is memory by GPU, in bytes, that no process which can be seen from here holds."""
    stale = [process for process in processes if process.is_engine and process.is_orphan]
    for process in processes:
        if process in stale:
            means = "Left by a server that has ended: it serves nobody, and a start has to fit beside it."
            cure = f"kill -9 {process.pid}, as {process.user or 'its user'} or root"
            yield problem(f"process.{process.pid}", f"{process}, and its server is gone", means, cure)
        elif process.used_bytes and process.instance:
            yield good(f"process.{process.pid}", f"{process}, for the instance {process.instance}")
        elif process.used_bytes:
            means = "An engine that starts has to fit beside it: gpu_memory_utilization counts the whole GPU."
            cure = "Stop it, or lower engine.gpu_memory_utilization."
            yield note(f"process.{process.pid}", str(process), means, cure)
    for gpu, amount in unseen.items():
        if amount >= _UNSEEN_BYTES:
            found = f"{gib(amount)} of GPU {gpu} are held by nobody that can be seen from here"
            means = "Processes of another container, a desktop, or what a driver keeps for one that died."
            cure = (
                f"sudo fuser -v /dev/nvidia{gpu} on the host; where that names nobody: nvidia-smi --gpu-reset -i {gpu}"
            )
            yield note(f"gpu.{gpu}.held", found, means, cure)
    if not stale:
        ours = sorted({process.instance for process in processes if process.instance})
        which = f"; processes of {', '.join(ours)} run" if ours else ""
        yield good("process", f"no engine is left without its server{which}")
