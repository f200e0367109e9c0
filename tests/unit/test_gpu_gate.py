"""Waiting for GPUs and for their memory, with hand-made GPUs: there is none where these tests run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llm_serve.core.errors import HostError
from llm_serve.core.evidence import Holder
from llm_serve.host import gpu_gate
from llm_serve.host.gpu_gate import wait_for_gpus, wait_for_memory
from llm_serve.host.nvml import Gpu, GpuMemory, Gpus, NoGpus
from tests.patience import patient

GIB = 1 << 30
NOBODY = 1 << 30
LONG_S = 30.0
SHORT_S = 0.1
H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that nothing takes long."""
    monkeypatch.setattr(gpu_gate, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(gpu_gate, "_SAMPLE_EVERY_S", 0.01)
    monkeypatch.setattr(gpu_gate, "_PATIENCE_S", 0.05)


@dataclass
class FakeGpus(NoGpus):
    """GPUs by index, whose memory goes through the used bytes given, the last of which stays."""

    indices: tuple[int, ...] = (0,)
    used: list[int] = field(default_factory=lambda: [0])
    held: tuple[Holder, ...] = ()
    reason: str = ""
    is_permanent: bool = False
    hangs: threading.Event | None = None
    asked_without: list[set[int]] = field(default_factory=list)
    samples: int = 0
    told: tuple[str, ...] = ()

    def devices(self) -> tuple[Gpu, ...]:
        return tuple(gpu(index) for index in self.indices)

    def memory(self, index: int) -> GpuMemory | None:
        if self.hangs:
            self.hangs.wait(LONG_S)
        if index not in self.indices:
            return None
        self.samples += 1
        used = self.used.pop(0) if len(self.used) > 1 else self.used[0]
        return GpuMemory(used, 100 * GIB - used, 100 * GIB)

    def holders(self, indices: Collection[int], *, without: Collection[int]) -> tuple[Holder, ...]:
        if self.hangs:
            self.hangs.wait(LONG_S)
        self.asked_without.append(set(without))
        return tuple(holder for holder in self.held if holder.gpu in indices and holder.pid not in without)

    def problems(self) -> tuple[str, ...]:
        return self.told


def gpu(index: int) -> Gpu:
    return Gpu(index, f"GPU-{index}", H200, f"00000000:{index:02X}:00.0", 100 * GIB)


class Looks:
    """What is seen, look after look; the last one stays."""

    def __init__(self, *seen: Gpus) -> None:
        self._seen = list(seen)
        self.count = 0

    def __call__(self) -> Gpus:
        self.count += 1
        return self._seen.pop(0) if len(self._seen) > 1 else self._seen[0]


def refuse(_: str) -> None:
    pytest.fail("nothing was to be told")


# At boot.
@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ((0,), None, [0]),
        ((0, 1, 2), None, [0, 1, 2]),
        ((0, 1, 2), (2, 0), [2, 0]),
        ((0, 2), (2,), [2]),
        ((0, 1, 2), ("GPU-2", "GPU-0"), [2, 0]),
        ((0, 1, 2), ("00000000:01:00.0",), [1]),
        ((0, 1, 26), ("00000000:1A:00.0", 1, "GPU-0"), [26, 1, 0]),
    ],
)
async def test_gpus_that_are_there_are_returned_at_once(
    there: tuple[int, ...], wanted: tuple[int | str, ...] | None, expected: list[int]
) -> None:
    """Those that are wanted, by whatever name and in that order, or all; nothing is told."""
    look = Looks(FakeGpus(there))

    found = await wait_for_gpus(look, wanted, is_needed=True, timeout_s=LONG_S, tell=refuse, nodes=())

    assert expected == [each.index for each in found]
    assert 1 == look.count


async def test_where_none_is_needed_nobody_looks() -> None:
    """A machine without GPUs that serves on its CPU waits for nothing."""
    look = Looks(NoGpus("no driver"))

    assert () == await wait_for_gpus(look, None, is_needed=False, timeout_s=LONG_S, tell=refuse)
    assert 0 == look.count


async def test_a_gpu_by_number_is_needed_whatever_the_build() -> None:
    """Who names a GPU is never served without it."""
    with pytest.raises(HostError, match="no driver, after 0 s"):
        await wait_for_gpus(Looks(NoGpus("no driver")), (0,), is_needed=False, timeout_s=0, tell=lambda _: None)


