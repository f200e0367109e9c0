"""How an instance file names GPUs, and how many of them its engine takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any

Device = int | str
"""An index, a UUID or a PCI address, in the spelling of the driver."""

_UUID = re.compile(r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}:[0-9a-f]{1,2}\.[0-7])", re.IGNORECASE)
_FORMS = 'an index (0), a UUID ("GPU-...", see nvidia-smi -L) or a PCI address ("0000:1b:00.0")'
_ELSEWHERE = ("distributed_executor_backend", "data_parallel_backend", "nnodes")
_REPLICAS = ("data_parallel_size", "data_parallel_size_local", "data_parallel_rank", "data_parallel_external_lb")
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")

COUNTED = (*_SIZES, *_REPLICAS, *_ELSEWHERE)
"""vLLM's arguments that decide how many GPUs of this machine an engine takes."""


def parse_device(value: object) -> Device:
    """Return the name of a GPU as the driver writes it, or raise ValueError with what is wrong with it."""
    if type(value) is int and value >= 0:
        return value
    text = value if isinstance(value, str) else ""
    if text.upper().startswith("MIG-"):
        raise ValueError(f"{text} is a part of a GPU: set CUDA_VISIBLE_DEVICES in [engine.env] instead")
    if _UUID.fullmatch(text):
        return f"GPU-{text[4:].lower()}"
    if found := _ADDRESS.fullmatch(text):
        bus, _, rest = found[2].partition(":")
        return f"{found[1] or '':0>8}:{bus:0>2}:{rest:0>4}".upper()
    raise ValueError(f"must name each GPU by {_FORMS}, not {json.dumps(value, default=str)}")


def visible_devices(devices: tuple[Device, ...] | None) -> str | None:
    """CUDA_VISIBLE_DEVICES for these GPUs; None where only the driver can tell.

    CUDA knows indices and UUIDs, though not both at once, and no PCI addresses.
    """
    if devices is None or not (all(map(_is_index, devices)) or all(map(_is_uuid, devices))):
        return None
    return ",".join(map(str, devices))


def _is_index(device: Device) -> bool:
    return isinstance(device, int)


def _is_uuid(device: Device) -> bool:
    return isinstance(device, str) and device.startswith("GPU-")


def parallel_sizes(engine: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The sizes that [engine] sets, whose product is the number of GPUs that its processes on this machine take.

    None where other machines may have a part in them.
    """
    if engine.get("distributed_executor_backend") in ("ray", "external_launcher") or "nnodes" in engine:
        return None
    if engine.get("data_parallel_backend") == "ray":
        return None
    replicas = "data_parallel_size_local" if "data_parallel_size_local" in engine else "data_parallel_size"
    is_one_of_many = "data_parallel_rank" in engine or engine.get("data_parallel_external_lb")
    names = _SIZES if is_one_of_many else (*_SIZES, replicas)
    return {name: value for name in names if type(value := engine.get(name)) is int}


def product_in_words(sizes: Mapping[str, int]) -> str:
    """`tensor_parallel_size 2 x pipeline_parallel_size 2 = 4 GPUs`."""
    number = prod(sizes.values())
    return f"{' x '.join(f'{name} {value}' for name, value in sizes.items())} = {number} GPU{'s' * (number != 1)}"
