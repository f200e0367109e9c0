"""What `llm-serve plan` is made for, before vLLM is asked: the GPUs named, those at hand, or the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from llm_serve.cli import plan as command
from llm_serve.core.errors import HostError
from llm_serve.core.evidence import Holder
from llm_serve.core.footprint import Gpus, parse_gpus, usable_bytes
from llm_serve.core.settings import GpuSettings, Settings
from llm_serve.host.nvml import Gpu, NoGpus

GIB = 1 << 30
H200 = Gpu(0, "GPU-0", "NVIDIA H200", "00000000:00:00.0", 140 * GIB, (9, 0))
L4 = Gpu(1, "GPU-1", "NVIDIA L4", "00000000:01:00.0", 24 * GIB, (8, 9))
OLD = Gpu(2, "GPU-2", "NVIDIA ?", "00000000:02:00.0", 24 * GIB)


class Found(NoGpus):
    """A machine with these GPUs, one of them in use."""

    def __init__(self, *found: Gpu) -> None:
        super().__init__("" if found else "NVIDIA's driver is not installed")
        self.found, self.is_closed = found, False

    def devices(self) -> tuple[Gpu, ...]:
        return self.found

    def holders(self, indices: Any, *, without: Any) -> tuple[Holder, ...]:
        held = (Holder(0, 4242, "python", 3 * GIB), Holder(1, 4343, "python", GIB))
        return tuple(holder for holder in held if holder.gpu in indices)

    def close(self) -> None:
        self.is_closed = True


def settings(*devices: int) -> Settings:
    return Settings(name="a", source="a.toml", model="m", gpu=GpuSettings(devices=devices or None))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put GPUs into the machine, and a build of vLLM."""

    def of(*found: Gpu, cpu_build: bool = False) -> Found:
        library = Found(*found)
        monkeypatch.setattr(command, "open_gpus", lambda: library)
        monkeypatch.setattr(command, "_is_cpu_build", lambda: cpu_build)
        return library

    return of


def test_gpus_that_are_spoken_of_win_over_those_at_hand(machine: Any) -> None:
    machine(H200)
    target, notes = command._target(settings(), parse_gpus("4x24GiB"))
    assert target.gpus == parse_gpus("4x24GiB")
    assert target.source == "--gpu"
    assert "9.0" in notes[0]


def test_the_gpus_at_hand_are_taken_as_they_are_and_let_go(machine: Any) -> None:
    library = machine(H200)
    target, notes = command._target(settings(), None)
    assert target.gpus == Gpus(1, usable_bytes(140 * GIB), "NVIDIA H200", (9, 0))
    assert notes == ["python (pid 4242) holds 3.0 GiB of GPU 0: the plan is made for a GPU of its own"]
    assert library.is_closed


def test_of_unlike_gpus_the_smallest_decides(machine: Any) -> None:
    machine(H200, L4)
    target, _ = command._target(settings(), None)
    assert target.gpus == Gpus(2, usable_bytes(24 * GIB), "NVIDIA L4", (8, 9))


def test_the_file_chooses_among_the_gpus(machine: Any) -> None:
    machine(H200, L4, OLD)
    target, notes = command._target(settings(2), None)
    assert target.gpus == Gpus(1, usable_bytes(24 * GIB), "NVIDIA ?", (9, 0))
    assert notes == []


@pytest.mark.parametrize("cpu_build", [False, True])
def test_a_gpu_that_the_file_names_and_that_is_missing_is_no_reason_to_plan_for_another(
    machine: Any, cpu_build: bool
) -> None:
    library = machine(H200, cpu_build=cpu_build)
    with pytest.raises(HostError, match=r"GPU 3, which is not here: plan for others with --gpu"):
        command._target(settings(0, 3), None)
    assert library.is_closed


def test_without_gpus_a_build_for_them_says_why_and_a_build_for_cpus_plans_for_the_cpu(machine: Any) -> None:
    machine()
    with pytest.raises(HostError, match=r"driver is not installed: plan for one with --gpu 24GiB"):
        command._target(settings(), None)
    machine(cpu_build=True)
    target, notes = command._target(settings(), None)
    assert (target.gpus, notes) == (None, [])


def test_a_build_for_cpus_passes_no_gpu_over_in_silence(machine: Any) -> None:
    machine(H200, cpu_build=True)
    target, notes = command._target(settings(), None)
    assert target.gpus is None
    assert "built for CPUs" in notes[0]