async def test_each_new_reason_is_told_once(tmp_path: Path) -> None:
    """A boot, seen from the gate: no driver, no GPU, one GPU, both, and the device node at last."""
    node = tmp_path / "nvidia-uvm"
    no_driver, one, both = NoGpus("NVIDIA's driver is not loaded"), FakeGpus((0,)), FakeGpus((0, 1))
    look = Looks(no_driver, no_driver, no_driver, FakeGpus(()), one, one, both)
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        if str(node) in sentence:
            node.touch()

    found = await wait_for_gpus(look, (0, 1), is_needed=True, timeout_s=LONG_S, tell=tell, nodes=(node,))

    assert [0, 1] == [each.index for each in found]
    assert [
        "waiting: NVIDIA's driver is not loaded",
        "waiting: GPU 0, 1 is not there: the driver shows 0 GPUs (none)",
        "waiting: GPU 1 is not there: the driver shows 1 GPU (0 NVIDIA H200)",
        f"waiting: {node} is not there: the driver's module is not loaded whole (modprobe nvidia-uvm)",
    ] == told


async def test_in_the_end_it_says_what_was_seen_and_what_to_do() -> None:
    """Exit 75 comes with the GPUs that are there, the driver's word on the others, and where to look."""
    gpus = FakeGpus((0,), told=("GPU 1: GPU is lost",))

    with pytest.raises(HostError) as refusal:
        await wait_for_gpus(Looks(gpus), (1,), is_needed=True, timeout_s=SHORT_S, tell=lambda _: None, nodes=())

    assert (
        "GPU 1 is not there: the driver shows 1 GPU (0 NVIDIA H200); GPU 1: GPU is lost, after 0.1 s. Look at "
        "nvidia-smi and at the kernel log (journalctl -k -g NVRM). gpu.wait_timeout_s is how long a start waits."
    ) == str(refusal.value)


async def test_who_asks_by_uuid_is_shown_uuids() -> None:
    """And PCI addresses: whatever is wrong with the name can be seen."""
    with pytest.raises(HostError) as refusal:
        await wait_for_gpus(Looks(FakeGpus((0, 3))), ("GPU-7",), is_needed=True, timeout_s=0, tell=lambda _: None)

    assert (
        "GPU 7 is not there: the driver shows 2 GPUs (0 NVIDIA H200 GPU-0 at 00000000:00:00.0, "
        "3 NVIDIA H200 GPU-3 at 00000000:03:00.0)"
    ) in str(refusal.value)


async def test_the_last_look_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that takes a moment to answer is not said to be silent because the limit is near."""
    monkeypatch.setattr(gpu_gate, "_LOOK_EVERY_S", 5.0)
    monkeypatch.setattr(gpu_gate, "_PATIENCE_S", 5.0)

    def look() -> Gpus:
        time.sleep(0.05)
        return NoGpus("NVIDIA's driver is not loaded")

    with pytest.raises(HostError, match="is not loaded, after 0 s"):
        await wait_for_gpus(look, None, is_needed=True, timeout_s=0, tell=lambda _: None, nodes=())


async def test_what_no_waiting_cures_ends_at_once() -> None:
    """After an update under the running driver only a reboot helps."""
    reason = "NVIDIA's library was updated under the running driver (driver/library version mismatch): reboot"
    look = Looks(NoGpus(reason, is_permanent=True))

    with pytest.raises(HostError, match=r"mismatch\): reboot\. Waiting does not help\."):
        await wait_for_gpus(look, None, is_needed=True, timeout_s=LONG_S, tell=refuse)
    assert 1 == look.count


async def test_a_driver_that_hangs_holds_up_nothing() -> None:
    """The loop goes on, it is told, nobody asks a second time, and the time limit holds."""
    released, beats, told = threading.Event(), 0, list[str]()

    def look() -> Gpus:
        told.append("asked")
        released.wait(LONG_S)
        return FakeGpus((0,))

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    with pytest.raises(HostError, match=r"does not answer, after 0\.3 s"):
        await wait_for_gpus(look, None, is_needed=True, timeout_s=0.3, tell=told.append, nodes=())
    beating.cancel()
    released.set()

    assert beats > 5
    assert ["asked", "waiting: NVIDIA's driver does not answer"] == told


async def test_a_driver_that_is_slow_is_waited_for() -> None:
    """To wake a GPU takes seconds: what comes late still counts, and is asked for once."""
    count = 0

    def look() -> Gpus:
        nonlocal count
        count += 1
        time.sleep(0.15)
        return FakeGpus((0,))

    found = await wait_for_gpus(look, None, is_needed=True, timeout_s=LONG_S, tell=lambda _: None, nodes=())

    assert ([0], 1) == ([each.index for each in found], count)


async def test_a_stop_is_obeyed_while_it_waits() -> None:
    """Cancelled, it ends at once, also in the middle of a call into the driver."""
    released = threading.Event()

    def hang() -> Gpus:
        released.wait(LONG_S)
        return NoGpus("late")

    for look in (Looks(NoGpus("no driver")), hang):
        waiting = asyncio.create_task(
            wait_for_gpus(look, None, is_needed=True, timeout_s=LONG_S, tell=lambda _: None, nodes=())
        )
        await asyncio.sleep(0.03)
        waiting.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert time.monotonic() - began < patient(1)
    released.set()


async def test_an_error_of_the_look_is_not_swallowed() -> None:
    """It is raised where it was asked for, and does not leave a wait without an end."""

    def look() -> Gpus:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await wait_for_gpus(look, None, is_needed=True, timeout_s=LONG_S, tell=refuse)


# After an engine.
async def back(
    gpus: Gpus,
    indices: Collection[int] = (0,),
    *,
    needed: int | None = None,
    own: Collection[int] = (),
    timeout_s: float = LONG_S,
    tell: Callable[[str], None] = refuse,
) -> tuple[Holder, ...]:
    return await wait_for_memory(gpus, indices, needed_free_bytes=needed, own_pids=own, timeout_s=timeout_s, tell=tell)


async def test_memory_is_back_when_it_stands_still() -> None:
    """While it still falls, it is not; two equal samples end the wait."""
    gpus = FakeGpus(used=[90 * GIB, 60 * GIB, 30 * GIB, GIB, GIB])

    assert () == await back(gpus)
    assert 5 == gpus.samples


async def test_memory_that_is_needed_must_be_free() -> None:
    """Standing still is not enough when more is asked for."""
    gpus = FakeGpus(used=[60 * GIB] * 5 + [10 * GIB] * 2)

    assert () == await back(gpus, needed=80 * GIB)
    assert 7 == gpus.samples


async def test_every_gpu_counts() -> None:
    """One that still falls holds up all; one that does not answer is not waited for."""
    gpus = FakeGpus((0, 1), used=[1, 50, 1, 40, 1, 30, 1, 30])

    assert () == await back(gpus, (0, 1, 7))
    assert 8 == gpus.samples


async def test_in_the_end_those_who_hold_it_are_named() -> None:
    """It is told, and returned without raising; our own processes are not among them."""
    other, own = Holder(0, NOBODY, "trainer", 70 * GIB), Holder(0, NOBODY + 1, "python3", 1 * GIB)
    gpus = FakeGpus(used=[71 * GIB], held=(other, own))
    told: list[str] = []

    assert (other,) == await back(gpus, needed=80 * GIB, own={NOBODY + 1}, timeout_s=SHORT_S, tell=told.append)
    assert [f"GPU memory is not back after 0.1 s: trainer (pid {NOBODY}) holds 70.0 GiB of GPU 0"] == told
    assert {NOBODY + 1} == gpus.asked_without[-1]


async def test_memory_that_nobody_holds_is_told_too() -> None:
    """A driver that leaks, or hides other containers' processes, names nobody."""
    told: list[str] = []

    assert () == await back(FakeGpus(used=[71 * GIB]), needed=80 * GIB, timeout_s=SHORT_S, tell=told.append)
    assert ["GPU memory is not back after 0.1 s: nobody that the driver names holds it"] == told


