"""Whether this machine has what one instance's file asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llm_serve.core.devices import Device
from llm_serve.core.doctor.findings import Finding, gib, good, not_known, note, problem

_OVERHEAD = 1.1
"""Memory beside the weights that no engine does without: activations, the CUDA context, the programs."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a file asks for: `world` GPUs with the weights cut into `shards`, `utilization` of each."""

    listen: str
    devices: tuple[Device, ...] | None = None
    """By index where the driver knows the GPU."""
    world: int = 1
    shards: int = 1
    utilization: float = 0.92


@dataclass(frozen=True, slots=True)
class PortFacts:
    """The address of an instance: who has it, and which other files want it."""

    listen: str
    is_running: bool = False
    error: str = ""
    """Why it cannot be bound now; empty where it can."""
    holder: str = ""
    """Who listens there, as far as can be seen."""
    rivals: tuple[str, ...] = ()
    is_root: bool = False


def judge_port(facts: PortFacts, check: str = "port") -> Iterator[Finding]:
    """Whether the instance can listen."""
    if facts.rivals:
        found = f"{', '.join(facts.rivals)} asks for {facts.listen}, too"
        yield problem(f"{check}.rivals", found, "Only one of them can run.", "Give each its own server.listen.")
    if not facts.error:
        yield good(check, f"{facts.listen} is free")
    elif facts.is_running:
        yield good(check, f"{facts.listen} is this instance's own: it runs")
    elif facts.holder:
        cure = "Stop that, or change server.listen."
        yield problem(
            check, f"{facts.listen} is in use by {facts.holder}", "The instance does not start (exit 75).", cure
        )
    else:
        who = "" if facts.is_root else "; root would see by whom (sudo ss -ltnp)"
        means = "The instance does not start (exit 75 or 78)."
        yield problem(
            check, f"cannot listen on {facts.listen}: {facts.error}{who}", means, "Change server.listen, or free it."
        )


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """One GPU that is there: bytes."""

    name: str
    total_bytes: int
    free_bytes: int


def judge_gpus(wish: Wish, gpus: Mapping[int, GpuRoom], *, is_running: bool) -> Iterator[Finding]:
    """Whether the GPUs that the file names are there, and free. Call it where an engine would use GPUs."""
    named: tuple[Device, ...] = tuple(sorted(gpus)) if wish.devices is None else wish.devices
    chosen = [index for index in named if isinstance(index, int) and index in gpus]
    if absent := [name for name in named if name not in chosen]:
        there = ", ".join(map(str, sorted(gpus))) or "none"
        found = f"gpu.devices names {', '.join(map(str, absent))}; there are {there}"
        yield problem(
            "instance.gpus", found, "A start waits gpu.wait_timeout_s for them, and gives up.", "Correct gpu.devices."
        )
        return
    if wish.world > len(chosen):
        found = f"the engine asks for {wish.world} GPUs and may use {len(chosen)}"
        cure = "Lower tensor_parallel_size or pipeline_parallel_size, or name more in gpu.devices."
        yield problem("instance.gpus", found, "The engine does not start.", cure)
        return
    for index in chosen[: wish.world]:
        yield _room(index, gpus[index], wish, is_running=is_running)


def _room(index: int, gpu: GpuRoom, wish: Wish, *, is_running: bool) -> Finding:
    wanted = gpu.total_bytes * wish.utilization
    found = f"GPU {index}: {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} are free, the engine takes {gib(wanted)}"
    if gpu.free_bytes >= wanted or is_running:
        return good(f"instance.gpu.{index}", found)
    means = "A start waits for the memory, and then takes a smaller plan beside whoever holds it."
    cure = f"Stop who holds it, or gpu_memory_utilization = {max(0.0, gpu.free_bytes / gpu.total_bytes - 0.02):.2f}"
    return note(f"instance.gpu.{index}", found, means, cure)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model: a folder with its weights, in bytes, or a name of the hub."""

    model: str
    is_folder: bool
    exists: bool = False
    weight_bytes: int = 0
    problems: tuple[str, ...] = ()
    unreadable_by: str = ""
    """The user that cannot read it; empty where the service's can."""
    cache: str = ""
    """Where a model of the hub is kept."""
    is_cached: bool = False


