"""Which of vLLM's CUDA graphs are worth their part of every start.

vLLM captures one for each 8 tokens of a step up to 256, and for each 16 above; half of a rebuild's seconds go by with
that. A step runs in the next larger graph, so fewer sizes cost tokens that are computed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FINE_TO, _VLLM_FINE_TO = 64, 256
_STRIDE, _VLLM_STRIDE = {True: 16, False: 32}, {True: 8, False: 16}
"""Tokens from one size to the next: up to 256, and above."""


def sparse(sizes: Sequence[int], needed: Iterable[int] = ()) -> list[int]:
    """Every size up to 64, each second of vLLM's above that, and whatever is `needed` or stands out of vLLM's stride.

    `sizes` are in tokens and rise; the largest stays, so that the same steps have a graph as before.
    """
    kept = {*needed, *sizes[-1:]}
    return [size for size in sizes if size in kept or not _is_between(size)]


def _is_between(size: int) -> bool:
    """True for a size that vLLM has only because its own stride is finer."""
    is_low = size <= _VLLM_FINE_TO
    return size > _FINE_TO and size % _VLLM_STRIDE[is_low] == 0 and size % _STRIDE[is_low] != 0