@pytest.fixture
def zombie() -> Iterator[int]:
    """The pid of a process that has ended and that nobody has collected."""
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield child.pid


async def test_a_process_that_ended_is_waited_for_while_it_holds_some(zombie: int) -> None:
    """Killed, it counts as gone before the driver has cleared up after it; its memory stands still meanwhile."""
    gpus = FakeGpus(used=[90 * GIB], held=(Holder(0, zombie, "VLLM::EngineCore", 90 * GIB),))
    waiting = asyncio.create_task(back(gpus))
    await asyncio.sleep(0.2)
    assert not waiting.done()

    gpus.held = ()
    assert () == await asyncio.wait_for(waiting, LONG_S)


async def test_who_lives_and_holds_some_is_not_waited_for() -> None:
    """Another service's memory stands still for ever; only what is needed decides."""
    held = (Holder(0, os.getpid(), "trainer", 9 * GIB), Holder(0, NOBODY, "another container's", 9 * GIB))

    assert () == await back(FakeGpus(used=[20 * GIB], held=held))


@pytest.mark.parametrize(
    ("gpus", "indices"), [(FakeGpus(reason="no driver"), (0,)), (FakeGpus(), ())], ids=["no GPUs", "none in use"]
)
async def test_without_gpus_there_is_nothing_to_wait_for(gpus: FakeGpus, indices: tuple[int, ...]) -> None:
    """Not even one sample is taken."""
    assert () == await back(gpus, indices, needed=GIB)
    assert 0 == gpus.samples


async def test_a_driver_that_hangs_is_given_up_on() -> None:
    """At the time limit it is told, and the daemon goes on."""
    gpus = FakeGpus(hangs=threading.Event())
    told: list[str] = []

    assert () == await back(gpus, timeout_s=SHORT_S, tell=told.append)
    assert ["GPU memory is not back after 0.1 s: NVIDIA's driver does not answer"] == told
    assert gpus.hangs
    gpus.hangs.set()


async def test_a_stop_is_obeyed_while_memory_is_waited_for() -> None:
    """Cancelled, it ends at once."""
    waiting = asyncio.create_task(back(FakeGpus(used=[90 * GIB]), needed=80 * GIB))
    await asyncio.sleep(0.05)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 1)
