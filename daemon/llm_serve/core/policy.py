"""What follows from a failure: one table of kind -> responses, and the one function that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llm_serve.core import fallbacks, ladder
from llm_serve.core.course import UNKNOWN, Course, Effective, Floors, Step
from llm_serve.core.evidence import Failure, Kind, Place


class Response(StrEnum):
    """The ways to go on."""

    refuse = "refuse"
    """It would fail again however often it is tried: exit 78 for a person to change something."""
    stop = "stop"
    """No process can help any more: exit 70."""
    again = "again"
    """The same plan, after a pause that grows."""
    shrink = "shrink"
    """The next smaller plan."""
    switch = "switch"
    """The same plan, computed in another way."""


_REFUSE, _STOP, _AGAIN, _SHRINK, _SWITCH = Response

RESPONSES: dict[Kind, tuple[Response, ...]] = {
    Kind.configuration: (_REFUSE,),
    Kind.weights: (_REFUSE,),
    Kind.weights_do_not_fit: (_REFUSE,),
    Kind.unsupported_gpu: (_REFUSE,),
    Kind.toolchain: (_REFUSE,),
    Kind.kv_cache_too_small: (_SHRINK,),
    Kind.no_kv_cache: (_SHRINK,),
    Kind.out_of_memory: (_SHRINK,),
    Kind.too_many_sequences: (_SHRINK,),
    Kind.share_too_large: (_SHRINK,),
    Kind.host_out_of_memory: (_SHRINK,),
    # Whoever holds the memory may be about to let go of it, our own last engine for one.
    Kind.memory_held: (_AGAIN, _AGAIN, _AGAIN, _SHRINK),
    Kind.driver_not_ready: (_AGAIN,),
    Kind.hub_unreachable: (_AGAIN,),
    Kind.address_in_use: (_AGAIN,),
    Kind.host_limit: (_AGAIN,),
    Kind.attention_backend: (_SWITCH,),
    Kind.flashinfer: (_SWITCH,),
    Kind.compilation: (_SWITCH,),
    Kind.graph_capture: (_SWITCH,),
    # The first time may be chance, and another way of computing is slower.
    Kind.communication: (_AGAIN, _SWITCH),
    Kind.start_timeout: (_AGAIN, _SWITCH),
    Kind.start_stalled: (_AGAIN, _SWITCH),
    Kind.stalled: (_AGAIN, _AGAIN, _SWITCH),
    Kind.device_error: (_AGAIN, _SWITCH),
    Kind.crashed: (_AGAIN, _AGAIN, _SWITCH),
    Kind.killed: (_AGAIN,),
    Kind.unknown: (_AGAIN,),
    Kind.device_lost: (_STOP,),
    Kind.unkillable: (_STOP,),
}
"""The response to the first, second ... failure of a kind under one plan; the last one holds from there on."""

REFUSED = frozenset(kind for kind, responses in RESPONSES.items() if responses == (_REFUSE,))
"""Kinds for which a plan that has not served yet is never tried again."""

NO_REQUEST = frozenset({
    Kind.killed, Kind.device_lost, Kind.unkillable, Kind.driver_not_ready, Kind.memory_held, Kind.host_limit,
    Kind.share_too_large,
})  # fmt: skip
"""Kinds of death that no request can cause; after any other, one that was in flight may be the cause."""

KEEPS_WEIGHTS = frozenset({Kind.killed, Kind.stalled})
"""Kinds of death after which the same plan is tried with the same weights, where they have stayed in GPU memory.

After any other a smaller plan may follow, which reads its own, or whatever went wrong may have written into them.
"""

_WAYS = frozenset({Kind.attention_backend, Kind.flashinfer, Kind.compilation, Kind.graph_capture})
"""Ways of computing: when none is left, only a person can find another."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the file allows."""

    floors: Floors
    """What the ladder never goes below."""
    backends: tuple[str, ...] = ()
    """Attention backends, in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How often an engine may be started (`restart_limit` times in `restart_window_s`), and how small it may get.

    `jitter`, from 0 to 1, stretches pauses by up to a quarter, so that the instances of a machine do not start in step.
    """

    restart_limit: int
    restart_window_s: float
    choices: Choices
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Again:
    """Start the same plan again."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Start nothing more: exit with this status, for this reason."""

    status: int
    why: str


Answer = Again | Step | GiveUp


@dataclass(frozen=True, slots=True)
class Strike:
    """A failure, and how often its kind has struck this plan within the window, this time included.

    `has_served` is true when the engine that failed had answered before.
    """

    failure: Failure
    times: int = 1
    has_served: bool = False
    built: Effective = UNKNOWN


def answer(strike: Strike, course: Course, choices: Choices) -> Answer:
    """What to do about a failure of an engine with the course's plan.

    What has just served is never refused for good: what it lacks now may come back, and the next start says so.
    """
    failure, built = strike.failure, strike.built
    match _first_word(strike):
        case Response.refuse:
            return Again() if strike.has_served else GiveUp(78, str(failure))
        case Response.stop:
            return GiveUp(70, str(failure))
        case Response.shrink:
            return _or_give_up(_smaller(strike, course, choices), failure, course)
        case Response.switch:
            return _or_give_up(fallbacks.next_step(course, failure, built, choices.backends), failure, course)
        case _:
            return Again()


def response(failure: Failure, times: int) -> Response:
    """The table's word. A crash while serving never changes a plan: a request may have caused it."""
    if failure.kind is Kind.crashed and failure.place is Place.serving:
        return Response.again
    row = RESPONSES[failure.kind]
    return row[min(max(times, 1), len(row)) - 1]


def _first_word(strike: Strike) -> Response:
    """The table's word, unless what is known of the machine leaves nothing to chance or to wait for."""
    failure = strike.failure
    # By the driver's word these GPUs cannot reach each other's memory: the first hang of a start is no chance.
    is_start_of_several = strike.built.world_size > 1 and failure.place is not Place.serving
    is_known = failure.no_p2p and failure.kind in _OF_LINKS and is_start_of_several
    return response(failure, max(strike.times, 2) if is_known else strike.times)


def _smaller(strike: Strike, course: Course, choices: Choices) -> Step | ladder.NoStep:
    """The next smaller plan; where none helps, the memory may be somewhere else (on another NUMA node)."""
    step = ladder.next_step(course, strike.failure, strike.built, choices.floors)
    if isinstance(step, Step):
        return step
    other = fallbacks.next_step(course, strike.failure, strike.built, choices.backends)
    return other if isinstance(other, Step) else step


_OF_LINKS = frozenset({Kind.communication, Kind.start_timeout, Kind.start_stalled})


def _or_give_up(step: Step | ladder.NoStep, failure: Failure, course: Course) -> Answer:
    if isinstance(step, Step):
        return step
    if course.is_proven or response(failure, 1) is Response.again or failure.kind is Kind.host_out_of_memory:
        return Again()
    status = 78 if failure.kind in _WAYS else 70
    return GiveUp(status, f"{failure} {step.advice}")
