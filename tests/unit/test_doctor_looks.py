"""What the doctor sees: hand-made GPUs and /proc, and real faults of this machine, made on cue.

There is no GPU where these tests run: NVML is hand-made as in test_nvml.py, and a test compares its names with the
real package.
"""

# ruff: noqa: N802, N803, N815 - the names are NVIDIA's

from __future__ import annotations

import ctypes
import inspect
import os
import pwd
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from llm_serve.core.doctor import limits as judge_limits
from llm_serve.core.doctor.findings import State, good
from llm_serve.core.doctor.gpus import Pair
from llm_serve.core.settings import Settings
from llm_serve.host.doctor import checks, gpus, instance, limits, machine, tools
from llm_serve.host.doctor.checks import Check
from llm_serve.host.processes import MARKER
from tests.patience import patient
from tests.unit.test_nvml import GIB, Device, Library, failing, index_of

BIG = 64 << 20


class Links(Library):
    """Two GPUs or more with what the doctor asks beyond the daemon."""

    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
    NVML_SUCCESS = pynvml.NVML_SUCCESS
    c_nvmlGpuFabricInfoV_t = pynvml.c_nvmlGpuFabricInfoV_t

    def nvmlSystemGetDriverVersion(self) -> Any:
        return b"580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetCudaComputeCapability(self, handle: ctypes.c_void_p) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetRemappedRows(self, device: ctypes.c_void_p) -> tuple[int, ...]:
        return (0, 1, index_of(device), 0)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: ctypes.c_void_p) -> int:
        return 8

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: ctypes.c_void_p) -> int:
        return 16

    def nvmlDeviceGetNvLinkState(self, device: ctypes.c_void_p, link: int) -> int:
        if link >= 4:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(link != 2)

    def nvmlDeviceGetPersistenceMode(self, handle: ctypes.c_void_p) -> int:
        return 1

    def nvmlDeviceGetMigMode(self, device: ctypes.c_void_p) -> list[int]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetComputeMode(self, handle: ctypes.c_void_p) -> int:
        return int(pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)

    def nvmlDeviceGetFieldValues(self, handle: ctypes.c_void_p, fieldIds: list[int]) -> list[Any]:
        assert [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION] == fieldIds
        return [SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(uiVal=2))]

    def nvmlDeviceGetGpuFabricInfoV(self, device: ctypes.c_void_p, gpuFabricInfo: Any) -> None:
        gpuFabricInfo._obj.state = pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS

    def nvmlDeviceGetP2PStatus(self, device1: ctypes.c_void_p, device2: ctypes.c_void_p, p2pIndex: int) -> int:
        return {1: int(pynvml.NVML_P2P_STATUS_OK), 2: int(pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)}[p2pIndex]

    def nvmlDeviceGetTopologyCommonAncestor(self, device1: ctypes.c_void_p, device2: ctypes.c_void_p) -> int:
        return int(pynvml.NVML_TOPOLOGY_HOSTBRIDGE)


FUNCTIONS = [name for name, member in vars(Links).items() if name.startswith("nvml") and callable(member)]


