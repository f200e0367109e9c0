"""Makes vLLM's memory of how much KV cache fits (VLLM_ENABLE_STARTUP_PLAN) safe to use while plans change.

vLLM 0.32 finds it again by everything but the limits it was measured under. A plan made smaller after an out-of-memory
would be given the KV cache of the one that failed, and so would a file with another gpu_memory_utilization.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any


def install() -> None:
    """Let the limits count, in this process and its forks."""
    plans: Any = importlib.import_module("vllm.v1.worker.startup_plan")
    without_limits = plans.compute_plan_fingerprint

    def fingerprint(config: Any, rank: int, world_size: int) -> str:
        limits = (
            config.cache_config.gpu_memory_utilization,
            config.model_config.max_model_len,
            config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_num_batched_tokens,
            config.load_config.load_format,  # weights that another process holds are not counted in
        )
        known_by = f"{without_limits(config, rank, world_size)} {limits}"
        return hashlib.sha256(known_by.encode()).hexdigest()[:16]

    plans.compute_plan_fingerprint = fingerprint
