"""The life of one instance as a pure function: step(situation, event, now) -> (situation, actions).

A failure's answer is `policy`'s; this page says when it is asked and what becomes of it.

Invariants, checked after every step in tests:
- there is at most one engine: an engine is started only when none is up or coming up;
- the gate is open exactly in `serving`;
- after a stop was asked for, no engine is started;
- a plan that nothing has proven is remembered before an engine is started with it;
- while admission is stopped by hand, `serving` is not entered; whoever stopped it or nobody opens it again;
- an instance that served before its file was read again does not end because of what it then read;
- `stopped` and `failed` are final, and each is entered with exactly one Exit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llm_serve.core.actions import (
    Action,
    Announce,
    CloseGate,
    CutRequests,
    Drain,
    Exit,
    OpenGate,
    Pause,
    Remember,
    RetireEngine,
    StartEngine,
    StopEngine,
)
from llm_serve.core.course import Course, Effective, Step
from llm_serve.core.events import (
    Cooled,
    Drained,
    DrainRequested,
    EngineFailed,
    EngineLost,
    EngineReady,
    EngineRetired,
    EngineStopped,
    Event,
    FileChanged,
    Forgotten,
    Heated,
    HostMissing,
    HostReady,
    HostWaits,
    PauseOver,
    ResumeRequested,
    StepUpDue,
    StopRequested,
)
from llm_serve.core.evidence import Failure, Kind
from llm_serve.core.policy import Again, GiveUp, Limits, Strike, answer
from llm_serve.core.restarts import backoff_s, within_window
from llm_serve.core.states import FINAL, HOLDING, UP, State

Answered = tuple["Situation", tuple[Action, ...]]


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything the next decision depends on.

    `why` is a sentence for people, `since` monotonic seconds. `has_engine` is true while the engine of
    `epoch` is up or coming up: from StartEngine to the fact that nothing of it is left. `has_served` is true once
    that engine has answered. `struck` are the failures of the plan of the moment, by time. `proven` is the course to
    return to while a larger plan is on trial. `story` is what happened, a sentence an event, for the last word.

    `file` is the number of the reading of the file that counts. `next` is the course that the next engine gets, while
    this one finishes. `before` is the situation to return to while the plan of a changed file is on trial.
    `fell_back` says why the last changed file was left again. `is_drained` is true while admission is stopped by hand,
    `too_hot` says why heat stops it.
    """

    limits: Limits
    course: Course
    state: State = State.waiting_for_host
    since: float = 0.0
    why: str = "waiting for the host"
    epoch: int = 0
    has_engine: bool = False
    has_served: bool = False
    starts: tuple[float, ...] = ()
    failures_in_a_row: int = 0
    last_failure: Failure | None = None
    struck: tuple[tuple[float, Kind], ...] = ()
    proven: Course | None = None
    trials_failed: int = 0
    story: tuple[str, ...] = ()
    is_stopping_now: bool = False
    is_drained: bool = False
    too_hot: str = ""
    file: int = 0
    next: Course | None = None
    before: Situation | None = None
    fell_back: str = ""


