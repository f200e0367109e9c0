"""What a model takes of one GPU, and the sums that vLLM does with it at the start of an engine.

Weights and KV cache are counted. What a step needs and what graphs take is estimated, since only a run can measure it:
the estimates are in `budget`, and `tests/gpu/plan.py` holds them against vLLM's own numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from llm_serve.core.course import Effective

_MIB = 1 << 20
_GIB = 1 << 30
_UNITS = {"gib": _GIB, "gb": _GIB, "g": _GIB, "mib": _MIB, "mb": _MIB}
_GPUS = re.compile(
    r"(?:(?P<first>\d+)\s*[x*])?\s*(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]+)\s*(?:[x*]\s*(?P<last>\d+))?"
)

_DRIVER_BYTES = 320 * _MIB
_DRIVER_SHARE = 0.0045
"""What the driver keeps of a GPU: 320 MiB of 24 GiB, 0.6 of 140 GiB."""
_KERNEL_BYTES = {"cuda": 320 * _MIB, "cpu": 900 * _MIB}
"""Code and work space of the kernels; on a CPU the libraries of the engine's process."""
_GRAPH_BYTES_PER_LAYER = 256 << 10
"""What one CUDA graph takes for one layer: 0.28 MiB with ordinary attention on an H200, 1 MiB with latent attention."""
_ROUNDED_UP = 9 / 8
"""What the GPU's allocator makes of the peak of a step: 1.11 to 1.16 times its tensors on an H200."""
_GRAPHS_PER_SIZE = 2
"""Of a whole step, and in pieces between the attention of the layers."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one kind, at hand or only spoken of."""

    count: int
    memory_bytes: int
    """Of one, as a program sees it: less than what the driver shows, which keeps some to itself."""
    name: str = "GPU"
    capability: tuple[int, int] = (9, 0)
    """Of CUDA. Decides which kernels vLLM would choose."""


def parse_gpus(text: str) -> Gpus:
    """Return what `24GiB x 4`, `4x24GiB` or `24GiB` means, or raise ValueError.

    GB are taken for GiB, as cards are sold.
    """
    found = _GPUS.fullmatch(text.strip().lower())
    if not found or (found["first"] and found["last"]) or found["unit"] not in _UNITS:
        raise ValueError(f'must be a size and perhaps a number, as in "24GiB" or "24GiB x 4", not {text!r}')
    count, size = int(found["first"] or found["last"] or 1), float(found["size"]) * _UNITS[found["unit"]]
    if not 1 <= count <= 1024 or not _GIB <= size <= 4096 * _GIB:
        raise ValueError(f"must be 1 to 1024 GPUs of 1 to 4096 GiB, not {text!r}")
    return Gpus(count, usable_bytes(int(size)))


def usable_bytes(driver_shows: int) -> int:
    """What a program sees of a GPU of this size."""
    return driver_shows - max(_DRIVER_BYTES, int(driver_shows * _DRIVER_SHARE))


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that keep the same of a token."""

    kind: str
    """In words, as `full attention, 8 heads of 128, bfloat16`."""
    count: int
    bytes_per_token: int
    """Of all of them together; 0 where what is kept does not grow."""
    keeps: int | None = None
    """Tokens that are kept at most; None keeps all."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes of one GPU, whatever its limits. Where the GPUs of one engine differ, the most."""

    weights_bytes: int
    """As they lie on the GPU: sharded, quantised, without what is offloaded."""
    layers: tuple[Layers, ...]
    """Those that keep something of a token."""
    step_bytes_per_token: int
    """Estimate of the most that a step holds for one of its tokens."""
    hidden_bytes_per_token: int
    """What is left of that when logits are computed."""
    logits_bytes_per_seq: int
    """Estimate of what sampling holds for one sequence."""
    state_bytes_per_seq: int
    """Kept for each sequence that may run, whether it runs or not."""
    num_layers: int
    """Of all kinds."""
    graph_sizes: tuple[int, ...] = ()
    """Batch sizes that CUDA graphs are captured for."""

    @property
    def kv_bytes_per_token(self) -> int:
        """What all layers keep of a token as long as it is in all their windows."""
        return sum(layers.bytes_per_token for layers in self.layers)


class Cache(Protocol):
    """How vLLM lays out the KV cache of one model."""

    bytes_per_block: int
    """Of one GPU."""
    fixed_blocks: int | None
    """Their number, where it does not follow from the memory."""
    blocks_per_sequence_at_least: int
    """Blocks that a sequence holds from its first token to its last; 0 where it is not vLLM's limit."""

    def blocks_per_request(self, length: int, batched_tokens: int) -> int:
        """Blocks that a request of so many tokens has to have; never fewer for more tokens."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Where the memory of one GPU goes, in bytes."""

    device: int
    allowed: int
    """What the engine may use."""
    weights: int
    step: int
    """The peak of one step: an estimate."""
    kept: int
    """States, buffers and kernels: an estimate."""
    graphs: int
    """CUDA graphs: an estimate."""
    pool: int
    """What is left for the KV cache, or was given to it. Below zero it is what lacks."""

    @property
    def used(self) -> int:
        """All together; above `device` it cannot be."""
        return self.weights + self.step + self.kept + self.graphs + max(self.pool, 0)


def budget(model: Footprint, now: Effective) -> Budget:
    """The sums of a start with these limits, all of which have to be known, but for a fixed KV cache."""
    device, seqs, tokens = now.device_memory_bytes or 0, now.max_num_seqs or 1, now.max_num_batched_tokens or 1
    allowed = math.ceil(device * (now.gpu_memory_utilization or 0))
    step = max(
        tokens * model.step_bytes_per_token,
        tokens * model.hidden_bytes_per_token + seqs * model.logits_bytes_per_seq,
    )
    if now.device != "cpu":
        step = int(step * _ROUNDED_UP)
    kept = seqs * model.state_bytes_per_seq + _KERNEL_BYTES[now.device]
    graphs = _graph_bytes(model, now)
    left = allowed - model.weights_bytes - step - kept - graphs
    pool = left if now.kv_cache_memory_bytes is None else now.kv_cache_memory_bytes
    return Budget(device, allowed, model.weights_bytes, step, kept, graphs, pool)


def _graph_bytes(model: Footprint, now: Effective) -> int:
    # vLLM captures no size that twice as many sequences could not fill.
    sizes = [size for size in model.graph_sizes if size <= 2 * (now.max_num_seqs or size)]
    if now.enforce_eager or now.device == "cpu" or not sizes:
        return 0
    return (
        len(sizes) * _GRAPHS_PER_SIZE * model.num_layers * _GRAPH_BYTES_PER_LAYER
        + max(sizes) * model.step_bytes_per_token
    )


def blocks_in(cache: Cache, pool: int) -> int:
    """Whole blocks in a pool of so many bytes, the one among them that vLLM keeps to itself."""
    return cache.fixed_blocks if cache.fixed_blocks is not None else max(pool, 0) // cache.bytes_per_block


def longest(cache: Cache, blocks: int, now: Effective, seqs: int = 1) -> int:
    """Tokens that each of so many requests can have at the same time, up to max_model_len; 0 if not one."""
    tokens = now.max_num_batched_tokens or 1

    def fits(length: int) -> bool:
        return seqs * cache.blocks_per_request(length, tokens) <= blocks - 1

    least, most = 0, now.max_model_len or 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def steps_of_seqs(most: int) -> Iterator[int]:
    """1, 2, 4 ... and `most` itself."""
    seqs = 1
    while seqs < most:
        yield seqs
        seqs *= 2
    yield most
