"""The six tests of `stress`, each one really run.

There is no GPU where these tests run: the device is torch's CPU, and everything is small. A fault is a bit that is flipped
in a tensor between its writing and its checking. The same code was run on a real GPU by tests/gpu/stress.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from llm_serve.core.stress import Found, Part, Progress, Sizes
from llm_serve.stress import child
from llm_serve.stress.memory import memory
from llm_serve.stress.operations import _TABLE
from llm_serve.stress.products import Count, Product
from llm_serve.stress.rig import Rig
from tests.patience import patient
from tests.stress_machine import MIB, TINY

QUICK = replace(TINY, load_s=0.15, short_s=0.05, matrix=128)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}


class Machine:
    """A device that remembers what it was told, and may flip one bit of one tensor."""

    def __init__(self, what: str = "", at: int = 0, bit: int = 0, place: int = 0) -> None:
        self.told: list[Progress] = []
        self.touched: list[str] = []
        self._what, self._at, self._bit, self._place = what, at, bit, place

    def touch(self, what: str, tensor: Any) -> None:
        """Flip the bit in the tensor that is the `at`th of its kind."""
        self.touched.append(what)
        if what == self._what and self.touched.count(what) == self._at + 1:
            tensor.view(_WORDS[tensor.element_size()]).view(-1)[self._place] ^= 1 << self._bit

    def rig(self, sizes: Sizes = QUICK, is_stopped: Callable[[], bool] = lambda: False) -> Rig:
        """The device as a part sees it."""
        return Rig(torch.device("cpu"), sizes, self.told.append, is_stopped, self.touch)

    def run(self, part: Part, sizes: Sizes = QUICK) -> Found:
        """One part."""
        return child.attempt(part, self.rig(sizes))


@pytest.mark.parametrize("part", Part)
def test_a_sound_device_passes(part: Part) -> None:
    """Nothing is wrong, something was done, and it was told how far it was."""
    machine = Machine()

    found = machine.run(part)

    assert (part, 0, "", (), False) == (found.part, found.errors, found.error, found.notes, found.is_cut)
    assert found.iterations > 0
    assert found.allocated_bytes > 0
    assert found.seconds > 0
    shares = [progress.share for progress in machine.told]
    assert shares, "it told nothing"
    assert all(0 <= first <= second <= 1 for first, second in pairwise(shares))


def test_speed_is_told_for_each_format() -> None:
    """On the CPU there is no TF32, and what was measured is above nothing."""
    assert {"fp16"} == Machine().run(Part.matmul).tflops.keys() == Machine().run(Part.load).tflops.keys()
    rates = Machine().run(Part.precision).tflops
    assert ["fp32", "fp16", "bf16"] == list(rates)
    assert all(rate > 0 for rate in rates.values())


def test_speed_is_operations_by_seconds() -> None:
    """2 n^3 for each product: 8192 in fp16, 63 of them in a second, are 69.3 TFLOPS."""
    product = Product(Machine().rig(), Part.matmul, torch.float16)
    product._size = 8192

    assert pytest.approx(69.27, abs=0.01) == product.tflops(Count(iterations=126, busy_s=2.0))
    found = Machine().run(Part.load)
    assert found.tflops["fp16"] > 2 * QUICK.matrix**3 * found.iterations / found.seconds / 1e12


PATTERNS = ("zeros", "ones", "0xAA", "0x55", "address", "random", "moving inversions")


def test_a_bit_that_memory_loses_is_found_and_located_in_every_pattern() -> None:
    """One in the third block, whatever pattern it is."""
    machine = Machine()

    def flip(pattern: str, block: Any) -> None:
        machine.touched.append(pattern)
        if machine.touched.count(pattern) == 3:
            block[7] ^= 1 << 33

    found = child.attempt(Part.memory, replace(machine.rig(), touch=flip))

    where = (2 * MIB // 8 + 7) * 8
    assert len(PATTERNS) == found.errors == found.iterations
    assert (
        tuple(f"{pattern}: 1 in block 2, as at byte {where:#x}, bits {1 << 33:#x}" for pattern in PATTERNS)
        == found.notes
    )  # fmt: skip


def test_all_of_the_memory_is_read() -> None:
    """The first and the last word of every block: none goes unread."""

    def flip(pattern: str, block: Any) -> None:
        if pattern == "address":
            block[0] ^= 1
            block[-1] ^= 1 << 62

    found = child.attempt(Part.memory, replace(Machine().rig(), touch=flip))

    assert (12, 6 * MIB) == (found.errors, found.allocated_bytes)


def test_a_write_to_a_wrong_address_is_found() -> None:
    """A block that is another one in truth holds the other's words."""
    machine = Machine()
    rig = machine.rig()
    blocks: list[Any] = []

    def alias(what: str, block: Any) -> None:
        if what == "address":
            blocks.append(block)
            block.copy_(blocks[0])

    rig.touch = alias

    found = memory(rig)

    assert 5 * MIB // 8 == found.errors
    assert "address: 131072 in block 1" in found.notes[0]


