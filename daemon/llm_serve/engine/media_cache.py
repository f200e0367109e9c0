"""Lets requests with images be sent to another engine: the daemon keeps the images that its engines have.

vLLM's daemon side keeps only the names of the images that EngineCore holds, and sends the second request about one
nothing but the name. That request could never be repeated, for the image is gone with the engine. The kind that keeps
the data is vLLM's own too, for several front ends. Both sides then hold `mm_processor_cache_gb`.
"""

from __future__ import annotations

import importlib
from typing import Any


def install() -> None:
    """Replace the function where vLLM's renderer looks it up."""
    renderers: Any = importlib.import_module("vllm.renderers.base")
    renderers.processor_cache_from_config = make_cache


def make_cache(config: Any) -> Any:
    """As vLLM's `processor_cache_from_config`, but in place of names there is data."""
    from vllm.multimodal import cache

    made = cache.processor_cache_from_config(config)
    if isinstance(made, cache.LruKeyReplicatedSenderCache):
        return cache.processor_only_cache_from_config(config)
    return made
