"""Which NUMA nodes an engine is bound to, read from the kernel's files as machines of many kinds have them.

This machine has one node and no GPU: the files are hand-made.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.host.nvml import Gpu
from llm_serve.host.placement import Placement, numbers, place


def gpu(index: int, bus: str) -> Gpu:
    """A GPU in that slot."""
    return Gpu(index, f"GPU-{index}", "NVIDIA H200", f"00000000:{bus}:00.0", 1 << 37)


FIRST, SECOND = gpu(0, "1B"), gpu(1, "AB")
CPUS = ",".join(map(str, sorted(os.sched_getaffinity(0))))
"""Those that this process may use."""


class Machine:
    """The kernel's files of a machine with these nodes (their CPUs) and slots (the node of each)."""

    def __init__(self, folder: Path) -> None:
        self.system, self.status = folder / "sys", folder / "status"

    def has(self, nodes: dict[int, str], slots: dict[str, str], allowed: str = "0-63") -> Machine:
        """Write them."""
        top = self.system / "devices/system/node"
        for node, cpus in nodes.items():
            (top / f"node{node}").mkdir(parents=True)
            (top / f"node{node}/cpulist").write_text(f"{cpus}\n")
        (top / "has_cpu").write_text(",".join(str(node) for node, cpus in nodes.items() if cpus) + "\n")
        for address, node_of in slots.items():
            slot = self.system / f"bus/pci/devices/{address}"
            slot.mkdir(parents=True)
            (slot / "numa_node").write_text(f"{node_of}\n")
        self.status.write_text(f"Name:\tllm-serve\nMems_allowed:\t3\nMems_allowed_list:\t{allowed}\n")
        return self

    def place(self, *gpus: Gpu) -> Placement:
        """Where an engine on these GPUs runs."""
        return place(gpus, system=self.system, status=self.status)


@pytest.fixture(autouse=True)
def _numactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is there, and is not run."""
    (tmp_path / "numactl").touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One without files yet."""
    return Machine(tmp_path)


TWO = {0: CPUS, 1: CPUS}
SLOTS = {"0000:1b:00.0": "0", "0000:ab:00.0": "1"}


def test_each_gpu_has_the_node_of_its_slot(machine: Machine) -> None:
    """In the order of the file, with the GPUs by names that cannot shift."""
    placed = machine.has(TWO, SLOTS).place(SECOND, FIRST)

    assert ((1, 0), "") == (placed.nodes, placed.why_unbound)
    assert {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-0"} == placed.env
    assert (
        "GPU 1 NVIDIA H200 (GPU-1 at 00000000:AB:00.0, NUMA node 1), "
        "GPU 0 NVIDIA H200 (GPU-0 at 00000000:1B:00.0, NUMA node 0)"
    ) == str(placed)


def test_two_gpus_may_hang_on_one_node(machine: Machine) -> None:
    """vLLM wants an entry for each."""
    assert (1, 1) == machine.has(TWO, dict.fromkeys(SLOTS, "1")).place(FIRST, SECOND).nodes


@pytest.mark.parametrize("nodes", [{0: CPUS}, {0: CPUS, 1: "", 2: ""}], ids=["one", "those of the GPUs' own memory"])
def test_with_one_node_of_cpus_nothing_is_bound_and_nothing_said(machine: Machine, nodes: dict[int, str]) -> None:
    """There is nowhere else to be."""
    placed = machine.has(nodes, SLOTS).place(FIRST)

    assert ((), "") == (placed.nodes, placed.why_unbound)
    assert "GPU 0 NVIDIA H200 (GPU-0 at 00000000:1B:00.0)" == str(placed)


@pytest.mark.parametrize(
    ("nodes", "slots", "allowed", "why"),
    [
        pytest.param(TWO, {}, "0-1", "the kernel does not tell which NUMA node GPU 1 hangs on", id="no file"),
        pytest.param(TWO, SLOTS | {"0000:1b:00.0": "-1"}, "0-1", "the kernel does not tell", id="firmware without"),
        pytest.param(TWO, SLOTS | {"0000:1b:00.0": "x"}, "0-1", "the kernel does not tell", id="no number"),
        pytest.param({0: CPUS, 1: CPUS, 2: ""}, SLOTS | {"0000:1b:00.0": "2"}, "0-2", "node 2, on which GPU 0 hangs, has no CPUs", id="memory alone"),
        pytest.param({0: "900-931", 1: CPUS}, SLOTS, "0-1", "has none of the CPUs that this process may use", id="CPUs of another cpuset"),
        pytest.param(TWO, SLOTS, "1", "NUMA node 0, on which GPU 0 hangs, has no memory that this process may use", id="memory of another cpuset"),
    ],
)  # fmt: skip
def test_where_binding_is_impossible_the_reason_is_said(
    machine: Machine, nodes: dict[int, str], slots: dict[str, str], allowed: str, why: str
) -> None:
    """And the GPUs are the same: nothing here keeps an engine from starting."""
    placed = machine.has(nodes, slots, allowed).place(SECOND, FIRST)

    assert () == placed.nodes
    assert why in placed.why_unbound
    assert {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-0"} == placed.env


def test_without_numactl_nothing_is_bound(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is more than one node the missing program is the reason; else there is nothing to miss."""
    monkeypatch.setenv("PATH", "/nonexistent")

    assert "numactl, by which vLLM tries it, is not installed" == machine.has(TWO, SLOTS).place(FIRST).why_unbound
    assert "" == place([FIRST], system=machine.system / "none").why_unbound


def test_where_the_kernel_tells_nothing_nothing_is_bound(machine: Machine) -> None:
    """A container without /sys, or another kernel."""
    assert Placement((FIRST,)) == machine.place(FIRST)


def test_the_default_sees_everything_and_binds_nothing() -> None:
    """What an engine has whose file names no devices."""
    assert ({}, (), "") == (Placement().env, Placement().nodes, str(Placement()))


def test_this_machine_can_be_asked() -> None:
    """The real files are read without an error."""
    assert (FIRST,) == place([FIRST]).gpus


@given(st.frozensets(st.integers(0, 300)))
def test_the_kernels_lists_are_understood(wanted: frozenset[int]) -> None:
    """Ranges and single numbers, in the kernel's spelling."""
    parts: list[str] = []
    rest = sorted(wanted)
    while rest:
        length = next((n for n, number in enumerate(rest) if number != rest[0] + n), len(rest))
        parts.append(f"{rest[0]}-{rest[length - 1]}" if length > 1 else str(rest[0]))
        rest = rest[length:]

    assert wanted == numbers(",".join(parts))


@given(st.text(max_size=20))
def test_what_is_no_list_has_no_numbers(text: str) -> None:
    """And raises nothing."""
    assert all(number >= 0 for number in numbers(text))
