"""Whether an engine's processes need more of the network than this machine's own loopback.

They load weights that are here, and talk to each other and to the daemon on this machine. Nothing is lost where the
rest is closed to them, and neither a model's code nor a client who gains hold of it can reach out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llm_serve.core.settings import Settings

_ELSEWHERE = (
    *("data_parallel_address", "ec_transfer_config", "kv_events_config", "kv_transfer_config"),
    *("otlp_traces_endpoint", "weight_transfer_config"),
)
"""vLLM's arguments by which an engine talks to others."""
_ONE_PART = (
    *("data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_rank", "data_parallel_start_rank"),
    "headless",
)
"""vLLM's arguments that make an engine one part of several."""
_RAY = ("distributed_executor_backend", "data_parallel_backend")


def why_open(settings: Settings, is_here: Callable[[str], bool]) -> str:
    """Why the network stays open to an engine's processes, as the end of a sentence; empty where it is closed.

    `is_here` says whether the files of a model, by its id or folder, are on this machine.
    """
    if settings.network.engine == "open":
        return 'network.engine = "open"'
    return next(_reasons(settings, is_here), "") if settings.network.engine == "auto" else ""


def _reasons(settings: Settings, is_here: Callable[[str], bool]) -> Iterator[str]:
    arguments = settings.engine
    if arguments.get("nnodes", 1) != 1:
        yield f"engine.nnodes = {arguments['nnodes']}"
    for name in _RAY:
        if arguments.get(name) == "ray":
            yield f'engine.{name} = "ray"'
    whole, here = arguments.get("data_parallel_size", 1), arguments.get("data_parallel_size_local")
    if here is not None and here != whole:
        yield f"engine.data_parallel_size_local = {here}, of {whole}"
    for name in (*_ELSEWHERE, *_ONE_PART):
        if (value := arguments.get(name)) not in (None, "", {}) and value is not False:
            yield f"engine.{name} is set"
    for name in _weights(settings.model, arguments):
        if not is_here(name):
            yield f"{name} is not on this machine yet"


def _weights(model: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What an engine's processes load from a folder or the hub; configurations and tokenizers the daemon fetches."""
    yield model
    speculative = arguments.get("speculative_config")
    if isinstance(speculative, Mapping) and isinstance(speculative.get("model"), str):
        yield speculative["model"]
    elif isinstance(speculative, str):
        yield "the draft model of engine.speculative_config"  # JSON, which is not looked into
    for module in arguments.get("lora_modules") or ():
        yield str(module["path"] if isinstance(module, Mapping) and "path" in module else module).rpartition("=")[2]
