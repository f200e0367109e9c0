"""One attention layer of vLLM, run through one backend: a prefill and two decodes, held against plain arithmetic.

Everything between the arguments and the kernel is vLLM's own: its choice and refusal of the backend, the layout and the
allocation of the KV cache, the metadata of a batch. Only the numbers that go in are made up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.workspace import init_workspace_manager

from llm_serve.core.doctor.attention import Shape

_NAME = "model.layers.0.self_attn.attn"
_PROMPT_TOKENS = (37, 70)
"""Two requests of unequal length, neither of them a multiple of a block."""
_DECODES = 2
_MAX_MODEL_LEN = 256
_POOL_BYTES = 64 << 20
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_FP8_TOLERANCE = 0.5
"""Largest differences of values that are 4 at most; a kernel that reads the wrong block is off by more than 1."""


class WrongNumbersError(Exception):
    """The kernel ran, and its answer is not what attention is."""


@dataclass(frozen=True)
class _Stage:
    """What stays the same from step to step."""

    config: Any
    layer: Any
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class _Cache:
    """The KV cache of the layer: vLLM's description of it, and the groups that make a batch's metadata."""

    pool: Any
    groups: Any
    blocks: torch.Tensor
    """On the CPU, [requests, blocks of a request]: where each request's tokens are, in blocks of the kernel's size."""
    block_tokens: int


def register_model() -> None:
    """Make the model class known whose shape a trial borrows: else vLLM starts a process to look at it."""
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)


def engine_config(shape: Shape, backend: str | None, folder: Path) -> Any:
    """VLLM's configuration of a model with one layer of that shape. `folder` gets its config.json."""
    about = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": shape.head_size,
        "hidden_size": shape.heads * shape.head_size,
        "intermediate_size": 64,
        "max_position_embeddings": _MAX_MODEL_LEN,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(about))
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=_MAX_MODEL_LEN,
        dtype=shape.dtype,
        kv_cache_dtype=shape.kv_cache_dtype,
        attention_backend=backend,
    )
    return arguments.create_engine_config()


def run(config: Any, shape: Shape) -> None:
    """Prefill and decode through the backend that `config` names. Raises what vLLM raises, and WrongNumbersError."""
    device, dtype = torch.device(config.device_config.device), config.model_config.dtype
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)
        torch.accelerator.set_device_index(device.index)
    init_workspace_manager(device)
    torch.manual_seed(0)
    with set_current_vllm_config(config), torch.inference_mode():
        with set_default_torch_dtype(dtype), device:
            layer = Attention(
                shape.heads, shape.head_size, shape.head_size**-0.5, shape.kv_heads,
                cache_config=config.cache_config, prefix=_NAME,
            )  # fmt: skip
            layer.process_weights_after_loading(dtype)
            # In a model a projection comes first, with which oneDNN asks the kernel for the CPU's matrix unit (AMX):
            # the attention kernel relies on that.
            torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
        _play(_Stage(config, layer, device, dtype), _cache(config, layer, device), shape)


def _cache(config: Any, layer: Any, device: torch.device) -> _Cache:
    """What EngineCore and a worker do between loading and the first step."""
    specs = attn_utils.get_kv_cache_spec(config)
    supported = get_supported_kv_cache_layouts([layer.get_attn_backend()])
    resolve_kv_cache_layout(config, [[layout.name for layout in supported]], specs.values())
    (pool,) = get_kv_cache_configs(config, [specs], [_POOL_BYTES])
    config.cache_config.num_gpu_blocks = pool.num_blocks
    groups, _, sizes = attn_utils.init_attn_backend(pool, config, device)
    attn_utils.init_kv_cache(
        config.compilation_config.static_forward_context, pool, device, sizes, config,
        attn_groups=[group for each in groups for group in each],
    )  # fmt: skip
    block_tokens = sizes[0]
    each = -(-_MAX_MODEL_LEN // block_tokens)
    # Block 0 is vLLM's own; the rest backwards, so that a kernel which ignores the table is found out.
    first = pool.kv_cache_groups[0].kv_cache_spec.block_size // block_tokens
    blocks = torch.arange(first, first + len(_PROMPT_TOKENS) * each, dtype=torch.int32).flip(0)
    return _Cache(pool, groups, blocks.view(len(_PROMPT_TOKENS), each), block_tokens)


def _play(stage: _Stage, cache: _Cache, shape: Shape) -> None:
    counts = [_PROMPT_TOKENS, *[(1,) * len(_PROMPT_TOKENS)] * _DECODES]
    done = [0] * len(_PROMPT_TOKENS)
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in _PROMPT_TOKENS]
    for new in counts:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        qkv = tuple(torch.randn(sum(new), each, shape.head_size).to(stage.dtype) for each in heads)
        total = [before + more for before, more in zip(done, new, strict=True)]
        answer = _step(stage, cache, qkv, list(zip(done, total, strict=True))).cpu()
        query, key, value = (each.split(new) for each in qkv)
        for asked, keys, values, given, past in zip(query, key, value, answer.split(new), history, strict=True):
            past.append((keys, values))
            _compare(given, _expected(asked, past, shape), shape)
        done = total


def _step(stage: _Stage, cache: _Cache, qkv: tuple[torch.Tensor, ...], spans: list[tuple[int, int]]) -> torch.Tensor:
    """The layer's answer [tokens, heads, head size] to new tokens, which are at these positions of their requests."""
    done, total = zip(*spans, strict=True)
    new = [after - before for before, after in spans]
    positions = torch.cat([torch.arange(before, after, dtype=torch.int64) for before, after in spans])
    owner = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    blocks = cache.blocks[owner, positions // cache.block_tokens].to(torch.int64)
    slots = (blocks * cache.block_tokens + positions % cache.block_tokens).to(stage.device)[None]
    starts, ends = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, *accumulate(new)], total))
    metadata = attn_utils.build_attn_metadata(
        cache.groups,
        num_reqs=len(new),
        num_tokens=sum(new),
        query_start_loc_gpu=starts.to(stage.device),
        query_start_loc_cpu=starts,
        max_query_len=max(new),
        seq_lens=ends.to(stage.device),
        max_seq_len=max(total),
        block_tables=[cache.blocks.to(stage.device)],
        slot_mappings=slots,
        kv_cache_config=cache.pool,
        seq_lens_cpu_upper_bound=ends,
        positions=positions.to(stage.device),
        is_prefilling=torch.tensor([not before for before in done]),
    )
    by_layer = attn_utils.build_slot_mappings_by_layer(slots, cache.pool)
    with set_forward_context(metadata, stage.config, num_tokens=sum(new), slot_mapping=by_layer):
        answer: torch.Tensor = stage.layer(*(each.flatten(1).to(stage.device) for each in qkv))
    return answer.view(qkv[0].shape)


def _expected(query: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]], shape: Shape) -> torch.Tensor:
    """Causal attention by its definition, in float32."""
    keys, values = (torch.cat(each).float() for each in zip(*past, strict=True))
    keys, values = (each.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * shape.head_size**-0.5
    is_later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(query))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, float("-inf")).softmax(-1), values)


def _compare(given: torch.Tensor, expected: torch.Tensor, shape: Shape) -> None:
    largest = (given.float() - expected).abs().max().item()
    allowed = _FP8_TOLERANCE if shape.kv_cache_dtype.startswith("fp8") else _TOLERANCE[given.dtype]
    if not largest <= allowed:  # NaN is not, either
        raise WrongNumbersError(f"the largest error is {largest:.3g}, {allowed:.3g} is what {given.dtype} explains")
