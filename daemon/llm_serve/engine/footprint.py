"""What vLLM makes of a configuration, weighed without weights: the model is built of tensors that have shapes only.

Layers are sharded and quantised as in an engine, by the same code, and each is asked for its KV cache. What is counted
here is therefore vLLM's own figure; only what a step and sampling hold is an estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from llm_serve.core.errors import LlmServeError
from llm_serve.core.footprint import Footprint, Layers

_AMPLE_BYTES = 1 << 60
"""A pool in which any request fits, for asking how large a block is."""


class CannotBeBuilt(LlmServeError):  # noqa: N818 - said as it is
    """vLLM knows the model, but cannot make it of shapes."""

    exit_status = 70


def measure(config: Any) -> tuple[Footprint, LaidOut]:
    """Return what the model of a VllmConfig takes of one device, and how its KV cache is laid out.

    Takes the time of building a model without weights: a second or two. Raises CannotBeBuilt.
    """
    from vllm.config import CompilationMode, set_current_vllm_config

    graphs = tuple(sorted(config.compilation_config.cudagraph_capture_sizes or ()))
    # Compiling would look for kernels; what is compiled has the same shapes.
    config.compilation_config.mode = CompilationMode.NONE
    ranks = range(config.parallel_config.pipeline_parallel_size)
    try:
        with set_current_vllm_config(config):
            found = [_of_rank(config, rank, len(ranks)) for rank in ranks]
    except Exception as error:
        raise CannotBeBuilt(
            f"vLLM cannot build this model without its weights: {type(error).__name__}: {error}"
        ) from error
    weights = max(each[0] for each in found)
    specs = [each[1] for each in found]
    widest = max(each[2] for each in found)
    return _footprint(config, weights, widest, specs, graphs), LaidOut(config, specs)


def device_memory_bytes() -> int:
    """Memory of one device, as vLLM takes its share of it: of a GPU, or of one of the CPU's memory nodes."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def processes(config: Any) -> int:
    """Devices that an engine needs, one for each of its processes."""
    return int(config.parallel_config.world_size * config.parallel_config.data_parallel_size)


def _of_rank(config: Any, rank: int, ranks: int) -> tuple[int, dict[str, Any], int]:
    """Bytes of weights, KV cache specifications by layer, and the widest output of one stage of the pipeline."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.compilation_config.static_forward_context.clear()
    with _as_rank(config.parallel_config, rank, ranks):
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"), _no_gpu():
            model = initialize_model(config, model_config=config.model_config)
        # An executor does this between loading and laying out.
        current_platform.update_block_size_for_backend(config)
        specs = _specs(config)
        _resolve_layout(config, specs)
    return _weight_bytes(model), specs, _widest(model)


@contextmanager
def _as_rank(parallel: Any, stage: int, stages: int) -> Iterator[None]:
    """Context in which vLLM takes this process for the first worker of that stage, among as many as it wants."""
    from vllm.distributed import parallel_state

    tensor, data = parallel.tensor_parallel_size, parallel.data_parallel_size
    experts = tensor * data if parallel.enable_expert_parallel else 1
    sizes = {
        "_WORLD": tensor * stages,
        "_TP": tensor,
        "_ETP": tensor,
        "_DP": data,
        "_EP": experts if experts > 1 else tensor * data,
        "_EPLB": 1,
        "_DCP": parallel.decode_context_parallel_size,
        "_PCP": parallel.prefill_context_parallel_size,
    }
    groups = {name: _group(size) for name, size in sizes.items()} | {"_PP": _group(stages, stage)}
    before = {name: getattr(parallel_state, name) for name in groups}
    vars(parallel_state).update(groups)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def _group(size: int, rank: int = 0) -> Any:
    """As much of a GroupCoordinator as layers read when they are made."""
    import torch

    of_torch = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return SimpleNamespace(
        world_size=size,
        rank=rank,
        rank_in_group=rank,
        local_rank=rank,
        ranks=list(range(size)),
        first_rank=0,
        last_rank=size - 1,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        device=torch.device("meta"),
        device_group=of_torch,
        cpu_group=of_torch,
        device_communicator=None,
        unique_name="plan",
    )


def _no_gpu() -> Any:
    """Context in which what names a GPU as its place gets a shape only, as all the rest."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):  # type: ignore[misc]  # Any at torch's border
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            # A number is a GPU's index.
            if isinstance(given.get("device"), int) or torch.device(given.get("device") or "meta").type == "cuda":
                given["device"] = "meta"
            return function(*args, **given)

    return OnMeta()


