"""The part that does basic arithmetic, and compares with what the CPU gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from llm_serve.core.stress import Found, Part
from llm_serve.stress.rig import Rig

_SEED = 2
_SIDE = 256
_EXACT = 0.0
_ROUNDED = 1e-6
_APPROXIMATE = 1e-5
"""Relative: an elementary function is a few steps off, and a sum of positive numbers depends on its order."""


class Numbers(NamedTuple):
    """What is computed with: `x` and `y` are in 0.5 to 2, `i` and `j` any whole numbers."""

    x: Any
    y: Any
    i: Any
    j: Any


def _square(numbers: Any) -> Any:
    return numbers[: _SIDE * _SIDE].view(_SIDE, _SIDE)


_TABLE: tuple[tuple[str, float, Callable[[Numbers], Any]], ...] = (
    ("copy", _EXACT, lambda n: n.x.clone()),
    ("x + y", _ROUNDED, lambda n: n.x + n.y),
    ("x * y", _ROUNDED, lambda n: n.x * n.y),
    ("x / y", _ROUNDED, lambda n: n.x / n.y),
    ("x < y", _EXACT, lambda n: n.x < n.y),
    ("maximum", _EXACT, lambda n: torch.maximum(n.x, n.y)),
    ("sqrt", _ROUNDED, lambda n: n.x.sqrt()),
    ("exp", _APPROXIMATE, lambda n: n.x.exp()),
    ("log", _APPROXIMATE, lambda n: (n.x + 1).log()),
    ("tanh", _APPROXIMATE, lambda n: n.x.tanh()),
    ("x in fp16", _EXACT, lambda n: n.x.half()),
    ("x + y in fp64", _ROUNDED, lambda n: n.x.double() + n.y.double()),
    ("sums", _APPROXIMATE, lambda n: n.x.view(-1, _SIDE).sum(1)),
    ("softmax", _APPROXIMATE, lambda n: n.x.view(-1, _SIDE).softmax(1)),
    (
        "matmul",
        _APPROXIMATE,
        lambda n: _square(n.x) @ _square(n.y),
    ),
    ("i + j", _EXACT, lambda n: n.i + n.j),
    ("i * j", _EXACT, lambda n: n.i * n.j),
    ("i // j", _EXACT, lambda n: n.i // (n.j | 1)),
    ("i xor j", _EXACT, lambda n: n.i ^ n.j),
    ("shift", _EXACT, lambda n: n.i >> 3),
    ("cumulated sum", _EXACT, lambda n: n.i.cumsum(0)),
    ("sort", _EXACT, lambda n: n.i.sort().values),
    ("gather", _EXACT, lambda n: n.x[n.j.remainder(len(n.x))]),
)
"""What is computed, how far it may be off, and how."""


def operations(rig: Rig) -> Found:
    """Every operation once, on `sizes.elements` numbers."""
    numbers = torch.Generator().manual_seed(_SEED)
    count = rig.sizes.elements
    given = Numbers(
        *(torch.rand(count, generator=numbers) * 1.5 + 0.5 for _ in range(2)),
        *(torch.randint(-(1 << 40), 1 << 40, (count,), generator=numbers) for _ in range(2)),
    )
    there = Numbers(*(tensor.to(rig.device) for tensor in given))
    found = Found(Part.operations)
    for number, (name, tolerance, operation) in enumerate(_TABLE, 1):
        if rig.is_stopped():
            return replace(found, is_cut=True)
        result = operation(there)
        rig.touch(name, result)
        wrong = _wrong(result.cpu(), operation(given), tolerance)
        found = replace(
            found,
            iterations=number,
            errors=found.errors + wrong,
            allocated_bytes=max(found.allocated_bytes, _bytes(*there, result)),
            notes=(*found.notes, *([f"{name}: {wrong} of {result.numel()}"] if wrong else [])),
        )
        rig.tell(number / len(_TABLE), found)
    return found


def _wrong(got: Any, expected: Any, tolerance: float) -> int:
    """How many values are off; one that is no number is."""
    if not tolerance:
        return int((got != expected).sum())
    return int((~((got - expected).abs() <= tolerance * expected.abs())).sum())


def _bytes(*tensors: Any) -> int:
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)