def install(monkeypatch: pytest.MonkeyPatch, *devices: Device, **functions: Any) -> None:
    """Let these be the machine's GPUs."""
    library = Links(*devices)
    for name, function in functions.items():
        monkeypatch.setattr(library, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", library)


def test_the_fake_is_like_the_real_package() -> None:
    """Every name is there in the installed nvidia-ml-py, and takes as many arguments."""
    for name in FUNCTIONS:
        real = len(inspect.signature(getattr(pynvml, name)).parameters)
        assert real == len(inspect.signature(getattr(Links, name)).parameters) - 1, name


# GPUs.
def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As NVML and the PCI bus tell it."""
    install(monkeypatch, Device(), Device(used=3 * GIB))
    write(tmp_path / "0000:01:00.0/numa_node", "1\n")

    _, gpu = gpus.gpu_facts(tmp_path)

    assert (1, "NVIDIA H200", 3 * GIB, (9, 0), (8, 16), (3, 4)) == (
        gpu.index, gpu.name, gpu.used_bytes, gpu.capability, gpu.lanes, gpu.links,
    )  # fmt: skip
    assert 2 == gpu.fabric_state
    assert (True, None, 3, True, False, 2, 1) == (
        gpu.is_persistent, gpu.is_mig, gpu.compute_mode, gpu.rows_pending, gpu.rows_failed, gpu.recovery_action, gpu.numa_node,
    )  # fmt: skip


def test_pairs_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every two GPUs once; an IOMMU counts where it translates."""
    install(monkeypatch, Device(), Device(), Device())
    write(tmp_path / "iommu/dmar0", "")
    write(tmp_path / "pci/0000:01:00.0/iommu_group/type", "DMA-FQ\n")

    facts = gpus.pair_facts(tmp_path / "pci", tmp_path / "iommu")

    assert [(0, 1), (0, 2), (1, 2)] == [(pair.first, pair.second) for pair in facts.pairs]
    assert Pair(0, 1, p2p=0, nvlink=5, level=30) == facts.pairs[0]
    assert facts.has_iommu is True
    write(tmp_path / "pci/0000:01:00.0/iommu_group/type", "identity\n")
    assert gpus.pair_facts(tmp_path / "pci", tmp_path / "iommu").has_iommu is False
    assert gpus.pair_facts(tmp_path / "pci", tmp_path / "none").has_iommu is False


def test_the_driver_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Versions, hardware on the bus, and who else may have taken it."""
    install(monkeypatch, Device())
    for address, vendor, kind in (
        ("0000:3b:00.0", "0x10de", "0x030200"),
        ("0000:3b:00.1", "0x10de", "0x040300"),
        ("0000:00:02.0", "0x8086", "0x030000"),
    ):
        write(tmp_path / f"pci/{address}/vendor", f"{vendor}\n")
        write(tmp_path / f"pci/{address}/class", f"{kind}\n")
    write(tmp_path / "modules", "nouveau 123 0 - Live 0x0\n")

    facts = gpus.driver_facts(tmp_path / "pci", tmp_path)

    assert ("580.95.05", (13, 1), "", ("0000:3b:00.0",), True) == (
        facts.driver, facts.cuda, facts.reason, facts.pci_gpus, facts.has_nouveau,
    )  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_question_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str
) -> None:
    """Older drivers lack functions, and devices lack sensors."""
    install(monkeypatch, Device(), Device(), **{function: failing(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)})

    assert 2 == len(gpus.gpu_facts(tmp_path))
    assert 1 == len(gpus.pair_facts(tmp_path, tmp_path).pairs)
    assert "" == gpus.driver_facts(tmp_path, tmp_path).reason


def test_this_machine_is_described() -> None:
    """The real driver, or its absence: every look returns."""
    assert isinstance(gpus.driver_facts().reason, str)
    assert isinstance(gpus.gpu_facts(), tuple)
    assert gpus.build().torch == "" or gpus.build().version
    assert machine.numa_facts().allowed == frozenset(os.sched_getaffinity(0))


def test_the_build_is_read_without_an_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the packages' data, and torch's version.py."""
    write(tmp_path / "torch/__init__.py", "raise RuntimeError\n")
    write(
        tmp_path / "torch/version.py",
        "from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n",
    )
    write(tmp_path / "vllm-0.32.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    code = "from llm_serve.host.doctor.gpus import build; import sys; print(build()); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(gpus.__file__).parents[3]}"}

    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout

    assert "torch='2.13.0+cu130', cuda='13.0'" in said


# Processes.
@pytest.fixture
def left_over() -> Iterator[psutil.Process]:
    """An engine by its name whose server has ended: its parent forks it and goes."""
    code = "import os, sys, time\nif os.fork():\n    os._exit(0)\nprint(os.getpid(), flush=True)\nos.close(1)\ntime.sleep(60)\n"
    environment = os.environ | {MARKER: "/run/llm-serve/qwen"}
    parent = subprocess.Popen(
        ["VLLM::EngineCore", "-c", code], executable=sys.executable, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    parent.wait()
    parent.stdout.close()
    yield process
    process.kill()


def test_an_engine_without_its_server_is_found(left_over: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its user, the instance whose mark it carries, and the memory that it holds."""
    install(monkeypatch, Device(used=5 * GIB, compute=[(left_over.pid, 3 * GIB)]))
    deadline = time.monotonic() + 10
    while (facts := {each.pid: each for each in gpus.process_facts()[0]}) and not facts[left_over.pid].is_orphan:
        assert time.monotonic() < deadline, facts

    found = facts[left_over.pid]
    assert ("VLLM::EngineCore", pwd.getpwuid(os.geteuid()).pw_name, "qwen") == (found.name, found.user, found.instance)
    assert {0: 3 * GIB} == found.used_bytes
    assert {0: 2 * GIB} == gpus.process_facts()[1]


def test_an_engine_with_its_server_is_left_alone() -> None:
    """Somebody who is no engine stands above it: this test."""
    engine = subprocess.Popen(["VLLM::Worker", "-c", "input()"], executable=sys.executable, stdin=subprocess.PIPE)
    try:
        (found,) = (each for each in gpus.process_facts()[0] if each.pid == engine.pid)
    finally:
        engine.communicate(b"\n")

    assert ("VLLM::Worker", False, True) == (found.name, found.is_orphan, found.is_engine)


# Tools.
def test_tools_are_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under CUDA_HOME; the compiler tells its version."""
    write(tmp_path / "bin/nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    (tmp_path / "bin/nvcc").chmod(0o755)

    facts = tools.tool_facts({"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}, aside=tmp_path / "bin/nvcc")
    other = tools.tool_facts({"PATH": "/nowhere"}, aside=tmp_path / "bin/nvcc")

    assert (str(tmp_path / "bin/nvcc"), (12, 8), "") == (facts.programs["nvcc"], facts.nvcc_version, facts.nvcc_aside)
    assert (None, None, str(tmp_path / "bin/nvcc")) == (other.programs["nvcc"], other.nvcc_version, other.nvcc_aside)
    assert facts.programs["gcc"] is None


def test_an_nvcc_that_fails_has_no_version(tmp_path: Path) -> None:
    """It is there, and that is all that is known."""
    write(tmp_path / "bin/nvcc", "#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/nvcc").chmod(0o755)

    assert tools.tool_facts({"PATH": str(tmp_path / "bin")}).nvcc_version is None


# Places.
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB from which nothing can be run."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,noexec", "none", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def said_of(place: judge_limits.Place) -> dict[str, State]:
    """The states of its findings."""
    return {finding.check: finding.state for finding in judge_limits.judge_place(place, "bob")}


def test_a_full_disk_is_a_problem(small_disk: Path) -> None:
    """Before a start says so; a folder that is yet to be made counts as its disk."""
    place = limits.place("HF_HOME", small_disk / "a/b")

    assert (False, "", True) == (place.exists, place.error, place.is_noexec)
    assert {"disk.HF_HOME": State.problem} == said_of(place)
    assert not (small_disk / "a").exists()


def test_a_disk_for_programs_must_run_them(small_disk: Path) -> None:
    """Compiled kernels are libraries."""
    assert State.problem == said_of(limits.place("TRITON_CACHE_DIR", small_disk))["disk.TRITON_CACHE_DIR.noexec"]


def test_small_shared_memory_is_a_problem(small_disk: Path) -> None:
    """/dev/shm of one MiB."""
    (finding,) = judge_limits.judge_shared_memory(limits.shared_memory(small_disk))

    assert (State.problem, "1 MiB of 1 MiB are free in /dev/shm") == (finding.state, finding.found)
    assert limits.shared_memory(small_disk / "none").error


def test_a_folder_of_another_user_is_a_problem(tmp_path: Path) -> None:
    """Root asks for the service's user; anybody for himself. Nothing is left of the try."""
    (tmp_path / "closed").mkdir(mode=0o700)
    if os.geteuid():
        (tmp_path / "closed").chmod(0o500)
        place = limits.place("HF_HOME", tmp_path / "closed/new")
    else:
        place = limits.place("HF_HOME", tmp_path / "closed/new", user="nobody")

    assert "Permission denied" == place.error
    assert {"disk.HF_HOME": State.problem} == said_of(place)
    assert [] == list((tmp_path / "closed").iterdir())


def test_a_folder_of_ours_is_good(tmp_path: Path) -> None:
    """And stays as it was."""
    place = limits.place("HF_HOME", tmp_path)

    assert (True, "") == (place.exists, place.error)
    assert [] == list(tmp_path.iterdir())


def test_the_folders_of_this_environment_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a start, by their variables."""
    monkeypatch.setattr("llm_serve.host.doctor.limits.tempfile.gettempdir", lambda: str(tmp_path))

    found = {place.name: place.path for place in limits.places({"HF_HOME": str(tmp_path / "hf"), "HOME": "/root"})}

    assert {"HF_HOME": str(tmp_path / "hf"), "HOME": "/root/.cache", "TMPDIR": str(tmp_path)} == found


def test_a_folder_that_nobody_can_write_to_is_no_full_disk() -> None:
    """/proc has no room, but that is not why."""
    assert "No such file or directory" == limits.place("HF_HOME", Path("/proc/none")).error


# Limits.
def test_a_low_limit_is_seen() -> None:
    """ulimit -n, soft and hard."""
    code = "from llm_serve.host.doctor.limits import limits; facts = limits(); print(facts.open_files, facts.open_files_hard)"
    low = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))  # noqa: E731
    environment = os.environ | {"PYTHONPATH": str(Path(gpus.__file__).parents[3])}

    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, preexec_fn=low, capture_output=True, text=True, check=True
    ).stdout

    assert "256 512" == said.strip()


def test_this_machine_has_limits() -> None:
    """Real files, real numbers."""
    facts = limits.limits()

    assert 0 < facts.available_bytes <= facts.total_bytes
    assert len(os.sched_getaffinity(0)) == facts.cpus


# The machine around.
def test_the_clocks_of_this_machine_agree() -> None:
    """Over a quarter of a second."""
    facts = machine.clock_facts()

    assert facts.elapsed_monotonic_s == pytest.approx(facts.elapsed_raw_s, abs=0.01)
    assert facts.elapsed_monotonic_s >= 0.25


@pytest.mark.parametrize(("state", "expected"), [(-1, None), (0, True), (5, False)])
def test_the_kernel_says_whether_the_clock_is_synchronised(
    monkeypatch: pytest.MonkeyPatch, state: int, expected: bool | None
) -> None:
    """adjtimex answers 5 for "not", and fails in some sandboxes."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(adjtimex=lambda _: state))

    assert expected is machine._is_synchronised()


def test_the_kernels_log_is_read_from_the_boot_on(tmp_path: Path) -> None:
    """What happened before the command began; /dev/kmsg as a file."""
    log = tmp_path / "kmsg"
    xid = "4,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
    log.write_text(
        xid
        + "3,2,3,-;Out of memory: Killed process 4242 (a) total-vm:1kB\n"
        + "0,3,4,-;mce: [Hardware Error]: Machine check\n"
    )

    facts = machine.kernel_log_facts(log)

    assert ({79: 1}, 1, 1) == (facts.xids, facts.kills, len(facts.hardware))
    assert "No such file" in machine.kernel_log_facts(tmp_path / "none").reason


def test_numa_nodes_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With their CPUs."""
    write(tmp_path / "node0/cpulist", "0-1,4\n")
    write(tmp_path / "node1/cpulist", "2-3\n")
    write(tmp_path / "node2/cpulist", "\n")

    assert {0: {0, 1, 4}, 1: {2, 3}, 2: set()} == machine.numa_facts(tmp_path).nodes


# An instance.
def settings(tmp_path: Path, **changes: Any) -> Settings:
    """An instance's file that asks for little."""
    return Settings(name="qwen", source=str(tmp_path / "qwen.toml"), **{"model": str(tmp_path / "model"), **changes})


def test_a_taken_port_is_told_with_its_holder(tmp_path: Path) -> None:
    """Who listens there is this test."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        asked = settings(tmp_path, server={"listen": address})
        facts = instance.port(asked, is_running=False, directory=tmp_path)

    assert ("Address already in use", True) == (facts.error, str(os.getpid()) in facts.holder)
    assert "" == instance.port(asked, is_running=False, directory=tmp_path).error


@pytest.mark.parametrize("is_stale", [True, False])
def test_a_unix_socket_is_tried_without_being_touched(tmp_path: Path, is_stale: bool) -> None:
    """One that a killed daemon left is free, one that is served is not."""
    path = tmp_path / "s"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    if is_stale:
        server.close()

    facts = instance.port(settings(tmp_path, server={"listen": f"unix:{path}"}), is_running=False, directory=tmp_path)

    server.close()
    assert ("" if is_stale else "Address already in use") == facts.error
    assert path.exists()


@pytest.mark.parametrize(("name", "error"), [("none/s", "does not exist"), ("file", "File exists")])
def test_a_unix_socket_needs_its_folder(tmp_path: Path, name: str, error: str) -> None:
    """Which is not made here."""
    write(tmp_path / "file", "")

    assert (
        error in instance.port(settings(tmp_path, server={"listen": f"unix:{tmp_path}/{name}"}), is_running=False).error
    )


def test_two_files_with_one_port_are_told(tmp_path: Path) -> None:
    """A file that cannot be read is no rival, nor is the file itself."""
    for name, text in {
        "qwen": 'model = "a"\n',
        "llama": 'model = "b"\n',
        "other": 'model = "c"\n[server]\nlisten = "127.0.0.1:8001"\n',
        "bad": "?",
    }.items():
        write(tmp_path / f"{name}.toml", text)

    assert (str(tmp_path / "llama.toml"),) == instance.port(
        settings(tmp_path), is_running=False, directory=tmp_path
    ).rivals


def test_the_model_is_looked_at(tmp_path: Path) -> None:
    """A folder with its size; a name of the hub with its cache."""
    write(tmp_path / "model/a.safetensors", "x" * 10)
    write(tmp_path / "model/a.bin", "x" * 1000)
    (tmp_path / "hub/models--a--b/snapshots").mkdir(parents=True)
    environ = {"HF_HUB_CACHE": str(tmp_path / "hub")}

    assert 10 == instance.model(settings(tmp_path), (), {}).weight_bytes
    assert not instance.model(settings(tmp_path, model=str(tmp_path / "none")), (), {}).exists
    assert instance.model(settings(tmp_path, model="a/b"), (), environ).is_cached
    assert not instance.model(settings(tmp_path, model="a/c"), (), environ).is_cached


def test_what_a_file_asks_of_gpus_is_read(tmp_path: Path) -> None:
    """Ways of parallelism multiply; what is not a number is vLLM's to refuse."""
    engine = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "data_parallel_size": "x",
        "gpu_memory_utilization": 0.5,
    }

    asked = instance.wish(settings(tmp_path, engine=engine, gpu={"devices": (1, 2)}))

    assert ((1, 2), 6, 6, 0.5) == (asked.devices, asked.world, asked.shards, asked.utilization)
    assert (4, 2) == (
        (twice := instance.wish(settings(tmp_path, engine={"tensor_parallel_size": 2, "data_parallel_size": 2}))).world,
        twice.shards,
    )


# The frame.
def test_a_check_that_fails_or_hangs_costs_no_other() -> None:
    """It becomes a finding, with the reason; what it had found until then is kept."""
    is_over = threading.Event()

    def fails() -> Iterator[Any]:
        yield good("half", "seen")
        raise OSError(5, "Input/output error")

    def hangs() -> list[Any]:
        is_over.wait(30)
        return []

    begun = time.monotonic()
    (_, failed), (_, hung), (_, fine) = checks.run([
        Check("failing", "F", fails),
        Check("hanging", "H", hangs, timeout_s=0.2),
        Check("fine", "G", lambda: [good("fine", "yes")]),
    ])  # fmt: skip
    is_over.set()

    assert time.monotonic() - begun < patient(5)
    assert [("half", State.good), ("failing", State.not_known)] == [(each.check, each.state) for each in failed]
    assert "OSError: [Errno 5] Input/output error" in failed[1].found
    assert [("hanging", State.not_known, "no answer within 0.2 s")] == [
        (each.check, each.state, each.found) for each in hung
    ]
    assert [good("fine", "yes")] == fine


def test_every_check_of_this_machine_answers() -> None:
    """None fails here, whoever runs it; none finds nothing but where there is nothing."""
    found = dict(checks.run(checks.of_machine()))

    assert not [each for findings in found.values() for each in findings if "could not be looked at" in each.found]
    assert {"GPUs", "Between the GPUs"} >= {title for title, findings in found.items() if not findings}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