def judge_model(facts: ModelFacts) -> Iterator[Finding]:
    """Whether the files are there, whole and readable."""
    if not facts.is_folder:
        if facts.is_cached:
            yield good("instance.model", f"{facts.model} is in {facts.cache}")
        else:
            means = "It is downloaded at the first start, which needs the network and room on that disk."
            yield note(
                "instance.model", f"{facts.model} is not in {facts.cache} yet", means, f"hf download {facts.model}"
            )
        return
    if not facts.exists:
        means = "The instance does not start (exit 78)."
        yield problem(
            "instance.model", f"{facts.model} does not exist", means, "Correct model, or put the files there."
        )
    elif facts.unreadable_by:
        means = "The service cannot load it."
        cure = f"chmod -R o+rX {facts.model}, and o+x for the folders above; ProtectHome= hides /home and /root"
        yield problem("instance.model", f"{facts.unreadable_by} cannot read {facts.model}", means, cure)
    elif facts.problems:
        for each in facts.problems:
            yield problem("instance.model", each, "The instance does not start (exit 78).", "Download the model again.")
    else:
        yield good("instance.model", f"{facts.model}: {gib(facts.weight_bytes)} of weights, whole")


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """What an engine of this file needs at least, and what there is, in bytes."""

    weight_bytes: int = 0
    cache_bytes: int = 0
    """KV cache in main memory, for an engine on the CPU; 0 where vLLM chooses."""
    offload_bytes: int = 0
    """Weights and cache that a GPU's engine keeps in main memory."""
    total_bytes: int = 0
    available_bytes: int = 0
    gpu_bytes: tuple[int, ...] = ()
    """Of each GPU that it uses; none for an engine on the CPU."""
    shards: int = 1
    """Into how many parts the weights are cut, one for a GPU; data parallel engines hold them all."""
    utilization: float = 0.92


def judge_memory(facts: MemoryFacts, *, is_running: bool) -> Iterator[Finding]:
    """Whether the weights can fit at all. How long a context then fits, a start finds out."""
    if not facts.weight_bytes:
        yield not_known("instance.memory", "the size of the weights is not known here")
        return
    if not facts.gpu_bytes:
        needed = facts.weight_bytes * _OVERHEAD + facts.cache_bytes
        yield _main_memory(needed, facts, is_running=is_running)
        return
    share = max(0.0, facts.weight_bytes * _OVERHEAD - facts.offload_bytes) / facts.shards
    room = min(facts.gpu_bytes) * facts.utilization
    found = f"the weights take about {gib(share)} of the {gib(room)} that the engine may use of each GPU"
    if share > room:
        cure = "More GPUs (tensor_parallel_size), a quantized model, or cpu_offload_gb"
        yield problem("instance.memory", found, "They do not fit (exit 78).", cure)
    else:
        yield good("instance.memory", found)
    if facts.offload_bytes:
        yield _main_memory(facts.offload_bytes, facts, is_running=is_running)


def _main_memory(needed: float, facts: MemoryFacts, *, is_running: bool) -> Finding:
    there = f"{gib(facts.available_bytes)} of {gib(facts.total_bytes)} are available"
    found = f"about {gib(needed)} of main memory are needed, {there}"
    if needed > facts.total_bytes:
        cure = "A smaller or quantized model, a smaller kv_cache_memory_bytes, or more memory (MemoryMax=, --memory)"
        return problem("instance.main_memory", found, "The kernel kills the engine for memory.", cure)
    if needed > facts.available_bytes and not is_running:
        return note("instance.main_memory", found, "Others have to give some back first.", "Stop what uses it.")
    return good("instance.main_memory", found)