def _specs(config: Any) -> dict[str, Any]:
    """What each layer asks of the KV cache, as vLLM's runners collect it."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    found: dict[str, Any] = {}
    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        if spec := layer.get_kv_cache_spec(config):
            is_attention = isinstance(spec, AttentionSpec)
            found[name] = customize_attention_spec(layer.get_attn_backend(), spec) if is_attention else spec
    return found


def _resolve_layout(config: Any, specs: Mapping[str, Any]) -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    names = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
    resolve_kv_cache_layout(config, [names], list(specs.values()))


def _weight_bytes(model: Any) -> int:
    """Parameters and buffers, each once; what is quantised while it is loaded is counted as it will lie there."""
    online = {id(weight) for module in model.modules() for weight in _to_be_quantised(module)}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(
        tensor.numel() * (1 if number in online else tensor.element_size()) for number, tensor in tensors.items()
    )


def _to_be_quantised(module: Any) -> Iterator[Any]:
    """Weights that become one byte each while they are loaded."""
    if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
        yield from (weight for weight in module.parameters(recurse=False) if weight.dim() > 1)


def _widest(model: Any) -> int:
    """Elements that one layer holds for a token, at the most, beside its input and its output."""
    return max((_width(module) for module in model.modules()), default=0)


def _width(module: Any) -> int:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear

    if isinstance(module, MergedColumnParallelLinear):
        # Gate and up, and what the activation makes of the two.
        return int(module.output_size_per_partition * 3 // 2)
    if isinstance(module, ColumnParallelLinear):
        return int(module.output_size_per_partition)
    moe = getattr(module, "moe_config", None)
    if moe is not None and hasattr(moe, "experts_per_token"):
        inner = moe.intermediate_size_per_partition
        return int(moe.experts_per_token * (max(2 * inner, moe.hidden_dim) + inner))
    return 0


def _footprint(
    config: Any, weights: int, widest: int, specs: list[dict[str, Any]], graphs: tuple[int, ...]
) -> Footprint:
    model = config.model_config
    element, hidden, vocabulary = model.dtype.itemsize, model.get_hidden_size(), model.get_vocab_size()
    offloaded = int(config.offload_config.uva.cpu_offload_gb * (1 << 30))
    if config.use_v2_model_runner:
        # Logits as they are and in single precision; counts of tokens, and masks of a bit each.
        logits, state = vocabulary * (element + 4), vocabulary * 4 + vocabulary // 4
    else:
        # Sorted as well, with 8 bytes for each index.
        logits, state = vocabulary * 24, vocabulary // 8
    return Footprint(
        weights_bytes=max(weights - offloaded, 0),
        layers=_layers(specs),
        step_bytes_per_token=(2 * hidden + widest) * element,
        hidden_bytes_per_token=hidden * element,
        logits_bytes_per_seq=logits,
        state_bytes_per_seq=state,
        num_layers=model.get_total_num_hidden_layers(),
        graph_sizes=graphs,
    )


def _layers(specs: list[dict[str, Any]]) -> tuple[Layers, ...]:
    """The layers of the whole model by what they keep; of several stages, the bytes of the largest."""
    stages = []
    for stage in specs:
        alike: dict[tuple[str, int | None], list[int]] = defaultdict(list)
        for spec in stage.values():
            alike[_kind(spec)].append(_bytes_per_token(spec))
        stages.append(alike)
    kinds = dict.fromkeys(kind for alike in stages for kind in alike)
    return tuple(
        Layers(
            kind=words,
            count=sum(len(alike.get((words, keeps), ())) for alike in stages),
            bytes_per_token=max(sum(alike.get((words, keeps), ())) for alike in stages),
            keeps=keeps,
        )
        for words, keeps in kinds
    )


def _kind(spec: Any) -> tuple[str, int | None]:
    """(what the layer keeps in words, tokens it keeps at most)."""
    from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec, MLAAttentionSpec

    if isinstance(spec, MambaSpec):
        return f"a state of {spec.page_size_bytes / 2**20:.2f} MiB", 0
    kind = type(spec).__name__.removesuffix("Spec")
    if not isinstance(spec, AttentionSpec):
        return kind, None
    keeps = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    quantised = spec.kv_quant_mode.name.lower()
    dtype = str(spec.dtype).removeprefix("torch.") if quantised == "none" else quantised
    if isinstance(spec, MLAAttentionSpec):
        return f"latent attention (MLA), {spec.head_size} elements, {dtype}", keeps
    reach = f"attention over {keeps} tokens" if keeps else "full attention"
    return f"{reach}, {spec.num_kv_heads} KV heads of {spec.head_size}, {dtype}", keeps


def _bytes_per_token(spec: Any) -> int:
    from vllm.v1.kv_cache_interface import MambaSpec

    return 0 if isinstance(spec, MambaSpec) else int(spec.page_size_bytes // spec.block_size)


class LaidOut:
    """The KV cache of a VllmConfig: vLLM's own answers to how many blocks, and of how many bytes."""

    def __init__(self, config: Any, specs: list[dict[str, Any]]) -> None:
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
        from vllm.v1.kv_cache_interface import MambaSpec

        self._config, self._utils = config, kv_cache_utils
        register_all_kvcache_specs(config)
        self.fixed_blocks: int | None = config.cache_config.num_gpu_blocks_override
        has_states = any(isinstance(spec, MambaSpec) for stage in specs for spec in stage.values())
        self.blocks_per_sequence_at_least = int(has_states)
        with self._limits(1, 1):
            stages = kv_cache_utils.get_kv_cache_configs(config, specs, [_AMPLE_BYTES] * len(specs))
        self._stage = stages[0]
        # All stages have as many blocks, which is what fits where they are largest. The pool is so large that the
        # division gives back their size to the byte.
        self.bytes_per_block = _AMPLE_BYTES // self._stage.num_blocks if self._stage.kv_cache_groups else 1

    def blocks_per_request(self, length: int, batched_tokens: int) -> int:
        """Blocks of a request of so many tokens, over all groups of layers."""
        if not self._stage.kv_cache_groups:
            return 0
        with self._limits(length, batched_tokens):
            at_once: float = self._utils.get_max_concurrency_for_kv_cache_config(self._config, self._stage)
            blocks: int = self._stage.num_blocks
        return round(blocks / at_once)

    @contextmanager
    def _limits(self, length: int, batched_tokens: int) -> Iterator[None]:
        """Context with these limits: vLLM reads them from the configuration, and itself changes it for a while."""
        model, scheduler, cache = self._config.model_config, self._config.scheduler_config, self._config.cache_config
        changes = (
            (model, "max_model_len", length),
            (model, "original_max_model_len", length),
            (scheduler, "max_num_batched_tokens", batched_tokens),
            (cache, "num_gpu_blocks_override", None),
        )
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
