"""What an engine is really built with, read off vLLM's own configuration object."""

from __future__ import annotations

from typing import Any

import psutil

from llm_serve.core.course import Effective


def effective(config: Any, device_memory_bytes: int | None) -> Effective:
    """The values that the ladder works with. `device_memory_bytes` is one GPU's, where NVML knows it."""
    scheduler, cache, model = config.scheduler_config, config.cache_config, config.model_config
    device = "cpu" if config.device_config.device_type == "cpu" else "cuda"
    backend = config.attention_config.backend
    return Effective(
        device=device,
        max_model_len=model.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        block_size=cache.block_size or 16,
        gpu_memory_utilization=cache.gpu_memory_utilization,
        kv_cache_memory_bytes=cache.kv_cache_memory_bytes,
        device_memory_bytes=psutil.virtual_memory().total if device == "cpu" else device_memory_bytes,
        enforce_eager=bool(model.enforce_eager),
        attention_backend=backend.name if backend is not None else None,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        world_size=config.parallel_config.world_size_across_dp,
        numa_bind=bool(config.parallel_config.numa_bind),
        chunked_prefill=bool(scheduler.enable_chunked_prefill),
    )
