"""What must be so where an engine spreads over several hosts, as far as its file can tell."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from llm_serve.core.settings import Settings

_HOST_IP = "engine.env.VLLM_HOST_IP"
_NAMES = ("distributed_executor_backend", "data_parallel_backend")


def uses_ray(settings: Settings) -> bool:
    """True when Ray starts the engine's processes, on this host and others."""
    return any(settings.engine.get(name) == "ray" for name in _NAMES)


def problems(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    """Yield (path, message, hint) for what can never work."""
    if (address := settings.engine_env.get("VLLM_HOST_IP")) is not None:
        yield from _of_address(address)
    nodes = settings.engine.get("nnodes", 1)
    if type(nodes) is int and nodes > 1 and uses_ray(settings):
        hint = "Remove the line: tensor_parallel_size and pipeline_parallel_size say how many GPUs Ray looks for"
        yield "engine.nnodes", "is for hosts without Ray, which finds its own", hint


def _of_address(address: str) -> Iterator[tuple[str, str, str | None]]:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        yield _HOST_IP, f'must be an IP address of this host, not "{address}"', None
        return
    if ip.is_unspecified:
        yield _HOST_IP, f"{address} is every address: other hosts could not reach this one by it", "Name one of them"


def notes(settings: Settings) -> Iterator[str]:
    """What only the hosts themselves can tell, and where to look."""
    nodes = settings.engine.get("nnodes", 1)
    if uses_ray(settings):
        yield "whether Ray runs here and has enough GPUs was not checked: `ray status` tells"
        yield "the unit's PrivateTmp hides /tmp/ray from the engine: BindPaths=/tmp/ray in a drop-in"
    elif type(nodes) is int and nodes > 1:
        yield f"each of the {nodes - 1} other hosts must run `vllm serve --headless` with its own --node-rank"
    else:
        return
    if "VLLM_HOST_IP" not in settings.engine_env:
        yield f"{_HOST_IP} is not set: others will reach this host at the address of its default route"
