"""Parts that multiply matrices: how fast, whether right, and whether the same every time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llm_serve.core.stress import Found, Part
from llm_serve.stress.rig import Rig

_BATCH_S = 0.1
_MOST_IN_BATCH = 1000
_ROWS = 128
_MOST_NOTES = 4
_WORDS = {2: torch.int16, 4: torch.int32}
_TF32_STEP = 2.0**-10
_SEED = 1


@dataclass(slots=True)
class Count:
    """What repeated products came to."""

    iterations: int = 0
    errors: int = 0
    busy_s: float = 0.0
    last_tflops: float = 0.0
    notes: list[str] = field(default_factory=list)

    def note(self, words: str) -> None:
        """Remember where something was wrong, the first few times."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(words)


class Product:
    """One product of two matrices, again and again: the same kernel on the same numbers gives the same bits.

    cuBLAS promises that for one stream on one GPU (its manual, "Results Reproducibility").
    """

    def __init__(self, rig: Rig, part: Part, dtype: torch.dtype, step: float | None = None) -> None:
        """`step` is the relative distance of two numbers in the format that is computed in."""
        size = rig.sizes.matrix
        numbers = torch.Generator(rig.device).manual_seed(_SEED)
        self._rig, self._part, self._size = rig, part, size
        self._step = torch.finfo(dtype).eps if step is None else step
        self._left, self._right = (
            torch.randn(size, size, generator=numbers, device=rig.device).to(dtype) for _ in range(2)
        )
        self._first, self._out = (torch.empty(size, size, dtype=dtype, device=rig.device) for _ in range(2))
        torch.matmul(self._left, self._right, out=self._first)
        rig.touch(f"{part} first", self._first)
        rig.synchronize()

    @property
    def bytes(self) -> int:
        """Of its matrices."""
        return int(4 * self._first.numel() * self._first.element_size())

    def wrong_against_cpu(self) -> int:
        """How many values of the first product are not what the CPU gets.

        It computes rows spread so that every tile of a GPU's kernel is in one of them. A value is the sum of `size`
        products of normal numbers: of the order of its root. Rounding of the result and of what it is added up from
        stay within some steps of that, and a wrong exponent or a wrong sum does not.
        """
        apart = max(1, self._size // _ROWS)
        rows = torch.tensor(
            [start + (start // apart * 37) % apart for start in range(0, self._size - apart + 1, apart)]
        )
        expected = self._left[rows.to(self._rig.device)].cpu().float() @ self._right.cpu().float()
        got = self._first[rows.to(self._rig.device)].cpu().float()
        scale = self._size**0.5
        allowed = scale * (8 * self._step + 2.0**-22 * scale)
        return int((~((got - expected).abs() <= allowed)).sum())

    def repeat(self, seconds: float, name: str, *, is_each_compared: bool) -> Iterator[Count]:
        """Multiply for so long, and yield what it came to after each batch of about a tenth of a second.

        With `is_each_compared` every product is compared with the first, bit by bit, which is part of the time; else
        the last one of each batch, which is not.
        """
        rig, count, batch = self._rig, Count(), 1
        wrong = torch.zeros((), dtype=torch.int64, device=rig.device)
        began = time.monotonic()
        while time.monotonic() - began < seconds and not rig.is_stopped():
            started = time.monotonic()
            for _ in range(batch):
                torch.matmul(self._left, self._right, out=self._out)
                rig.touch(self._part, self._out)
                if is_each_compared:
                    wrong += self._differing()
            rig.synchronize()
            took_s = max(time.monotonic() - started, 1e-9)
            count.busy_s += took_s
            count.last_tflops = self._tflops(batch, took_s)
            if not is_each_compared:
                wrong += self._differing()
            if found := int(wrong):
                wrong.zero_()
                last = count.iterations + batch
                count.note(f"{name}, products {count.iterations + 1} to {last}: {found} differ{self._place()}")
            count.iterations += batch
            count.errors += found
            batch = max(1, min(_MOST_IN_BATCH, 2 * batch, int(batch * _BATCH_S / took_s)))
            yield count

    def tflops(self, count: Count) -> float:
        """10^12 operations a second, on the whole."""
        return self._tflops(count.iterations, count.busy_s)

    def _tflops(self, products: int, seconds: float) -> float:
        return products * 2 * self._size**3 / seconds / 1e12

    def _differing(self) -> Any:
        return torch.count_nonzero(_bits(self._out) != _bits(self._first))

    def _place(self) -> str:
        """Where the last product differs, if it does."""
        places = (_bits(self._out) != _bits(self._first)).nonzero()[:1].tolist()
        return "".join(f", as at row {row}, column {column}" for row, column in places)


def _bits(matrix: Any) -> Any:
    """The same memory as whole numbers: so is NaN equal to itself, and 0 not to -0."""
    return matrix.view(_WORDS[matrix.element_size()])


def matmul(rig: Rig) -> Found:
    """How many TFLOPS large matrices of fp16 come to."""
    return _measure(rig, Part.matmul, [("fp16", torch.float16, None)], rig.sizes.short_s)


def load(rig: Rig) -> Found:
    """Full load, with every result compared."""
    return _measure(rig, Part.load, [("fp16", torch.float16, None)], rig.sizes.load_s, is_each_compared=True)


def precision(rig: Rig) -> Found:
    """Each format that the device has."""
    return _measure(rig, Part.precision, _formats(rig), rig.sizes.short_s)


_Format = tuple[str, torch.dtype, float | None]


def _formats(rig: Rig) -> list[_Format]:
    found: list[_Format] = [("fp32", torch.float32, None)]
    if rig.is_cuda and torch.cuda.is_tf32_supported():
        found.append(("tf32", torch.float32, _TF32_STEP))
    found.append(("fp16", torch.float16, None))
    if not rig.is_cuda or torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(("bf16", torch.bfloat16, None))
    return found


def _measure(rig: Rig, part: Part, formats: list[_Format], seconds: float, *, is_each_compared: bool = False) -> Found:
    """So many seconds of each format."""
    found, whole_s = Found(part), seconds * len(formats)
    for number, (name, dtype, step) in enumerate(formats):
        with _float32_as(name):
            product = Product(rig, part, dtype, step)
        wrong = product.wrong_against_cpu()
        notes = [f"{name}: {wrong} not as the CPU has them"] if wrong else []
        before, begun = found, time.monotonic()
        with _float32_as(name):
            for count in product.repeat(seconds, name, is_each_compared=is_each_compared):
                found = Found(
                    part,
                    iterations=before.iterations + count.iterations,
                    errors=before.errors + wrong + count.errors,
                    tflops={**before.tflops, name: product.tflops(count)},
                    allocated_bytes=max(before.allocated_bytes, product.bytes),
                    notes=(*before.notes, *notes, *count.notes),
                )
                elapsed_s = min(seconds, time.monotonic() - begun)
                rig.tell((number * seconds + elapsed_s) / whole_s, found, count.last_tflops)
        del product
        rig.release()
        if time.monotonic() - begun < seconds:
            return replace(found, is_cut=True)
    return found


@contextlib.contextmanager
def _float32_as(name: str) -> Iterator[None]:
    """Let products of float32 be computed in TF32, or not."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
