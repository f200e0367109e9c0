"""What one instance's file asks for, and what of it this machine has."""

from __future__ import annotations

import math
import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from llm_serve.core.devices import Device
from llm_serve.core.doctor.instance import GpuRoom, MemoryFacts, ModelFacts, PortFacts, Wish
from llm_serve.core.doctor.limits import Place
from llm_serve.core.errors import ConfigError
from llm_serve.core.settings import Settings
from llm_serve.host import cgroup, gpu_gate
from llm_serve.host.doctor import limits
from llm_serve.host.doctor.gpus import opened
from llm_serve.host.instances import read_instance
from llm_serve.host.listening import probe
from llm_serve.host.names import CONFIG_DIRECTORY, instance_names
from llm_serve.host.processes import holder_of_port

_SERVICE_USER = "llm-serve"
_SYSTEM_CACHE, _SYSTEM_STATE = Path("/var/cache/llm-serve"), Path("/var/lib/llm-serve")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_DEFAULT_UTILIZATION = 0.92
"""vLLM 0.32's own default."""
_GIB = 1 << 30


def wish(settings: Settings) -> Wish:
    """The part of a file that the machine has to provide."""
    engine = settings.engine
    shards = math.prod(_ways(engine, name) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    utilization = engine.get("gpu_memory_utilization", _DEFAULT_UTILIZATION)
    return Wish(
        listen=str(settings.server.listen_on),
        devices=_indices(settings.gpu.devices),
        world=shards * _ways(engine, "data_parallel_size"),
        shards=shards,
        utilization=float(utilization) if isinstance(utilization, int | float) else _DEFAULT_UTILIZATION,
    )


def _indices(devices: tuple[Device, ...] | None) -> tuple[Device, ...] | None:
    """GPUs by index; those that the driver does not know keep the name that they have in the file."""
    if devices is None or all(isinstance(device, int) for device in devices):
        return devices
    with opened() as gpus:
        known = gpu_gate.by_name(gpus.devices())
    return tuple(known[device].index if device in known else device for device in devices)


def _ways(engine: Mapping[str, Any], name: str) -> int:
    """What is no number is for vLLM to refuse."""
    size = engine.get(name, 1)
    return size if isinstance(size, int) and size > 0 else 1


def service_user(settings: Settings) -> str:
    """Whose rights count: the service's where the file is installed and we may ask for others; empty for our own."""
    is_installed = Path(settings.source).parent == CONFIG_DIRECTORY
    if not is_installed or os.geteuid():
        return ""
    try:
        pwd.getpwnam(_SERVICE_USER)
    except KeyError:
        return ""
    return _SERVICE_USER


def port(settings: Settings, *, is_running: bool, directory: Path = CONFIG_DIRECTORY) -> PortFacts:
    """Whether its address can be listened on now."""
    listen = settings.server.listen_on
    error = probe(listen)
    holder = holder_of_port(listen.port) if error and listen.port else None
    return PortFacts(
        listen=settings.server.listen,
        is_running=is_running,
        error=error,
        holder=holder or "",
        rivals=_rivals(settings, directory),
        is_root=not os.geteuid(),
    )


def _rivals(settings: Settings, directory: Path) -> tuple[str, ...]:
    """Other files with the same port or path."""
    ours, found = settings.server.listen_on, []
    for name in instance_names(directory):
        try:
            other, _ = read_instance(name, directory)
        except ConfigError:
            continue
        theirs = other.server.listen_on
        is_same = (theirs.port, theirs.path) == (ours.port, ours.path)
        if is_same and Path(other.source).resolve() != Path(settings.source).resolve():
            found.append(other.source)
    return tuple(found)


def gpu_rooms() -> dict[int, GpuRoom]:
    """The GPUs that are there."""
    with opened() as gpus:
        asked = {gpu.index: (gpu.name, gpus.memory(gpu.index)) for gpu in gpus.devices()}
    return {index: GpuRoom(name, memory.total, memory.free) for index, (name, memory) in asked.items() if memory}


def model(settings: Settings, problems: tuple[str, ...], environ: Mapping[str, str]) -> ModelFacts:
    """The model's files. `problems` are what is wrong with them, as far as they can be read."""
    path = Path(settings.model).expanduser()
    if not (settings.model.startswith(("/", ".", "~")) or path.is_dir()):
        cache = _hub_cache(settings, environ)
        return ModelFacts(
            settings.model, is_folder=False, cache=str(cache), is_cached=_is_cached(cache, settings.model)
        )
    if not path.is_dir():
        return ModelFacts(settings.model, is_folder=True)
    user = service_user(settings)
    files = [path, *path.glob("*")]
    is_readable = all(limits.may_read(file, user) for file in files[:1]) and all(
        limits.may_read(file, user) for file in files if file.is_file()
    )
    who = "" if is_readable else user or limits.user_name()
    return ModelFacts(
        settings.model,
        is_folder=True,
        exists=True,
        weight_bytes=weight_bytes(path),
        problems=problems,
        unreadable_by=who,
    )


def weight_bytes(folder: Path) -> int:
    """Of the format that would be loaded: safetensors where there are any."""
    for pattern in _WEIGHTS:
        if files := list(folder.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    return 0


def _hub_cache(settings: Settings, environ: Mapping[str, str]) -> Path:
    merged = {**environ, **settings.engine_env}
    if cache := merged.get("HF_HUB_CACHE"):
        return Path(cache)
    if is_served(settings):
        return _SYSTEM_CACHE / "huggingface/hub"
    home = merged.get("HF_HOME") or Path(merged.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def _is_cached(cache: Path, name: str) -> bool:
    return (cache / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def is_served(settings: Settings) -> bool:
    """True where its unit would run it: the file is installed, and so is the service's user."""
    if Path(settings.source).parent != CONFIG_DIRECTORY:
        return False
    return _SYSTEM_CACHE.is_dir()


def places(settings: Settings, environ: Mapping[str, str]) -> tuple[Place, ...]:
    """The folders that this instance writes to: its unit's, else those of a daemon started from here."""
    if not is_served(settings):
        return tuple(limits.places({**environ, **settings.engine_env}))
    named = {
        "CACHE_DIRECTORY": _SYSTEM_CACHE / settings.name,
        "HF_HOME": _SYSTEM_CACHE / "huggingface",
        "STATE_DIRECTORY": _SYSTEM_STATE / settings.name,
    }
    user, asking = service_user(settings), limits.user_name()
    if not user and asking != _SERVICE_USER:
        return tuple(Place(name, str(path), unseen_by=asking) for name, path in named.items())
    return tuple(limits.place(name, path, user) for name, path in named.items())


def memory(settings: Settings, weights: int, gpus: Mapping[int, GpuRoom], *, is_for_gpu: bool) -> MemoryFacts:
    """What there is, and what the file asks for at least."""
    engine, asked = settings.engine, wish(settings)
    chosen: tuple[Device, ...] = tuple(sorted(gpus)) if asked.devices is None else asked.devices
    used = [gpus[index].total_bytes for index in chosen[: asked.world] if isinstance(index, int) and index in gpus]
    total, limit = psutil.virtual_memory(), cgroup.memory_limit()
    room = total.total if limit is None else min(limit, total.total)
    cache = engine.get("kv_cache_memory_bytes", 0)
    offload = engine.get("cpu_offload_gb", 0)
    return MemoryFacts(
        weight_bytes=weights,
        cache_bytes=cache if isinstance(cache, int) else 0,
        offload_bytes=int(offload * _GIB) if isinstance(offload, int | float) else 0,
        total_bytes=room,
        available_bytes=min(room, total.available),
        gpu_bytes=tuple(used) if is_for_gpu else (),
        shards=asked.shards,
        utilization=asked.utilization,
    )


def listens(path: Path) -> bool:
    """True when a daemon answers on that control socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        return client.connect_ex(str(path)) == 0