@pytest.mark.parametrize("at", [0, 3])
def test_one_wrong_value_of_a_loaded_device_is_found(at: int) -> None:
    """However small: the last bit of one value of one product."""
    found = Machine(Part.load, at=at, bit=0, place=130).run(Part.load, replace(QUICK, load_s=0.4))

    assert 1 == found.errors
    assert "1 differ" in found.notes[0]


def test_where_a_product_differs_is_told() -> None:
    """Where it is the last one of its batch, as the first always is."""
    assert ("fp16, products 1 to 1: 1 differ, as at row 1, column 2",) == Machine(
        Part.load, place=130
    ).run(Part.load).notes  # fmt: skip


@pytest.mark.parametrize("part", [Part.matmul, Part.precision, Part.load])
def test_a_first_product_that_is_wrong_is_found(part: Part) -> None:
    """The CPU gets another one, and so do all the others."""
    found = Machine(f"{part} first", bit=14, place=5).run(part)

    assert found.errors >= 2
    assert "1 not as the CPU has them" in found.notes[0]


def test_a_format_that_always_rounds_wrong_is_found() -> None:
    """The same wrong bits in every product: only the CPU knows. Here 2 % are off everywhere."""
    machine = Machine()
    rig = machine.rig()
    rig.touch = lambda what, product: product.mul_(1.02)

    found = child.attempt(Part.precision, rig)

    assert "fp32: 13107" in found.notes[0] or found.errors > QUICK.matrix**2 // 2
    assert "not as the CPU has them" in found.notes[0]


@pytest.mark.parametrize(
    ("bit", "is_found"),
    [(-3, lambda tolerance: True), (0, lambda tolerance: not tolerance)],
    ids=["a bit of the exponent", "the last bit, where the result is exact"],
)
def test_every_operation_that_is_wrong_is_found(bit: int, is_found: Callable[[float], bool]) -> None:
    """One value in each of them."""

    def flip(what: str, result: Any) -> None:
        words = result.view(_WORDS[result.element_size()]).view(-1)
        words[9] ^= 1 << (0 if result.dtype == torch.bool else bit % (8 * result.element_size()))

    rig = Machine().rig()
    rig.touch = flip

    found = child.attempt(Part.operations, rig)

    wrong = [name for name, tolerance, _ in _TABLE if is_found(tolerance)]
    assert wrong == [note.partition(":")[0] for note in found.notes]
    assert (len(wrong), len(_TABLE)) == (found.errors, found.iterations)


def test_a_block_that_loses_its_mark_is_found() -> None:
    """While all of it is taken."""
    found = Machine(Part.allocation, at=12, bit=3).run(Part.allocation)

    assert (1, ("block 5 of 8 has lost its mark",)) == (found.errors, found.notes)
    assert 8 * MIB == found.allocated_bytes


@pytest.mark.parametrize("part", Part)
def test_a_stop_is_heard_in_every_part(part: Part) -> None:
    """At once; what was found until then stays."""
    calls: list[None] = []

    def is_stopped() -> bool:
        calls.append(None)
        return len(calls) > 1

    rig = Machine().rig(replace(QUICK, load_s=60, short_s=60), is_stopped)

    found = child.attempt(part, rig)

    assert (True, 0, "") == (found.is_cut, found.errors, found.error)
    assert found.seconds < patient(10)


def test_what_cannot_be_allocated_is_a_failed_part_in_the_systems_words() -> None:
    """A petabyte, really asked for. The next part goes on."""
    machine = Machine()
    sizes = replace(QUICK, block_bytes=1 << 50, device_bytes=1 << 53)

    found = machine.run(Part.memory, sizes)

    assert "allocate" in found.error
    assert "\n" not in found.error
    child.run([Part.memory, Part.operations], machine.rig(sizes))
    ended = [progress.found for progress in machine.told if progress.is_over]
    assert [(Part.memory, True), (Part.operations, False)] == [(each.part, bool(each.error)) for each in ended]


def test_no_room_at_all_is_said() -> None:
    """Where the memory is somebody else's."""
    for part in (Part.allocation, Part.memory):
        assert "not even 1 MiB of memory are free" == Machine().run(part, replace(QUICK, device_bytes=0)).error


def test_a_device_that_is_not_there_is_a_failed_part() -> None:
    """This torch has no CUDA; the words are its own."""
    rig = replace(Machine().rig(), device=torch.device("cuda:0"))

    assert "CUDA" in child.attempt(Part.matmul, rig).error
    assert rig.is_dead()
    assert not Machine().rig().is_dead()
