"""The next smaller plan after a failure for memory, or why there is none: one rung a failure, never under the floors.

What a lever does (vLLM gives the KV cache what it saves elsewhere): only less `gpu_memory_utilization`, or a smaller
`kv_cache_memory_bytes`, leaves memory free at run time. `max_num_batched_tokens` lowers the peak of one step,
`max_num_seqs` the sampler's part and the number of CUDA graphs, `max_model_len` what one request needs of the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from llm_serve.core.course import Course, Effective, Floors, Step
from llm_serve.core.evidence import Failure, Kind, Place

LEAST_UTILIZATION = 0.30
LEAST_BATCHED_TOKENS = 512
LEAST_SHARE_OF_POOL = 8
"""A fixed KV cache never gets smaller than what was asked for, divided by this."""

_GIB = 1 << 30
_MARGIN_BYTES = 256 << 20
# vLLM's default is 0.92 (0.90 before); where the real one is unknown, the lower guess can raise nothing.
_ASSUMED_UTILIZATION = 0.90
# vLLM's CPU platform reads the size of the KV cache from here, in whole GiB, whatever the argument says.
_CPU_POOL = "VLLM_CPU_KVCACHE_SPACE"
# It fixes the pool to a size of an earlier start, whose key does not name the utilization (vLLM 0.32).
_STARTUP_PLAN = "VLLM_ENABLE_STARTUP_PLAN"
# Graphs are captured up to min(2 * max_num_seqs, 512): what is above this many sequences adds none.
_SEQS_WITH_GRAPHS = 256


@dataclass(frozen=True, slots=True)
class NoStep:
    """No plan of this kind helps any more."""

    advice: str
    """What a person can do, in a sentence or two."""


@dataclass(frozen=True, slots=True)
class _At:
    """Where the ladder stands when it is asked."""

    course: Course
    failure: Failure
    now: Effective
    floors: Floors

    def value(self, name: str) -> Any:
        """What the engine was built with; else what the plan says, if that is a number."""
        known, said = getattr(self.now, name), self.course.plan.arguments.get(name)
        return known if known is not None else said if _is_amount(said) else None

    def most(self, name: str) -> float:
        """What it cannot have been above: its value, or what vLLM checks that against."""
        batch = self.value("max_num_batched_tokens") or math.inf
        bound = math.inf if name == "max_model_len" and self.now.chunked_prefill else batch
        return float(self.value(name) or bound)

    def with_changes(self, changes: Changes) -> _At:
        """The same place, seen by the next lever of one rung."""
        return replace(self, now=replace(self.now, **changes))


Changes = dict[str, Any]
_Lever = Callable[[_At], Changes]


def next_step(course: Course, failure: Failure, now: Effective, floors: Floors) -> Step | NoStep:
    """The next rung for this failure of an engine that was built with `now`.

    The levers of a row are tried in order; the first that still moves anything is the rung. Nothing is ever raised, so
    what the file asks for below a floor stays as it is.
    """
    at = _At(course, failure, now, floors)
    for lever in _levers(at):
        if changes := lever(at):
            return _step(at, changes)
    return NoStep(_advice(at))


def _levers(at: _At) -> Iterator[_Lever]:
    """The rows of the ladder. A kind or place without a row has no smaller plan."""
    match at.failure.kind, at.failure.place:
        case Kind.kv_cache_too_small, _:
            yield _to_the_estimate
        case Kind.no_kv_cache, _:
            # Eager gives back what is set aside for graphs, and costs less than the second half of the sequences.
            yield from (_halve_batch, _at_most(1, _halve_seqs), _eager, _halve_seqs)
        case Kind.too_many_sequences, _:
            yield _to_fitting_seqs
        case Kind.memory_held | Kind.share_too_large, _:
            yield _fit_beside
        case Kind.out_of_memory, Place.profiling:
            yield from (_halve_batch, _halve_seqs)
        case Kind.out_of_memory, Place.warm_up:
            yield from (_at_most(1, _halve_seqs), _less_pool, _halve_seqs)
        case Kind.out_of_memory, Place.capture:
            # The pool is there by now, and graphs need what is outside of it: only a smaller pool makes room. With
            # fewer sequences vLLM expects fewer graphs and gives what they would take to the pool.
            yield from (_at_most(2, _less_pool), _at_most(1, _fewer_graphs), _eager)
        case Kind.out_of_memory, Place.kv_cache:
            yield _less_pool
        case Kind.out_of_memory, Place.start:
            yield from (_less_pool, _halve_batch, _halve_seqs)
        case Kind.out_of_memory, Place.serving:
            yield from _serving_rungs(at)
        case Kind.host_out_of_memory, place if at.now.device == "cpu" and place is not Place.loading:
            yield from _serving_rungs(at)


def _serving_rungs(at: _At) -> Iterator[_Lever]:
    """Slack in the pool and half of the sequences, so that it keeps its promise; later smaller steps and requests."""
    rungs = (
        _all_of(_less_pool, _halve_seqs),
        _all_of(_less_pool, _halve_seqs, _halve_batch),
        _all_of(_less_pool, _halve_seqs, _halve_length, _halve_batch),
    )
    taken = at.course.taken(Kind.out_of_memory, Place.serving) + at.course.taken(Kind.host_out_of_memory)
    yield from rungs[min(taken, len(rungs) - 1) :]


def _all_of(*levers: _Lever) -> _Lever:
    def pull(at: _At) -> Changes:
        changes: Changes = {}
        for lever in levers:
            changes |= lever(at.with_changes(changes))
        return changes

    return pull


def _at_most(times: int, lever: _Lever) -> _Lever:
    """The lever, until so many rungs for this kind at this place have moved what it moves."""

    def pull(at: _At) -> Changes:
        changes = lever(at)
        mine = (step for step in at.course.steps if (step.kind, step.place) == (at.failure.kind, at.failure.place))
        return changes if sum(not changes.keys().isdisjoint(step.arguments) for step in mine) < times else {}

    return pull


# The levers: what changes, or nothing where this one is at its end.
def _to_the_estimate(at: _At) -> Changes:
    """One block less than vLLM's estimate, in whole blocks: it is exact, and the next pool may be a little smaller."""
    estimate, most, floor = at.failure.fitting_model_len, at.most("max_model_len"), at.floors.max_model_len
    if estimate is None or estimate >= most:
        return _halve_length(at)
    # Where that was not enough, the pool differs more from start to start.
    margin = estimate // 16 if at.course.taken(Kind.kv_cache_too_small) else 0
    block = at.now.block_size
    fitting = max((estimate - margin) // block * block - block, floor)
    return {"max_model_len": fitting} if fitting <= estimate else {}


def _to_fitting_seqs(at: _At) -> Changes:
    fitting = at.failure.fitting_num_seqs
    if fitting is None or fitting >= at.most("max_num_seqs"):
        return _halve_seqs(at)
    return {"max_num_seqs": fitting} if fitting >= at.floors.max_num_seqs else {}


def _halve_length(at: _At) -> Changes:
    return _halved(at, "max_model_len", at.floors.max_model_len)


def _halve_seqs(at: _At) -> Changes:
    return _halved(at, "max_num_seqs", at.floors.max_num_seqs)


def _fewer_graphs(at: _At) -> Changes:
    seqs = at.value("max_num_seqs")
    if seqs is None or seqs <= _SEQS_WITH_GRAPHS:
        return _halve_seqs(at)
    return {"max_num_seqs": max(_SEQS_WITH_GRAPHS // 2, at.floors.max_num_seqs)} if _halve_seqs(at) else {}


def _halve_batch(at: _At) -> Changes:
    """A step has to hold a token of each sequence, and, without chunked prefill, a whole prompt: vLLM checks it."""
    if at.course.plan.arguments.get("disable_chunked_mm_input"):
        return {}  # A step has to hold the largest image as well, and its size is not known here.
    drafted = at.course.plan.arguments.get("speculative_config")
    tokens = drafted.get("num_speculative_tokens") if isinstance(drafted, Mapping) else None
    seqs = (at.value("max_num_seqs") or 1) * (1 + (tokens if _is_amount(tokens) else 0))
    length = 1 if at.now.chunked_prefill else at.value("max_model_len") or math.inf
    return _halved(at, "max_num_batched_tokens", max(seqs, length, LEAST_BATCHED_TOKENS))


def _halved(at: _At, name: str, floor: float) -> Changes:
    value = at.value(name)
    return {} if value is None or value <= floor else {name: max(value // 2, floor)}


def _eager(at: _At) -> Changes:
    return {} if at.now.enforce_eager or at.now.device == "cpu" else {"enforce_eager": True}


def _less_pool(at: _At) -> Changes:
    """Leave the failed allocation and a margin free: of the pool where its size is fixed, else of the device."""
    pool = at.value("kv_cache_memory_bytes")
    return _less_utilization(at) if pool is None else _less_fixed_pool(at, pool)


def _less_utilization(at: _At) -> Changes:
    share = at.value("gpu_memory_utilization") or _ASSUMED_UTILIZATION
    total = at.now.device_memory_bytes or at.failure.total_bytes
    least = 0.25 * share if at.failure.kind is Kind.host_out_of_memory else _LEAST_DROP.get(at.failure.place, 0.03)
    drop = max(least * _growth(at), _wanted_bytes(at) / total if total else 0.05)
    lower = max(_floor_2(share - drop), LEAST_UTILIZATION)
    return {"gpu_memory_utilization": lower} if lower < share else {}


_LEAST_DROP = {Place.serving: 0.02, Place.capture: 0.02}


def _less_fixed_pool(at: _At, pool: int) -> Changes:
    least = 0.25 if at.failure.kind is Kind.host_out_of_memory else 0.05
    given_up = max(_wanted_bytes(at), math.ceil(pool * least * _growth(at)))
    # What is wanted may be more than there is: half of the pool is a rung too.
    return _fixed_pool(at, pool, max(pool - given_up, pool // 2, _least_pool(at, pool)))


def _fixed_pool(at: _At, pool: int, size: int) -> Changes:
    """A pool of at most `size` bytes, where that is less than it was and not too little."""
    unit = _GIB if _is_pool_of_env(at) else 1
    smaller = size // unit * unit
    return {"kv_cache_memory_bytes": smaller} if max(_least_pool(at, pool), unit) <= smaller < pool else {}


def _least_pool(at: _At, pool: int) -> int:
    said = (at.course.asked.arguments, *(step.arguments for step in at.course.steps))
    sizes = (each.get("kv_cache_memory_bytes") for each in said)
    return max(pool, *(size for size in sizes if _is_amount(size)), 0) // LEAST_SHARE_OF_POOL


def _is_pool_of_env(at: _At) -> bool:
    """True where the environment fixes the pool: the plan's, or the daemon's own, for then no argument does."""
    plan = at.course.plan
    return at.now.device == "cpu" and (bool(plan.env.get(_CPU_POOL)) or "kv_cache_memory_bytes" not in plan.arguments)


def _wanted_bytes(at: _At) -> int:
    return int((at.failure.tried_bytes or 0) * 1.25) + _MARGIN_BYTES


def _growth(at: _At) -> int:
    """Before it serves, the failed allocation is not the last one: what was not enough is doubled."""
    is_measured = at.failure.place in (Place.serving, Place.capture) or at.failure.kind is Kind.host_out_of_memory
    return 1 if is_measured else int(2 ** min(at.course.taken(at.failure.kind, at.failure.place), 8))


def _fit_beside(at: _At) -> Changes:
    """Take what the driver and others leave. Nothing else is made smaller for their sake."""
    free, total, pool = at.failure.free_bytes, at.failure.total_bytes, at.value("kv_cache_memory_bytes")
    if not free or not total:
        return {}
    if at.now.device == "cpu" and pool is not None:
        # vLLM looks at no utilization then, and compares the fixed pool itself with what is free.
        return _fixed_pool(at, pool, free // 100 * 95)
    fitting = _floor_2(free / total - 0.01)
    share = at.value("gpu_memory_utilization") or _ASSUMED_UTILIZATION
    return {"gpu_memory_utilization": fitting} if LEAST_UTILIZATION <= fitting < share else {}


def _floor_2(share: float) -> float:
    return math.floor(round(share * 100, 6)) / 100


def _is_amount(value: object) -> TypeGuard[int]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# What follows from a change, and the words for it.
def _step(at: _At, changes: Changes) -> Step:
    arguments = changes | _follow(at, changes)
    said = ", ".join(f"{name} {_shown(_before(at, name))} -> {_shown(value)}" for name, value in arguments.items())
    costs = " ".join(_COSTS[name] for name in changes)
    reason = f"{said}, because {_cause(at)}. {costs}"
    return Step(at.failure.kind, at.failure.place, reason, arguments, _env(at, changes), is_rung=True)


def _follow(at: _At, changes: Changes) -> Changes:
    """Arguments that vLLM refuses when they are above one that has been lowered."""
    said = at.course.plan.arguments
    pairs = (("max_num_active_seqs", "max_num_seqs"), ("long_prefill_token_threshold", "max_model_len"))
    lowered = ((name, said.get(name), changes[above]) for name, above in pairs if above in changes)
    return {name: most for name, value, most in lowered if _is_amount(value) and value > most}


def _env(at: _At, changes: Changes) -> dict[str, str]:
    """What would bring the failed size back, switched off."""
    env = {}
    if at.course.plan.env.get(_STARTUP_PLAN, "0") != "0":
        env[_STARTUP_PLAN] = "0"
    if (pool := changes.get("kv_cache_memory_bytes")) is not None and _is_pool_of_env(at):
        env[_CPU_POOL] = str(pool // _GIB)
    return env


def _before(at: _At, name: str) -> Any:
    return at.value(name) if hasattr(at.now, name) else at.course.plan.arguments.get(name)


def _cause(at: _At) -> str:
    failure = at.failure
    match failure.kind:
        case Kind.kv_cache_too_small:
            fits = f" ({failure.fitting_model_len} tokens fit)" if failure.fitting_model_len else ""
            return f"the KV cache cannot hold one request of that length{fits}"
        case Kind.no_kv_cache:
            return "nothing was left for the KV cache"
        case Kind.too_many_sequences:
            return f"the KV cache holds {_or_fewer(failure.fitting_num_seqs)} sequences"
        case Kind.memory_held | Kind.share_too_large:
            return f"only {_shown_bytes(failure.free_bytes)} of {_shown_bytes(failure.total_bytes)} are free"
        case Kind.host_out_of_memory:
            return "the kernel killed the engine for memory, and the KV cache lies in the host's"
        case _:
            tried = f", where {_shown_bytes(failure.tried_bytes)} more were wanted" if failure.tried_bytes else ""
            return f"memory ran out {_DURING[failure.place]}{tried}"


def _or_fewer(number: int | None) -> str:
    return "fewer" if number is None else f"only {number}"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "vLLM's default"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case int() if value >= 64 << 20:
            return _shown_bytes(value)
        case _:
            return str(value)


def _shown_bytes(size: int | None) -> str:
    if size is None:
        return "an unknown part"
    return f"{size / 2**30:.2f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"


def _advice(at: _At) -> str:
    """What a person can do, in numbers where there are any."""
    failure = at.failure
    share = at.value("gpu_memory_utilization")
    now = f" (now {share:g})" if share else ""
    match failure.kind:
        case Kind.kv_cache_too_small:
            fits = f"{failure.fitting_model_len} tokens fit" if failure.fitting_model_len else "not even one token fits"
            return (
                f"{fits[0].upper()}{fits[1:]}, and recovery.floor_max_model_len is {at.floors.max_model_len}: raise "
                f"engine.gpu_memory_utilization{now} or engine.kv_cache_memory_bytes, set engine.kv_cache_dtype to "
                "fp8, take a quantised model or more GPUs, or lower the floor."
            )
        case Kind.no_kv_cache:
            return f"Raise engine.gpu_memory_utilization{now}, take a smaller or quantised model, or more GPUs."
        case Kind.too_many_sequences:
            return (
                f"The KV cache holds {_or_fewer(failure.fitting_num_seqs)} sequences, and recovery.floor_max_num_seqs "
                f"is {at.floors.max_num_seqs}: raise engine.gpu_memory_utilization{now}, or lower the floor."
            )
        case Kind.memory_held if failure.free_bytes is not None and failure.total_bytes:
            return (
                f"{_shown_bytes(failure.free_bytes)} of {_shown_bytes(failure.total_bytes)} are free, too little to "
                f"start beside the others{now}: stop what holds the rest, or name another GPU in gpu.devices."
            )
        case Kind.out_of_memory if failure.place is not Place.loading:
            return (
                f"Every smaller plan was tried, down to the floors of {at.floors.max_model_len} tokens and "
                f"{at.floors.max_num_seqs} sequences: take a smaller or quantised model or more GPUs, or lower "
                "recovery.floor_max_model_len and recovery.floor_max_num_seqs."
            )
        case _:
            return _ADVICE.get(failure.kind, "No smaller plan helps.")


_DURING = {
    Place.start: "before the weights were loaded",
    Place.loading: "while the weights were loaded",
    Place.profiling: "while the peak of one step was measured",
    Place.kv_cache: "while the KV cache was made",
    Place.warm_up: "while the engine warmed up",
    Place.capture: "while CUDA graphs were captured",
    Place.serving: "while it served",
}

_COSTS = {
    "max_model_len": "Longer requests are refused.",
    "max_num_seqs": "Fewer requests run at a time, the others wait.",
    "max_num_batched_tokens": "Long prompts take more steps.",
    "gpu_memory_utilization": "The KV cache is smaller.",
    "kv_cache_memory_bytes": "The KV cache is smaller.",
    "enforce_eager": "Every step is slower without compilation and CUDA graphs.",
}

_TOO_LARGE = "Take a smaller or quantised model, more GPUs, or engine.cpu_offload_gb."
_ADVICE = {
    Kind.out_of_memory: _TOO_LARGE,
    Kind.weights_do_not_fit: _TOO_LARGE,
    Kind.memory_held: "Stop what holds the memory, or name another GPU in gpu.devices.",
    Kind.host_out_of_memory: "The host's memory, or the control group's limit (MemoryMax= of the unit, --memory of a "
    "container), is too small for this model. Compiling takes less with MAX_JOBS=2 in [engine.env].",
}