def step(now: Situation, event: Event, at: float) -> Answered:  # noqa: C901, PLR0911, PLR0912 - a table, one row a return
    """The answer to one fact at the monotonic time `at`.

    Facts about an engine that is not current, or that has failed already, change nothing.
    """
    if now.state in FINAL:
        return now, ()
    match event:
        case HostReady(course) if now.state is State.waiting_for_host:
            return _start(replace(now, course=course or now.course), State.starting, "start", at)
        case HostWaits(why) if now.state is State.waiting_for_host:
            return replace(now, why=why), ()
        case HostMissing(status, why) if now.state is State.waiting_for_host:
            return _fail(now, status, why, at)
        case Forgotten() if not now.has_engine:
            return replace(now, course=Course(now.course.asked), proven=None, struck=()), ()
        case PauseOver(epoch) if now.state in _BETWEEN_ENGINES and not now.has_engine and epoch == now.epoch + 1:
            return _start(now, now.state, _reason(now), at)
        case EngineReady(epoch) if _is_current(now, epoch) and now.state in HOLDING and not now.has_served:
            return _ready(now, at)
        case EngineLost(epoch) if _is_current(now, epoch) and now.state in UP:
            return _to(now, State.recovering, "the engine died", at), (CloseGate(refuse=False),)
        case EngineFailed(epoch, failure, built) if _is_current(now, epoch):
            return _after_failure(replace(now, has_engine=False), failure, built, at)
        case StepUpDue() if now.state is State.serving and now.course.rung and _may_try(now, at):
            why = f"trying one rung up, after {now.course.rung} down"
            rising = replace(now, next=now.course.one_up())
            return _to(rising, State.recovering, why, at), (CloseGate(refuse=False), Drain())
        case FileChanged(number, limits, None) if now.state in UP:
            return replace(now, file=number, limits=limits, fell_back=""), ()
        case FileChanged(number, limits, Course() as course) if now.state in UP:
            changed = replace(now, before=now, file=number, limits=limits, next=course, fell_back="")
            why = "the file has changed; requests in flight finish first"
            return _to(changed, State.reloading, why, at), (CloseGate(refuse=False), Drain())
        case Drained() if now.next is not None and now.state in _BETWEEN_ENGINES:
            return now, (RetireEngine(now.epoch),)
        case EngineRetired(epoch) if _is_current(now, epoch) and now.next is not None and now.state in _BETWEEN_ENGINES:
            return _try_next(replace(now, has_engine=False), now.next, at)
        case DrainRequested() if now.state is not State.draining:
            return _admit(replace(now, is_drained=True), at)
        case ResumeRequested() if now.state is not State.draining:
            return _admit(replace(now, is_drained=False), at)
        case Heated(why) if now.state is not State.draining:
            return _admit(replace(now, too_hot=why), at)
        case Cooled() if now.state is not State.draining:
            return _admit(replace(now, too_hot=""), at)
        case StopRequested():
            return _stop(now, at)
        case Drained() if now.state is State.draining and not now.is_stopping_now:
            return replace(now, is_stopping_now=True), (CutRequests(), StopEngine())
        case EngineStopped() if now.state is State.draining:
            return _to(now, State.stopped, "stopped as asked", at), (Exit(0, "stopped as asked"),)
        case _:
            return now, ()


_BETWEEN_ENGINES = frozenset({State.recovering, State.reloading})


def _is_current(now: Situation, epoch: int) -> bool:
    return now.has_engine and epoch == now.epoch


def _may_try(now: Situation, at: float) -> bool:
    """A trial takes two starts if it fails, and must not be what spends the last ones."""
    recent = within_window(now.starts, at, now.limits.restart_window_s)
    return len(recent) + 2 < now.limits.restart_limit


def _reason(now: Situation) -> str:
    """Why an engine is started, as a label of a metric."""
    if now.proven is not None:
        return "step_up"
    return str(now.last_failure.kind) if now.last_failure else "step_up"


def _start(now: Situation, state: State, reason: str, at: float) -> Answered:
    recent = within_window(now.starts, at, now.limits.restart_window_s)
    if len(recent) >= now.limits.restart_limit:
        why = f"gave up after {len(recent)} engine starts in {now.limits.restart_window_s:g} s"
        return _back_from_file(now, why, at) if now.before is not None else _fail(now, 70, why, at)
    started = replace(now, epoch=now.epoch + 1, has_engine=True, has_served=False, starts=(*recent, at))
    order = StartEngine(started.epoch, reason, now.course.plan)
    return _to(started, state, f"engine start {started.epoch}", at), (order,)


def _ready(now: Situation, at: float) -> Answered:
    """The engine answers: its plan is proven, and so is a larger or a changed one that was on trial."""
    was_proven = now.course.is_proven and now.proven is None
    course = replace(now.course, is_proven=True)
    trials_failed = 0 if now.proven is not None else now.trials_failed
    up = replace(now, course=course, proven=None, before=None, trials_failed=trials_failed, failures_in_a_row=0)
    orders: tuple[Action, ...] = () if was_proven else (Remember(course),)
    if why := _stopped_by(now):
        why = f"the engine answers; {why}"
        return _to(replace(up, has_served=True), State.drained, why, at), (*orders, Announce())
    return _to(replace(up, has_served=True), State.serving, "the engine answers", at), (*orders, OpenGate(), Announce())


def _stopped_by(now: Situation) -> str:
    """Why no new request may reach the engine; empty when it may."""
    return "admission is stopped by hand" if now.is_drained else now.too_hot


def _admit(now: Situation, at: float) -> Answered:
    """Admission as a hand and the heat want it. Where no engine answers, that is only kept in mind."""
    why = _stopped_by(now)
    if now.state is State.serving and why:
        return _to(now, State.drained, why, at), (CloseGate(refuse=False),)
    if now.state is State.drained and not why:
        return _to(now, State.serving, "admission is resumed", at), (OpenGate(),)
    return (replace(now, why=why) if now.state is State.drained else now), ()


def _try_next(now: Situation, course: Course, at: float) -> Answered:
    """The last engine has made room. A file that a person has changed begins with a restart window of its own."""
    if now.before is None:
        return _start(replace(now, course=course, next=None, proven=now.course, struck=()), now.state, "step_up", at)
    fresh = replace(now, course=course, next=None, proven=None, struck=(), starts=(), failures_in_a_row=0)
    return _start(fresh, State.reloading, "reload", at)


