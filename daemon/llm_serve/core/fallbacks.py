"""Another way of computing the same plan, for when the one at hand does not work on this machine.

Nothing gets smaller here; things may get slower. What fell and why is in the step's reason, and remembered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llm_serve.core.course import Course, Effective, Step
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.ladder import NoStep

AUTO_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
"""What "auto" falls back through: in the order of vLLM's own preference; it refuses those that are not valid here."""

MLA_BACKENDS = ("FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "TRITON_MLA")
"""The same for models with latent attention (DeepSeek and its kin), for which none of the others is valid."""

_Way = tuple[str, dict[str, Any], dict[str, str]]
"""What is changed, in words, and the arguments and the environment that change it."""

_BECAUSE = ", because of "


def next_step(course: Course, failure: Failure, now: Effective, backends: tuple[str, ...]) -> Step | NoStep:
    """The next way that this course has not gone yet."""
    for words, arguments, env in _ways(course, failure, now, backends):
        if _changes(course, arguments, env):
            links = f" There is no P2P between {', '.join(failure.no_p2p)}." if failure.no_p2p else ""
            reason = f"{words}{_BECAUSE}{failure.kind.value} ({failure.place.value}): {failure.detail}{links}"
            return Step(failure.kind, failure.place, reason, arguments, env, is_rung=False)
    return NoStep(_ADVICE.get(failure.kind, "No other way of computing is left to try."))


def _changes(course: Course, arguments: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    plan = course.plan
    return any(plan.arguments.get(name) != value for name, value in arguments.items()) or any(
        plan.env.get(name) != value for name, value in env.items()
    )


def _ways(course: Course, failure: Failure, now: Effective, backends: tuple[str, ...]) -> Iterator[_Way]:
    """The rows: what may help against this failure, the mildest first."""
    other = _other_backends(course, failure, now, backends)
    match failure.kind, failure.place:
        case Kind.compilation, _ if not now.enforce_eager:
            yield _setting("VLLM_DISABLE_COMPILE_CACHE", "1", course)
            yield from _eager(now)
        case _ if now.device == "cpu":
            return
        case Kind.attention_backend, _:
            yield from other
        case Kind.flashinfer, _:
            yield _setting("VLLM_USE_FLASHINFER_SAMPLER", "0", course)
            yield from (way for way in other if "FLASHINFER" not in way[1]["attention_backend"])
        case Kind.graph_capture, _:
            yield from _without_graphs(course, now)
            yield from _eager(now)
        case (Kind.communication, _) | ((Kind.start_timeout | Kind.start_stalled), Place.start):
            yield from _without_p2p(course, now)
        case ((Kind.start_timeout | Kind.start_stalled), place) if place is not Place.loading:
            # GPUs that meet at all have passed their first exchange by now, unless the driver knows better.
            yield from _without_p2p(course, now) if failure.no_p2p else ()
            yield from (*_without_graphs(course, now), *_eager(now)) if place is Place.capture else other
            yield from _without_p2p(course, now)
        case Kind.stalled, _:
            yield from _without_p2p(course, now) if failure.no_p2p else _without_custom_all_reduce(now)
            yield from _eager(now)
            yield from other
        case ((Kind.device_error | Kind.crashed), _):
            yield from _without_p2p(course, now) if failure.no_p2p else ()
            yield from _eager(now)
            yield from other
        case Kind.host_out_of_memory, _:
            yield from _unbound(now)


def _other_backends(course: Course, failure: Failure, now: Effective, backends: tuple[str, ...]) -> Iterator[_Way]:
    """Each backend once, but for the one at hand; what is most likely the one that fell already comes last."""
    details = [f"{failure.kind}: {failure.detail}", *(step.reason.partition(_BECAUSE)[2] for step in course.steps)]
    if _NONE_VALID in failure.detail:
        return
    choices = _choices(details, now, backends)
    at_hand = now.attention_backend or _asked_backend(course.plan.arguments)
    asked = _asked_backend(course.asked.arguments)
    tried = {step.arguments.get("attention_backend") for step in course.steps} | {at_hand, asked}
    suspects = {name for name in choices if any(_is_named(name, detail) for detail in details)}
    if not suspects and asked is None:
        # vLLM has chosen, a hang does not say what, and the first is what it likes best.
        suspects = set(choices[:1])
    for name in sorted(choices, key=suspects.__contains__):
        if name not in tried:
            yield f"attention_backend {at_hand or 'of vLLM'} -> {name}", _with_backend(course, name), {}


_NONE_VALID = "No valid attention backend found"
"""vLLM has asked every backend then: none of them takes this dtype, block size or GPU."""


def _choices(details: list[str], now: Effective, backends: tuple[str, ...]) -> tuple[str, ...]:
    is_none = any(_HAS_NO_MLA in detail for detail in details)
    is_mla = not is_none and ("MLA" in (now.attention_backend or "") or any(map(_NEEDS_MLA.search, details)))
    return MLA_BACKENDS if is_mla and backends == AUTO_BACKENDS else backends


_NEEDS_MLA = re.compile(r"(?<!non-)\bMLA not supported")
"""vLLM's reason against a backend that does not know latent attention."""


_HAS_NO_MLA = "non-MLA not supported"
"""Its reason against one for latent attention only, which a file may name for a model that has none."""


def _asked_backend(arguments: Mapping[str, Any]) -> str | None:
    name = arguments.get("attention_backend") or _mapping(arguments.get("attention_config")).get("backend")
    return str(name) if name else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_named(name: str, detail: str) -> bool:
    """True for FLASH_ATTN in "flash_attn" and in "FlashAttention"."""
    short, text = name.replace("_", "").lower(), re.sub(r"[\s_-]", "", detail).lower()
    return short in text or short.replace("attn", "attention") in text


def _with_backend(course: Course, name: str) -> dict[str, Any]:
    """The arguments for it, for vLLM refuses a backend that is named twice."""
    config = _mapping(course.plan.arguments.get("attention_config"))
    rest = {key: value for key, value in config.items() if key != "backend"}
    return {"attention_backend": name} | ({} if rest == config else {"attention_config": rest or None})


def _setting(name: str, value: str, course: Course) -> _Way:
    return f"{name} {course.plan.env.get(name, 'unset')} -> {value}", {}, {name: value}


def _eager(now: Effective) -> Iterator[_Way]:
    if not now.enforce_eager:
        yield "enforce_eager false -> true (no compilation, no CUDA graphs)", {"enforce_eager": True}, {}


def _without_graphs(course: Course, now: Effective) -> Iterator[_Way]:
    """Compilation stays: it is worth more than the graphs."""
    asked = course.plan.arguments.get("compilation_config")
    if not now.enforce_eager and (asked is None or isinstance(asked, Mapping)):
        merged = {**_mapping(asked), "cudagraph_mode": "NONE"}
        before = _mapping(asked).get("cudagraph_mode", "of vLLM")
        yield f"cudagraph_mode {before} -> NONE", {"compilation_config": merged}, {}


def _without_p2p(course: Course, now: Effective) -> Iterator[_Way]:
    """The known cure where GPUs cannot write into each other's memory, or an IOMMU drops what they write."""
    if now.world_size > 1:
        words, _, env = _setting("NCCL_P2P_DISABLE", "1", course)
        reduces = str(course.plan.arguments.get("disable_custom_all_reduce", False)).lower()
        yield f"{words}, disable_custom_all_reduce {reduces} -> true", {"disable_custom_all_reduce": True}, env


def _without_custom_all_reduce(now: Effective) -> Iterator[_Way]:
    if now.tensor_parallel_size > 1:
        yield "disable_custom_all_reduce false -> true", {"disable_custom_all_reduce": True}, {}


def _unbound(now: Effective) -> Iterator[_Way]:
    """One node has run out of memory while another may have some."""
    if now.numa_bind:
        arguments = {"numa_bind": False, "numa_bind_nodes": None, "numa_bind_cpus": None}
        yield "numa_bind true -> false (memory of every NUMA node)", arguments, {}


_SLOW = (
    "If the start is only slow, raise recovery.start_timeout_s; the stacks of a start that hangs are in the journal. "
)
_ADVICE = {
    Kind.attention_backend: "No attention backend of recovery.attention_backends works here: name others, or leave "
    "engine.kv_cache_dtype and engine.block_size to vLLM, which some backends do not take.",
    Kind.flashinfer: "FlashInfer compiles kernels at run time: put nvcc (CUDA_HOME) and ninja on the unit's PATH, or "
    "run `vllm download-kernels`.",
    Kind.compilation: "The model cannot be compiled here, or is not compiled at all: see the errors in the journal, "
    "and install gcc and Python's headers where they are missing.",
    Kind.graph_capture: "CUDA graphs are off already: see the errors in the journal.",
    Kind.communication: "The GPUs cannot talk to each other: switch the IOMMU or PCIe ACS off, enlarge /dev/shm, or "
    "set NCCL_DEBUG=INFO in [engine.env] and read the journal.",
    Kind.start_timeout: _SLOW + "No other way of computing is left to try.",
    Kind.start_stalled: _SLOW + "No other way of computing is left to try.",
    Kind.stalled: "No other way of computing is left to try: the stacks in the journal say where it hangs.",
    Kind.device_error: "No other way of computing is left to try: look for Xid lines in the kernel's log, and test the "
    "GPU with `llm-serve stress`.",
    Kind.crashed: "No other way of computing is left to try: see the engine's last words in the journal.",
}
