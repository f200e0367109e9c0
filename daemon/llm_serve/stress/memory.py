"""Parts that fill most of the memory: whether it can be had, and whether it keeps what is written to it.

Blocks are of 64-bit words. A place told here is one in the allocated memory, counted from its first block on: where
that lies in the chips only the driver knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from llm_serve.core.stress import Found, Part
from llm_serve.stress.rig import Rig

_WORD_BYTES = 8
_SPARE_BLOCKS = 2
"""For what a block is compared with, and for the result of that."""
_MOST_NOTES = 8
_FULL = 1 << 64


def _signed(word: int) -> int:
    """As torch writes 64 bits."""
    return word - _FULL if word >= _FULL >> 1 else word


_CONSTANTS = {
    "zeros": 0,
    "ones": _signed(_FULL - 1),
    "0xAA": _signed(0xAAAAAAAAAAAAAAAA),
    "0x55": 0x5555555555555555,
}
_INVERTED = 0x00FF00FF00FF00FF


# Allocate and free.
def allocation(rig: Rig) -> Found:
    """Take 1, 2, 4 and so on blocks up to most of the memory, with holes, mark each, and give all back."""
    most = rig.budget_bytes() // rig.sizes.block_bytes
    if not most:
        return _no_room(rig, Part.allocation)
    rounds = [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
    found, whole = Found(Part.allocation), sum(count + (count + 1) // 2 for count in rounds)
    for count in rounds:
        for now in _fill_and_free(rig, count, found):
            found = now
            rig.tell(found.iterations / whole, found)
            if rig.is_stopped():
                return replace(found, is_cut=True)
        rig.release()
    return found


def _fill_and_free(rig: Rig, count: int, found: Found) -> Iterator[Found]:
    """Blocks, then every second one anew; each has to keep its mark."""
    blocks: list[Any] = []
    for number in range(count):
        blocks.append(_marked(rig, number))
        yield (found := _taken(found, rig, number + 1))
    for number in range(0, count, 2):
        blocks[number] = None
    rig.release()
    for number in range(0, count, 2):
        blocks[number] = _marked(rig, number)
        yield (found := _taken(found, rig, count))
    for number, block in enumerate(blocks):
        rig.touch(Part.allocation, block)
        if block[0].item() != number or block[-1].item() != number:
            note = f"block {number} of {count} has lost its mark"
            found = replace(found, errors=found.errors + 1, notes=(*found.notes, note)[:_MOST_NOTES])
    yield found


def _marked(rig: Rig, number: int) -> Any:
    block = torch.empty(rig.sizes.block_bytes // _WORD_BYTES, dtype=torch.int64, device=rig.device)
    block[0] = block[-1] = number
    return block


def _taken(found: Found, rig: Rig, count: int) -> Found:
    held = count * rig.sizes.block_bytes
    return replace(found, iterations=found.iterations + 1, allocated_bytes=max(held, found.allocated_bytes))


def _no_room(rig: Rig, part: Part) -> Found:
    return Found(part, error=f"not even {rig.sizes.block_bytes >> 20} MiB of memory are free")


# Integrity.
@dataclass(slots=True)
class _Blocks:
    """The memory under test, and what has been wrong in it so far."""

    rig: Rig
    each: list[Any]
    errors: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self, pattern: str, number: int, expected: Any) -> None:
        """Compare a block with a word, or with a block of words."""
        block = self.each[number]
        self.rig.touch(pattern, block)
        wrong = block != expected
        if not (count := int(torch.count_nonzero(wrong))):
            return
        self.errors += count
        place = int(wrong.nonzero()[0])
        if len(self.notes) < _MOST_NOTES:
            meant = int(expected[place]) if isinstance(expected, torch.Tensor) else expected
            bits = (int(block[place]) ^ meant) % _FULL
            at = (number * len(block) + place) * _WORD_BYTES
            self.notes.append(f"{pattern}: {count} in block {number}, as at byte {at:#x}, bits {bits:#x}")


def memory(rig: Rig) -> Found:
    """Fill most of the memory with one pattern after the other, and read it back, `sizes.passes` times."""
    size = rig.sizes.block_bytes
    count = rig.budget_bytes() // size - _SPARE_BLOCKS
    if count < 1:
        return _no_room(rig, Part.memory)
    blocks = _Blocks(
        rig, [torch.empty(size // _WORD_BYTES, dtype=torch.int64, device=rig.device) for _ in range(count)]
    )
    patterns = _patterns()
    found = Found(Part.memory, allocated_bytes=count * size)
    steps = rig.sizes.passes * sum(sweeps for _, sweeps, _ in patterns) * count
    done = 0
    for _ in range(rig.sizes.passes):
        for name, _, write_and_check in patterns:
            for _ in write_and_check(name, blocks):
                done += 1
                found = replace(found, errors=blocks.errors, notes=tuple(blocks.notes))
                rig.tell(done / steps, found)
                if rig.is_stopped():
                    return replace(found, is_cut=True)
            found = replace(found, iterations=found.iterations + 1)
    return found


_Sweeps = Callable[[str, _Blocks], Iterator[None]]


def _patterns() -> list[tuple[str, int, _Sweeps]]:
    """The name of each, how often it goes over the memory, and how; it yields after each block."""
    constants: list[tuple[str, int, _Sweeps]] = [
        (name, 2, partial(_written_and_read, partial(_constant, word))) for name, word in _CONSTANTS.items()
    ]
    return [
        *constants,
        ("address", 2, partial(_written_and_read, _addresses)),
        ("random", 2, partial(_written_and_read, _random)),
        ("moving inversions", 3, _moving_inversions),
    ]


def _written_and_read(words: Callable[[Any, int], Any], name: str, blocks: _Blocks) -> Iterator[None]:
    """All is written before anything is read, so that a write to a wrong address is seen."""
    for number, block in enumerate(blocks.each):
        expected = words(block, number)
        block.copy_(expected) if isinstance(expected, torch.Tensor) else block.fill_(expected)
        yield
    for number, block in enumerate(blocks.each):
        blocks.check(name, number, words(block, number))
        yield


def _constant(word: int, _block: Any, _number: int) -> int:
    return word


def _addresses(block: Any, number: int) -> Any:
    """Every word is its own place."""
    return torch.arange(number * len(block), (number + 1) * len(block), device=block.device)


def _random(block: Any, number: int) -> Any:
    """The same for the same block, every time."""
    seeded = torch.Generator(block.device).manual_seed(number)
    return torch.empty_like(block).random_(-(1 << 63), None, generator=seeded)


def _moving_inversions(name: str, blocks: _Blocks) -> Iterator[None]:
    """Upwards each word is read and inverted, and downwards again: a cell that a neighbour disturbs gives way."""
    for block in blocks.each:
        block.fill_(_INVERTED)
        yield
    for number, block in enumerate(blocks.each):
        blocks.check(name, number, _INVERTED)
        block.fill_(~_INVERTED)
        yield
    for number, block in reversed(list(enumerate(blocks.each))):
        blocks.check(name, number, ~_INVERTED)
        block.fill_(_INVERTED)
        yield
