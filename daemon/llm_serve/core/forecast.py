"""What would become of a start, and the rungs that recovery would take.

`policy` and `ladder` are asked, with failures that follow from sums instead of from an engine's last words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llm_serve.core import ladder, policy
from llm_serve.core.course import Course, Effective, Step
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.footprint import Budget, Cache, Footprint, blocks_in, budget, longest, steps_of_seqs

_MOST_RUNGS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What fits at one max_num_seqs."""

    max_num_seqs: int
    tokens_each: int
    """Longest requests of which so many run at once; 0 where not even those of one token do."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a start with these limits comes to."""

    now: Effective
    budget: Budget
    blocks: int
    """Of the KV cache."""
    blocks_per_request: int
    """Of one request of full length."""
    failure: Failure | None
    """What vLLM would say, if it would not start."""

    @property
    def concurrency(self) -> float:
        """Requests of full length that run at once, by vLLM's own division."""
        return self.blocks / self.blocks_per_request if self.blocks_per_request else 0.0

    @property
    def tokens(self) -> int:
        """Tokens in the KV cache, as vLLM's log counts them."""
        return int(self.concurrency * (self.now.max_model_len or 0))


def outlook(model: Footprint, cache: Cache, now: Effective) -> Outlook:
    """What a start with these limits comes to."""
    sums = budget(model, now)
    blocks = blocks_in(cache, sums.pool)
    needed = cache.blocks_per_request(now.max_model_len or 1, now.max_num_batched_tokens or 1)
    return Outlook(now, sums, blocks, needed, next(_failures(sums, cache, blocks, needed, now), None))


def _failures(sums: Budget, cache: Cache, blocks: int, needed: int, now: Effective) -> Iterator[Failure]:
    """What would not fit, in the order of a start."""
    yield from _of_device(sums, is_fixed=now.kv_cache_memory_bytes is not None)
    if blocks < 1:
        detail = f"{_gib(-sums.pool)} lack before there is any KV cache." if sums.pool < 0 else "no KV cache is left."
        yield Failure(Kind.no_kv_cache, detail, place=Place.kv_cache)
    if needed > blocks - 1:
        fitting = longest(cache, blocks, now)
        detail = f"a request of {now.max_model_len} tokens needs {_gib(needed * cache.bytes_per_block)} of KV cache."
        yield Failure(Kind.kv_cache_too_small, detail, place=Place.kv_cache, fitting_model_len=fitting or None)
    if cache.blocks_per_sequence_at_least and (now.max_num_seqs or 0) > blocks:
        detail = f"{now.max_num_seqs} sequences are more than the {blocks} blocks that hold their states."
        yield Failure(Kind.too_many_sequences, detail, place=Place.capture, fitting_num_seqs=blocks)


def _of_device(sums: Budget, *, is_fixed: bool) -> Iterator[Failure]:
    """What would be more than the device has, whatever the engine may use of it."""
    if sums.weights > sums.device:
        detail = f"the weights take {_gib(sums.weights)} of each device, which has {_gib(sums.device)}."
        advice = "Take a smaller or quantised model, more GPUs, or engine.cpu_offload_gb."
        yield Failure(Kind.weights_do_not_fit, detail, advice, Place.loading, total_bytes=sums.device)
    if (lacking := sums.weights + sums.kept + sums.step - sums.device) > 0:
        detail = f"a step needs {_gib(lacking)} more than the weights leave of the device."
        yield Failure(Kind.out_of_memory, detail, place=Place.profiling, total_bytes=sums.device)
    if is_fixed and (lacking := sums.used - sums.device) > 0:
        detail = f"the KV cache of {_gib(sums.pool)} is {_gib(lacking)} more than the device has left."
        yield Failure(Kind.out_of_memory, detail, place=Place.kv_cache, tried_bytes=lacking, total_bytes=sums.device)


def rows(model: Footprint, cache: Cache, now: Effective) -> tuple[Row, ...]:
    """What fits at each max_num_seqs up to the one asked for: fewer leave a little more for the KV cache."""
    each = (replace(now, max_num_seqs=seqs) for seqs in steps_of_seqs(now.max_num_seqs or 1))
    return tuple(
        Row(
            limits.max_num_seqs or 1,
            longest(cache, blocks_in(cache, budget(model, limits).pool), limits, limits.max_num_seqs or 1),
        )
        for limits in each
    )


@dataclass(frozen=True, slots=True)
class Rung:
    """A step of the ladder, and what the start after it comes to."""

    step: Step
    outlook: Outlook


@dataclass(frozen=True, slots=True)
class Walk:
    """Rungs in their order, and why there are no more: empty where the last one holds."""

    rungs: tuple[Rung, ...]
    end: str


Expects = Callable[[Effective], Outlook]


def to_a_start(course: Course, asked: Outlook, choices: policy.Choices, expects: Expects) -> Walk:
    """The rungs that recovery takes until an engine starts."""
    taken: list[Rung] = []
    now = asked
    while now.failure is not None and len(taken) < _MOST_RUNGS:
        answer = policy.answer(policy.Strike(now.failure, built=now.now), course, choices)
        if not isinstance(answer, Step):
            return Walk(tuple(taken), answer.why if isinstance(answer, policy.GiveUp) else str(now.failure))
        course, now = course.and_then(answer), expects(_changed(now.now, answer.arguments))
        taken.append(Rung(answer, now))
    return Walk(tuple(taken), str(now.failure) if now.failure else "")


def while_serving(course: Course, start: Outlook, choices: policy.Choices, expects: Expects) -> Walk:
    """The rungs that follow if memory runs out again and again while an engine serves."""
    taken: list[Rung] = []
    # The KV cache of a CPU lies in the host's memory, and it is the kernel that ends it.
    kind = Kind.host_out_of_memory if start.now.device == "cpu" else Kind.out_of_memory
    failure, now = Failure(kind, "memory ran out.", place=Place.serving), start
    while len(taken) < _MOST_RUNGS:
        step = ladder.next_step(course, failure, now.now, choices.floors)
        if isinstance(step, ladder.NoStep):
            return Walk(tuple(taken), step.advice)
        course, now = course.and_then(step), expects(_changed(now.now, step.arguments))
        taken.append(Rung(step, now))
        further = to_a_start(course, now, choices, expects)
        if further.end:
            return Walk((*taken, *further.rungs), further.end)
        for rung in further.rungs:
            course, now = course.and_then(rung.step), rung.outlook
            taken.append(rung)
    return Walk(tuple(taken), "")


def _changed(now: Effective, arguments: Mapping[str, Any]) -> Effective:
    known = {field.name for field in fields(Effective)}
    return replace(now, **{name: value for name, value in arguments.items() if name in known})


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