def _after_failure(now: Situation, failure: Failure, built: Effective, at: float) -> Answered:
    if now.state is State.draining:
        return _to(now, State.draining, "the engine died while draining", at), (CutRequests(),)
    if now.before is not None and now.next is not None:
        story = _told(now, f"engine {now.epoch}: {failure}")
        return _try_next(replace(now, last_failure=failure, story=story), now.next, at)
    if now.proven is not None and not now.has_served:
        return _back_from_trial(now, failure, at)
    now = replace(now, next=None)
    recent = [(when, kind) for when, kind in now.struck if at - now.limits.restart_window_s < when]
    failed = replace(
        now,
        last_failure=failure,
        failures_in_a_row=now.failures_in_a_row + 1,
        struck=(*recent, (at, failure.kind)),
        story=_told(now, f"engine {now.epoch}: {failure}"),
    )
    times = sum(kind is failure.kind for _, kind in failed.struck)
    return _answered(failed, Strike(failure, times, now.has_served, built), at)


def _answered(failed: Situation, strike: Strike, at: float) -> Answered:
    """The policy's answer. A changed file's plan may be made smaller; it is not tried again as it is."""
    failure = strike.failure
    match answer(strike, failed.course, failed.limits.choices):
        case GiveUp(_, why) if failed.before is not None:
            return _back_from_file(failed, why, at)
        case Again() if failed.before is not None:
            return _back_from_file(failed, str(failure), at)
        case GiveUp(status, why):
            return _fail(failed, status, why, at)
        case Again():
            return _pause(failed, str(failure), at)
        case Step() as change:
            course = failed.course.and_then(change)
            story = _told(failed, f"rung {course.rung}: {change.reason}")
            changed = replace(failed, course=course, struck=(), story=story)
            after, orders = _pause(changed, f"{failure} {change.reason}", at)
            return after, (Remember(course), *orders)


def _pause(now: Situation, why: str, at: float) -> Answered:
    seconds = backoff_s(now.failures_in_a_row) * (1 + now.limits.jitter / 4)
    orders = (CloseGate(refuse=False), Pause(now.epoch + 1, seconds))
    return _to(now, State.reloading if now.before is not None else State.recovering, why, at), orders


def _back_from_trial(now: Situation, failure: Failure, at: float) -> Answered:
    """The larger plan did not even start: at once back to the one that has served, and longer until the next trial."""
    assert now.proven is not None
    why = f"rung {now.course.rung} still fails ({failure}); back to rung {now.proven.rung}"
    back = replace(
        now, course=now.proven, proven=None, trials_failed=now.trials_failed + 1, story=_told(now, why), struck=()
    )
    return _to(back, State.recovering, why, at), (CloseGate(refuse=False), Pause(now.epoch + 1, 0.0))


def _back_from_file(now: Situation, why: str, at: float) -> Answered:
    """The changed file's plan does not start: at once back to the file that served, with all that went with it."""
    assert now.before is not None
    sentence = f"the changed file's engine does not start ({why}); back to the file that served before"
    back = replace(
        now.before,
        state=now.state,
        since=now.since,
        epoch=now.epoch,
        has_engine=False,
        has_served=False,
        is_drained=now.is_drained,
        too_hot=now.too_hot,
        last_failure=now.last_failure,
        story=_told(now, sentence),
        starts=(),
        struck=(),
        fell_back=why,
    )
    orders = (Remember(back.course), CloseGate(refuse=False), Pause(now.epoch + 1, 0.0))
    return _to(back, State.recovering, sentence, at), orders


def _fail(now: Situation, status: int, why: str, at: float) -> Answered:
    """The end, with the whole story in its last word."""
    whole = ". Before that: ".join((why, "; ".join(now.story))) if len(now.story) > 1 else _with_failure(why, now)
    return _to(now, State.failed, why, at), (CloseGate(refuse=True), CutRequests(), Exit(status, whole))


def _with_failure(why: str, now: Situation) -> str:
    failure = str(now.last_failure) if now.last_failure else ""
    return why if failure in why else f"{why}; last failure: {failure}"


def _told(now: Situation, sentence: str) -> tuple[str, ...]:
    return (*now.story, sentence)[-_STORY_SENTENCES:]


_STORY_SENTENCES = 40


def _stop(now: Situation, at: float) -> Answered:
    if now.state is not State.draining:
        orders: tuple[Action, ...] = (CloseGate(refuse=True),)
        if now.state in UP or (now.state is State.reloading and now.next is not None):
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
