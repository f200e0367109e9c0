"""The life of one instance as a pure function: step(situation, event, now) -> (situation, actions).

Invariants, checked after every step in tests:
- there is at most one engine: an engine is started only when none is up or coming up;
- the gate is open exactly in `serving`;
- after a stop was asked for, no engine is started;
- `stopped` and `failed` are final, and each is entered with exactly one Exit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llm_serve.core.failures import DETERMINISTIC, Failure
from llm_serve.core.restarts import backoff_s, within_window


class State(StrEnum):
    """Where an instance can be. See the design's section 5."""

    waiting_for_host = "waiting_for_host"
    starting = "starting"
    serving = "serving"
    recovering = "recovering"
    draining = "draining"
    stopped = "stopped"
    failed = "failed"


FINAL = frozenset({State.stopped, State.failed})
HOLDING = frozenset({State.waiting_for_host, State.starting, State.recovering})
"""States in which a request waits for an engine instead of being refused."""


# Events are facts.
@dataclass(frozen=True, slots=True)
class HostReady:
    """Devices, folders and files that the engine needs are there."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine of this epoch has generated a real token."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine of this epoch has been found dead. Why, and that its remains are gone, follows as EngineFailed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine of this epoch did not start, or died. Nothing of it is left."""

    epoch: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The back-off before this epoch's start has passed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the instance to end: SIGTERM or SIGINT. A second one means at once."""


@dataclass(frozen=True, slots=True)
class Drained:
    """No request is in flight any more, or the drain's deadline has passed."""


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """Every process of the engine is gone, after a stop."""


Event = HostReady | EngineReady | EngineLost | EngineFailed | PauseOver | StopRequested | Drained | EngineStopped


# Actions are orders.
@dataclass(frozen=True, slots=True)
class StartEngine:
    """Build the engine of this epoch."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Report PauseOver(epoch) after this many seconds."""

    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Let requests through to the engine."""


@dataclass(frozen=True, slots=True)
class CloseGate:
    """Stop letting requests through. `refuse` answers 503 at once; else they wait."""

    refuse: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Let requests in flight finish and report Drained, at the latest after the drain time-out."""


@dataclass(frozen=True, slots=True)
class CutRequests:
    """End every request in flight with an error that says so."""


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End the engine, up or coming up, and report EngineStopped."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process with this status. `why` is the last word in the log."""

    status: int
    why: str


Action = StartEngine | Pause | OpenGate | CloseGate | Drain | CutRequests | StopEngine | Exit
Step = tuple["Situation", tuple[Action, ...]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How often an engine may be started: `restart_limit` times in `restart_window_s` seconds."""

    restart_limit: int
    restart_window_s: float


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything the next decision depends on.

    `why` is a sentence for people, `since` monotonic seconds. `has_engine` is true while the engine of
    `epoch` is up or coming up: from StartEngine to the fact that nothing of it is left. `has_served` is true once
    that engine has answered.
    """

    limits: Limits
    state: State = State.waiting_for_host
    since: float = 0.0
    why: str = "waiting for the host"
    epoch: int = 0
    has_engine: bool = False
    has_served: bool = False
    starts: tuple[float, ...] = ()
    failures_in_a_row: int = 0
    last_failure: Failure | None = None
    is_stopping_now: bool = False


def step(now: Situation, event: Event, at: float) -> Step:  # noqa: PLR0911 - a table, one row a return
    """The answer to one fact at the monotonic time `at`.

    Facts about an engine that is not current, or that has failed already, change nothing.
    """
    if now.state in FINAL:
        return now, ()
    match event:
        case HostReady() if now.state is State.waiting_for_host:
            return _start(now, State.starting, "start", at)
        case PauseOver(epoch) if now.state is State.recovering and epoch == now.epoch + 1:
            return _start(now, State.recovering, str(now.last_failure and now.last_failure.kind), at)
        case EngineReady(epoch) if _is_current(now, epoch) and now.state in HOLDING and not now.has_served:
            serving = replace(now, failures_in_a_row=0, has_served=True)
            return _to(serving, State.serving, "the engine answers", at), (OpenGate(),)
        case EngineLost(epoch) if _is_current(now, epoch) and now.state is State.serving:
            return _to(now, State.recovering, "the engine died", at), (CloseGate(refuse=False),)
        case EngineFailed(epoch, failure) if _is_current(now, epoch):
            return _after_failure(replace(now, has_engine=False), failure, at)
        case StopRequested():
            return _stop(now, at)
        case Drained() if now.state is State.draining and not now.is_stopping_now:
            return replace(now, is_stopping_now=True), (CutRequests(), StopEngine())
        case EngineStopped() if now.state is State.draining:
            return _to(now, State.stopped, "stopped as asked", at), (Exit(0, "stopped as asked"),)
        case _:
            return now, ()


def _is_current(now: Situation, epoch: int) -> bool:
    return now.has_engine and epoch == now.epoch


def _start(now: Situation, state: State, reason: str, at: float) -> Step:
    recent = within_window(now.starts, at, now.limits.restart_window_s)
    if len(recent) >= now.limits.restart_limit:
        window_s = now.limits.restart_window_s
        why = f"gave up after {len(recent)} engine starts in {window_s:g} s; last failure: {now.last_failure}"
        return _to(now, State.failed, why, at), (CloseGate(refuse=True), CutRequests(), Exit(70, why))
    started = replace(now, epoch=now.epoch + 1, has_engine=True, has_served=False, starts=(*recent, at))
    return _to(started, state, f"engine start {started.epoch}", at), (StartEngine(started.epoch, reason),)


def _after_failure(now: Situation, failure: Failure, at: float) -> Step:
    if now.state is State.draining:
        return _to(now, State.draining, "the engine died while draining", at), (CutRequests(),)
    failed = replace(now, last_failure=failure, failures_in_a_row=now.failures_in_a_row + 1)
    # A plan that has served is not refused for good: if its files are bad by now, the next start says so.
    if failure.kind in DETERMINISTIC and not now.has_served:
        why = str(failure)
        return _to(failed, State.failed, why, at), (CloseGate(refuse=True), CutRequests(), Exit(78, why))
    pause = Pause(now.epoch + 1, backoff_s(failed.failures_in_a_row))
    return _to(failed, State.recovering, str(failure), at), (CloseGate(refuse=False), pause)


def _stop(now: Situation, at: float) -> Step:
    if now.state is not State.draining:
        orders: tuple[Action, ...] = (CloseGate(refuse=True),)
        if now.state is State.serving:
            return _to(now, State.draining, "finishing requests in flight", at), (*orders, Drain())
        stopping = replace(now, is_stopping_now=True)
        return _to(stopping, State.draining, "stopping before the engine was up", at), (
            *orders,
            CutRequests(),
            StopEngine(),
        )
    if now.is_stopping_now:
        return now, ()
    return replace(now, is_stopping_now=True, why="stopping at once"), (CutRequests(), StopEngine())


def _to(now: Situation, state: State, why: str, at: float) -> Situation:
    since = now.since if state is now.state else at
    return replace(now, state=state, why=why, since=since)
