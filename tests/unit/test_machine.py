"""The life of an instance: each fact and its answer, and what no sequence of facts may break."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from llm_serve.core.course import Course, Effective, Floors, Step
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
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.machine import Situation, step
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import Choices, Limits
from llm_serve.core.states import FINAL, HOLDING, UP, State

LIMITS = Limits(restart_limit=4, restart_window_s=100.0, choices=Choices(Floors(1024, 4)))
PLAN = EnginePlan("m", {"max_model_len": 8192, "max_num_seqs": 64}, {})
BUILT = Effective(device="cuda", max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048)
ASKED = Course(PLAN, is_proven=True)
TOO_SMALL = Failure(Kind.kv_cache_too_small, "needs more", place=Place.kv_cache, fitting_model_len=4112)
LOWER = Step(Kind.kv_cache_too_small, Place.kv_cache, "lower", {"max_model_len": 4096}, {}, is_rung=True)
LEARNED = ASKED.and_then(LOWER)
CRASH = Failure(Kind.crashed, "EngineCore was ended by SIGSEGV.")
BAD_WEIGHTS = Failure(Kind.weights, "HeaderTooLarge.", "Download it again.")

WAITING = Situation(LIMITS, Course(PLAN))
STARTING = replace(WAITING, state=State.starting, epoch=1, has_engine=True, starts=(10.0,))
SERVING = replace(STARTING, state=State.serving, has_served=True, course=ASKED)
LOST = replace(SERVING, state=State.recovering)
PAUSING = replace(SERVING, state=State.recovering, has_engine=False, last_failure=CRASH, failures_in_a_row=1)
RESTARTING = replace(PAUSING, epoch=2, has_engine=True, has_served=False, starts=(10.0, 20.0))
DRAINING = replace(SERVING, state=State.draining)
STOPPING = replace(DRAINING, is_stopping_now=True)
STOPPED = replace(STOPPING, state=State.stopped)
FAILED = replace(PAUSING, state=State.failed)
ON_RUNG_1 = replace(SERVING, course=replace(LEARNED, is_proven=True))
GOING_UP = replace(ON_RUNG_1, state=State.recovering, next=Course(PLAN))
ON_TRIAL = replace(GOING_UP, epoch=2, has_served=False, course=Course(PLAN), proven=ON_RUNG_1.course, next=None)
DRAINED = replace(SERVING, state=State.drained, is_drained=True)
OTHER_LIMITS = replace(LIMITS, restart_limit=2)
OTHER_PLAN = EnginePlan("m", {"max_model_len": 4096, "max_num_seqs": 32}, {})
OTHER = Course(OTHER_PLAN)
CHANGE = FileChanged(1, OTHER_LIMITS, OTHER)
FINISHING = replace(
    SERVING, state=State.reloading, before=SERVING, file=1, limits=OTHER_LIMITS, next=OTHER, starts=(10.0, 20.0)
)
RELOADING = replace(FINISHING, epoch=2, has_served=False, course=OTHER, next=None, starts=(70.0,))
RELOAD_PAUSING = replace(RELOADING, has_engine=False, last_failure=CRASH)
SPENT = replace(PAUSING, starts=(50.0, 60.0, 70.0, 75.0))

HOT = "GPU 0 has 91 °C"
AT = 80.0
REFUSE, HOLD = CloseGate(refuse=True), CloseGate(refuse=False)
GAVE_UP = "gave up after 4 engine starts in 100 s; last failure: crashed: EngineCore was ended by SIGSEGV."
BROKEN = "weights: HeaderTooLarge. Download it again."

ANSWERS: dict[str, tuple[Situation, Event, State, tuple[Action, ...]]] = {
    "the host is ready": (WAITING, HostReady(), State.starting, (StartEngine(1, "start", PLAN),)),
    "the host lets wait": (WAITING, HostWaits("no driver"), State.waiting_for_host, ()),
    "the host never comes": (
        WAITING,
        HostMissing(75, "no GPU"),
        State.failed,
        (REFUSE, CutRequests(), Exit(75, "no GPU")),
    ),
    "something was learned on it": (
        WAITING,
        HostReady(LEARNED),
        State.starting,
        (StartEngine(1, "start", LEARNED.plan),),
    ),
    "the first engine answers": (STARTING, EngineReady(1), State.serving, (Remember(ASKED), OpenGate(), Announce())),
    "it is time for a larger plan": (ON_RUNG_1, StepUpDue(), State.recovering, (HOLD, Drain())),
    "requests have finished for a larger plan": (GOING_UP, Drained(), State.recovering, (RetireEngine(1),)),
    "the engine dies as it makes room for a larger plan": (
        GOING_UP,
        EngineFailed(1, CRASH),
        State.recovering,
        (HOLD, Pause(2, 0.0)),
    ),
    "a trial would spend the last starts": (
        replace(ON_RUNG_1, starts=(50.0, 60.0)),
        StepUpDue(),
        State.serving,
        (),
    ),
    "there is no larger plan": (SERVING, StepUpDue(), State.serving, ()),
    "the larger plan is tried": (GOING_UP, EngineRetired(1), State.recovering, (StartEngine(2, "step_up", PLAN),)),
    "the larger plan holds": (ON_TRIAL, EngineReady(2), State.serving, (Remember(ASKED), OpenGate(), Announce())),
    "the larger plan fails": (ON_TRIAL, EngineFailed(2, TOO_SMALL, BUILT), State.recovering, (HOLD, Pause(3, 0.0))),
    "what was learned is forgotten": (
        replace(PAUSING, course=LEARNED),
        Forgotten(),
        State.recovering,
        (),
    ),
    "the first start fails": (STARTING, EngineFailed(1, CRASH), State.recovering, (HOLD, Pause(2, 0.0))),
    "the model is broken": (
        STARTING,
        EngineFailed(1, BAD_WEIGHTS),
        State.failed,
        (REFUSE, CutRequests(), Exit(78, BROKEN)),
    ),
    "an engine is found dead while serving": (SERVING, EngineLost(1), State.recovering, (HOLD,)),
    "the death of a lost engine is explained": (LOST, EngineFailed(1, CRASH), State.recovering, (HOLD, Pause(2, 0.0))),
    "what has served is tried again though it is lost": (
        LOST,
        EngineFailed(1, BAD_WEIGHTS),
        State.recovering,
        (HOLD, Pause(2, 0.0)),
    ),
    "an engine dies while serving": (SERVING, EngineFailed(1, CRASH), State.recovering, (HOLD, Pause(2, 0.0))),
    "what has served is tried again whatever it died of": (
        SERVING,
        EngineFailed(1, BAD_WEIGHTS),
        State.recovering,
        (HOLD, Pause(2, 0.0)),
    ),
    "the pause is over": (PAUSING, PauseOver(2), State.recovering, (StartEngine(2, "crashed", PLAN),)),
    "the next engine answers": (RESTARTING, EngineReady(2), State.serving, (OpenGate(), Announce())),
    "an engine is lost while a stop is under way": (STOPPING, EngineLost(1), State.draining, ()),
    "the next engine fails too": (RESTARTING, EngineFailed(2, CRASH), State.recovering, (HOLD, Pause(3, 1.0))),
    "the starts are spent": (SPENT, PauseOver(2), State.failed, (REFUSE, CutRequests(), Exit(70, GAVE_UP))),
    "the starts are spent before the first": (
        replace(WAITING, starts=(50.0, 60.0, 70.0, 75.0)),
        HostReady(),
        State.failed,
        (REFUSE, CutRequests(), Exit(70, GAVE_UP.split(";", maxsplit=1)[0])),
    ),
    "the file asks for another engine": (SERVING, CHANGE, State.reloading, (HOLD, Drain())),
    "the file asks for another engine while drained": (DRAINED, CHANGE, State.reloading, (HOLD, Drain())),
    "the file asks for other numbers": (SERVING, FileChanged(1, OTHER_LIMITS), State.serving, ()),
    "requests have finished for another engine": (FINISHING, Drained(), State.reloading, (RetireEngine(1),)),
    "the last engine has made room": (
        FINISHING,
        EngineRetired(1),
        State.reloading,
        (StartEngine(2, "reload", OTHER_PLAN),),
    ),
    "the last engine is lost before it has made room": (FINISHING, EngineLost(1), State.reloading, ()),
    "the last engine has died before it has made room": (
        FINISHING,
        EngineFailed(1, CRASH),
        State.reloading,
        (StartEngine(2, "reload", OTHER_PLAN),),
    ),
    "the changed plan answers": (
        RELOADING,
        EngineReady(2),
        State.serving,
        (Remember(replace(OTHER, is_proven=True)), OpenGate(), Announce()),
    ),
    "the changed plan answers while drained": (
        replace(RELOADING, is_drained=True),
        EngineReady(2),
        State.drained,
        (Remember(replace(OTHER, is_proven=True)), Announce()),
    ),
    "the changed plan is refused": (
        RELOADING,
        EngineFailed(2, BAD_WEIGHTS),
        State.recovering,
        (Remember(ASKED), HOLD, Pause(3, 0.0)),
    ),
    "the changed plan crashes as it starts": (
        RELOADING,
        EngineFailed(2, CRASH),
        State.recovering,
        (Remember(ASKED), HOLD, Pause(3, 0.0)),
    ),
    "the changed plan has no start left": (
        replace(RELOAD_PAUSING, starts=(70.0, 75.0)),
        PauseOver(3),
        State.recovering,
        (Remember(ASKED), HOLD, Pause(3, 0.0)),
    ),
    "the changed plan's next rung is started": (
        RELOAD_PAUSING,
        PauseOver(3),
        State.reloading,
        (StartEngine(3, "crashed", OTHER_PLAN),),
    ),
    "stop while requests finish for another engine": (FINISHING, StopRequested(), State.draining, (REFUSE, Drain())),
    "stop while another engine starts": (
        RELOADING,
        StopRequested(),
        State.draining,
        (REFUSE, CutRequests(), StopEngine()),
    ),
    "stop while drained": (DRAINED, StopRequested(), State.draining, (REFUSE, Drain())),
    "admission is stopped": (SERVING, DrainRequested(), State.drained, (HOLD,)),
    "admission is stopped once more": (DRAINED, DrainRequested(), State.drained, ()),
    "admission is stopped before the engine is up": (STARTING, DrainRequested(), State.starting, ()),
    "admission is resumed": (DRAINED, ResumeRequested(), State.serving, (OpenGate(),)),
    "admission is resumed once more": (SERVING, ResumeRequested(), State.serving, ()),
    "a GPU gets too hot": (SERVING, Heated(HOT), State.drained, (HOLD,)),
    "a GPU gets too hot while drained": (DRAINED, Heated(HOT), State.drained, ()),
    "a GPU gets too hot before the engine is up": (STARTING, Heated(HOT), State.starting, ()),
    "it has cooled down": (replace(DRAINED, is_drained=False, too_hot=HOT), Cooled(), State.serving, (OpenGate(),)),
    "it has cooled down, but a hand keeps it": (replace(DRAINED, too_hot=HOT), Cooled(), State.drained, ()),
    "admission is resumed, but it is too hot": (
        replace(DRAINED, too_hot=HOT),
        ResumeRequested(),
        State.drained,
        (),
    ),
    "the next engine answers while it is too hot": (
        replace(RESTARTING, too_hot=HOT),
        EngineReady(2),
        State.drained,
        (Announce(),),
    ),
    "an engine is found dead while drained": (DRAINED, EngineLost(1), State.recovering, (HOLD,)),
    "the next engine answers while drained": (
        replace(RESTARTING, is_drained=True),
        EngineReady(2),
        State.drained,
        (Announce(),),
    ),
    "stop before the host": (
        WAITING,
        StopRequested(),
        State.draining,
        (REFUSE, CutRequests(), StopEngine()),
    ),
    "stop while starting": (STARTING, StopRequested(), State.draining, (REFUSE, CutRequests(), StopEngine())),
    "stop while serving": (SERVING, StopRequested(), State.draining, (REFUSE, Drain())),
    "stop in a pause": (PAUSING, StopRequested(), State.draining, (REFUSE, CutRequests(), StopEngine())),
    "stop while restarting": (RESTARTING, StopRequested(), State.draining, (REFUSE, CutRequests(), StopEngine())),
    "a second stop cuts": (DRAINING, StopRequested(), State.draining, (CutRequests(), StopEngine())),
    "a third stop changes nothing": (STOPPING, StopRequested(), State.draining, ()),
    "everybody has been answered": (DRAINING, Drained(), State.draining, (CutRequests(), StopEngine())),
    "the drain ends after a second stop": (STOPPING, Drained(), State.draining, ()),
    "the engine dies while draining": (DRAINING, EngineFailed(1, CRASH), State.draining, (CutRequests(),)),
    "the engine is gone": (STOPPING, EngineStopped(), State.stopped, (Exit(0, "stopped as asked"),)),
    "the engine is gone before the drain's end": (
        DRAINING,
        EngineStopped(),
        State.stopped,
        (Exit(0, "stopped as asked"),),
    ),
}


@pytest.mark.parametrize(("before", "event", "state", "orders"), ANSWERS.values(), ids=ANSWERS)
def test_a_fact_is_answered(before: Situation, event: Event, state: State, orders: tuple[Action, ...]) -> None:
    """The table of the machine, row by row."""
    after, given_orders = step(before, event, AT)

    assert (state, orders) == (after.state, given_orders)


ALL = {
    "waiting": WAITING,
    "starting": STARTING,
    "serving": SERVING,
    "pausing": PAUSING,
    "restarting": RESTARTING,
    "drained": DRAINED,
    "finishing": FINISHING,
    "reloading": RELOADING,
    "draining": DRAINING,
    "stopping": STOPPING,
    "stopped": STOPPED,
    "failed": FAILED,
}
IGNORED: list[tuple[str, Event]] = [
    ("waiting", EngineReady(0)),
    ("waiting", EngineFailed(0, CRASH)),
    ("waiting", PauseOver(1)),
    ("waiting", Drained()),
    ("waiting", EngineStopped()),
    ("starting", HostReady()),
    ("starting", EngineReady(0)),
    ("starting", EngineReady(2)),
    ("starting", EngineFailed(0, CRASH)),
    ("starting", PauseOver(2)),
    ("starting", Drained()),
    ("starting", EngineStopped()),
    ("waiting", CHANGE),
    ("starting", CHANGE),
    ("serving", EngineRetired(1)),
    ("pausing", CHANGE),
    ("restarting", CHANGE),
    ("drained", EngineReady(1)),
    ("finishing", CHANGE),
    ("finishing", EngineReady(1)),
    ("finishing", StepUpDue()),
    ("reloading", CHANGE),
    ("reloading", Drained()),
    ("reloading", EngineRetired(2)),
    ("draining", CHANGE),
    ("draining", DrainRequested()),
    ("draining", Heated("GPU 0 has 91 °C")),
    ("draining", EngineRetired(1)),
    ("serving", HostReady()),
    ("serving", EngineReady(1)),
    ("serving", EngineFailed(0, CRASH)),
    ("serving", PauseOver(2)),
    ("serving", Drained()),
    ("serving", EngineStopped()),
    ("pausing", EngineReady(1)),
    ("pausing", EngineFailed(1, CRASH)),
    ("pausing", PauseOver(1)),
    ("pausing", PauseOver(3)),
    ("restarting", EngineReady(1)),
    ("restarting", EngineFailed(1, CRASH)),
    ("restarting", PauseOver(2)),
    ("draining", HostReady()),
    ("draining", EngineReady(1)),
    ("draining", EngineFailed(0, CRASH)),
    ("draining", PauseOver(2)),
]


@pytest.mark.parametrize(("name", "event"), IGNORED)
def test_a_fact_out_of_place_changes_nothing(name: str, event: Event) -> None:
    """Facts of another epoch, of an engine that has failed already, or of another state are no news."""
    assert (ALL[name], ()) == step(ALL[name], event, AT)


@pytest.mark.parametrize("name", ["stopped", "failed"])
@pytest.mark.parametrize(
    "event",
    [
        HostReady(),
        EngineReady(1),
        EngineFailed(1, CRASH),
        PauseOver(2),
        StopRequested(),
        Drained(),
        EngineStopped(),
        CHANGE,
        DrainRequested(),
        ResumeRequested(),
    ],
    ids=lambda event: type(event).__name__,
)
def test_the_end_is_final(name: str, event: Event) -> None:
    """Nothing follows on stopped or failed, so that there is one Exit."""
    assert (ALL[name], ()) == step(ALL[name], event, AT)


def test_an_engine_that_dies_as_it_becomes_ready_does_not_open_the_gate() -> None:
    """When a death is reported before the readiness of the same engine, the readiness is stale."""
    dead, _ = step(STARTING, EngineFailed(1, CRASH), AT)

    after, orders = step(dead, EngineReady(1), AT)

    assert (State.recovering, ()) == (after.state, orders)
    assert (StartEngine(2, "crashed", PLAN),) == step(after, PauseOver(2), AT)[1]


def test_since_is_the_time_of_the_last_change_of_state() -> None:
    """A new reason within a state does not make the state younger."""
    recovering, _ = step(replace(SERVING, since=5.0), EngineFailed(1, CRASH), 20.0)
    restarting, _ = step(recovering, PauseOver(2), 30.0)

    assert (20.0, "engine start 2") == (restarting.since, restarting.why)


def test_success_forgets_the_failures_in_a_row() -> None:
    """After an engine has answered, the next failure is the first again; the window still counts its start."""
    again, _ = step(replace(RESTARTING, failures_in_a_row=4), EngineReady(2), AT)

    _, orders = step(again, EngineFailed(2, CRASH), AT)

    assert Pause(3, 0.0) in orders
    assert (10.0, 20.0) == again.starts


def test_old_starts_make_room_for_new_ones() -> None:
    """When the oldest start has left the window, one more is allowed."""
    after, orders = step(SPENT, PauseOver(2), 150.5)

    assert (StartEngine(2, "crashed", PLAN),) == orders
    assert (60.0, 70.0, 75.0, 150.5) == after.starts


def test_a_failure_for_memory_leads_to_the_next_smaller_plan_which_is_remembered_first() -> None:
    """One rung, on disk before the engine is started with it, and the reason in the state's sentence."""
    after, orders = step(STARTING, EngineFailed(1, TOO_SMALL, BUILT), AT)
    _, started = step(after, PauseOver(2), AT)

    assert 1 == after.course.rung
    assert (Remember(after.course), HOLD, Pause(2, 0.0)) == orders
    assert (StartEngine(2, "kv_cache_too_small", after.course.plan),) == started
    assert PLAN.fingerprint() != after.course.plan.fingerprint()
    assert "max_model_len" in after.why


def test_a_larger_plan_that_fails_is_left_for_the_one_that_has_served() -> None:
    """The way back is the learned course as it was, and the next trial is farther away."""
    after, _ = step(ON_TRIAL, EngineFailed(2, TOO_SMALL, BUILT), AT)

    assert (ON_RUNG_1.course, None, 1) == (after.course, after.proven, after.trials_failed)


def test_what_is_forgotten_is_asked_for_again() -> None:
    """After `reset` the next start is rung 0."""
    after, _ = step(replace(PAUSING, course=LEARNED), Forgotten(), AT)

    assert (StartEngine(2, "crashed", PLAN),) == step(after, PauseOver(2), AT)[1]


def test_the_last_word_tells_the_whole_story() -> None:
    """Who reads only the last entry of the journal learns every failure and every step before it."""
    now, told = STARTING, []
    for epoch in (1, 2):
        now, _ = step(now, EngineFailed(epoch, TOO_SMALL if epoch == 1 else CRASH, BUILT), AT)
        now, _ = step(now, PauseOver(epoch + 1), AT)
        told.append(str(now.last_failure))

    _, orders = step(now, EngineFailed(3, BAD_WEIGHTS), AT)

    last_word = next(order.why for order in orders if isinstance(order, Exit))
    assert all(each in last_word for each in (*told, BROKEN, "rung 1"))


def test_a_changed_file_that_does_not_start_leaves_the_situation_as_it_was() -> None:
    """Course, limits and the number of the file are those from before, the reason is kept, and the story tells it."""
    now = SERVING
    for event in (CHANGE, Drained(), EngineRetired(1), EngineFailed(2, BAD_WEIGHTS), PauseOver(3), EngineReady(3)):
        now, _ = step(now, event, AT)

    assert (State.serving, ASKED, LIMITS, 0, None) == (now.state, now.course, now.limits, now.file, now.before)
    assert BROKEN == now.fell_back
    assert any(BROKEN in sentence for sentence in now.story)


def test_a_changed_file_walks_its_own_ladder() -> None:
    """A plan that a smaller one can cure is made smaller, as after a restart with that file."""
    reloading = replace(RELOADING, limits=replace(OTHER_LIMITS, choices=Choices(Floors(512, 4))))
    after, orders = step(reloading, EngineFailed(2, replace(TOO_SMALL, fitting_model_len=2064), BUILT), AT)

    assert (State.reloading, 1) == (after.state, after.course.rung)
    assert (Remember(after.course), HOLD, Pause(3, 0.0)) == orders


def test_a_changed_file_has_a_restart_window_of_its_own() -> None:
    """Ten reloads within an hour are no reason to give up."""
    now = SERVING
    for epoch in range(1, 11):
        now, _ = step(now, FileChanged(epoch, LIMITS, OTHER), AT)
        now, orders = step(now, EngineRetired(epoch), AT)
        assert (StartEngine(epoch + 1, "reload", OTHER_PLAN),) == orders
        now, _ = step(now, EngineReady(epoch + 1), AT)

    assert State.serving is now.state


def test_admission_stays_stopped_over_a_recovery() -> None:
    """Who drained an instance finds it drained when its engine has died and come back; who resumes it opens it."""
    now = DRAINED
    for event in (EngineLost(1), EngineFailed(1, CRASH), PauseOver(2), EngineReady(2)):
        now, orders = step(now, event, AT)

    assert State.drained is now.state
    assert OpenGate() not in orders
    assert (OpenGate(),) == step(now, ResumeRequested(), AT)[1]


def test_admission_that_is_resumed_during_a_recovery_opens_with_the_engine() -> None:
    """The order counts as soon as it can."""
    resumed, _ = step(replace(RESTARTING, is_drained=True), ResumeRequested(), AT)

    assert OpenGate() in step(resumed, EngineReady(2), AT)[1]


def test_what_keeps_admission_stopped_is_told() -> None:
    """The sentence is that of the hand, then that of the heat, also over a recovery."""
    now = replace(DRAINED, too_hot=HOT)

    now, _ = step(now, ResumeRequested(), AT)
    assert HOT == now.why
    for event in (EngineLost(1), EngineFailed(1, CRASH), PauseOver(2), EngineReady(2)):
        now, _ = step(now, event, AT)

    assert f"the engine answers; {HOT}" == now.why
    assert (OpenGate(),) == step(now, Cooled(), AT)[1]


def test_jitter_stretches_pauses_and_no_more() -> None:
    """Two instances of one machine do not start in step."""
    second = replace(RESTARTING, limits=replace(LIMITS, jitter=1.0))

    _, orders = step(second, EngineFailed(2, CRASH), AT)

    assert Pause(3, 1.25) in orders


# What no sequence of facts may break.
FAILURES = st.builds(Failure, st.sampled_from(list(Kind)), st.just("x"), place=st.sampled_from(list(Place)))
EPOCHS = st.integers(min_value=0, max_value=6)
EVENTS = st.one_of(
    st.builds(HostReady),
    st.builds(HostWaits, st.just("no driver")),
    st.builds(StepUpDue),
    st.builds(EngineRetired, EPOCHS),
    st.builds(Forgotten),
    st.builds(EngineReady, EPOCHS),
    st.builds(EngineLost, EPOCHS),
    st.builds(EngineFailed, EPOCHS, FAILURES, st.just(BUILT)),
    st.builds(PauseOver, EPOCHS),
    st.builds(Drained),
    st.builds(EngineStopped),
    st.builds(StopRequested),
    st.builds(DrainRequested),
    st.builds(ResumeRequested),
    st.builds(Heated, st.just("GPU 0 has 91 °C")),
    st.builds(Cooled),
    st.builds(FileChanged, st.integers(1, 9), st.just(LIMITS), st.sampled_from([None, OTHER, Course(PLAN, (LOWER,))])),
)


class World:
    """Carries orders out as the supervisor does, and asserts the invariants after each."""

    def __init__(self, limits: Limits) -> None:
        self.now = Situation(limits, Course(PLAN))
        self.on_disk: Course | None = None
        self.at = 0.0
        self.is_open = False
        self.engine: int | None = None
        self.is_stop_asked = False
        self.exits: list[Exit] = []
        self.starts: list[float] = []
        self.pauses: list[Pause] = []

    def happens(self, event: Event) -> None:
        """Step, carry the orders out, check."""
        is_stale = self._is_stale(event)
        before = self.now
        self.now, orders = step(before, event, self.at)
        if is_stale:
            assert (before, ()) == (self.now, orders)
        self.is_stop_asked |= isinstance(event, StopRequested)
        has_failed = isinstance(event, EngineFailed) and event.epoch == self.engine
        has_retired = isinstance(event, EngineRetired) and event.epoch == self.engine
        has_failed = has_failed or (has_retired and before.next is not None and before.state is not State.draining)
        if has_failed or (isinstance(event, EngineStopped) and before.state is State.draining):
            self.engine = None
        if isinstance(event, FileChanged) and self.now.before is not None and before.before is None:
            self._take(event)
        for order in orders:
            self._carry_out(order)
        self._check_promises(before)
        self._check()

    def _take(self, change: FileChanged) -> None:
        """A changed file has been taken: it has starts of its own, and what was learned comes from the disk."""
        self.starts = []
        if change.course is not None and change.course.steps:
            self.on_disk = change.course

    def _check_promises(self, before: Situation) -> None:
        """What a reload or a drain must not do."""
        if before.before is not None:
            assert self.now.state is not State.failed, "ended because of a reload"
        if self.now.before is None and before.before is not None and self.now.state not in UP | {State.draining}:
            assert (before.before.course, before.before.limits) == (self.now.course, self.now.limits)
            self.starts = []
        is_stopped = self.now.is_drained or bool(self.now.too_hot)
        assert not (is_stopped and self.now.state is State.serving)
        assert (self.now.state is State.drained) <= is_stopped
        assert (self.now.before is not None) <= (self.now.state in {State.reloading, State.draining, *FINAL})

    def _is_stale(self, event: Event) -> bool:
        """True for a fact about an engine that is not current."""
        return isinstance(event, EngineReady | EngineLost | EngineFailed | EngineRetired) and event.epoch != self.engine

    def _carry_out(self, order: Action) -> None:
        match order:
            case Remember(course):
                self.on_disk = course
            case StartEngine(epoch, _, plan):
                assert self.engine is None, "a second engine"
                assert plan == self.now.course.plan
                is_known = self.now.proven is not None or self.on_disk == self.now.course
                assert is_known or not self.now.course.steps, "an unproven plan that is not on disk"
                assert not self.is_stop_asked, "an engine after a stop was asked for"
                self.engine = epoch
                self.starts.append(self.at)
            case OpenGate():
                self.is_open = True
            case CloseGate():
                self.is_open = False
            case Pause():
                self.pauses.append(order)
            case Exit():
                self.exits.append(order)

    def _check(self) -> None:
        limits = self.now.limits
        recent = [start for start in self.starts if self.at - limits.restart_window_s < start]
        assert len(recent) <= limits.restart_limit
        assert self.is_open == (self.now.state is State.serving)
        assert self.now.state not in UP or self.engine == self.now.epoch
        assert (self.now.state in FINAL) == (len(self.exits) == 1)
        assert len(self.exits) <= 1
        assert self.now.why


@given(
    st.lists(st.tuples(EVENTS, st.floats(0, 50)), max_size=60),
    st.integers(1, 4),
    st.floats(1, 200),
)
@settings(max_examples=500, deadline=None)
def test_any_sequence_of_facts_keeps_the_invariants(
    facts: list[tuple[Event, float]], restart_limit: int, restart_window_s: float
) -> None:
    """However facts arrive, also stale, doubled and invented ones, the promises of the machine hold."""
    world = World(replace(LIMITS, restart_limit=restart_limit, restart_window_s=restart_window_s))

    for event, passed in facts:
        world.at += passed
        world.happens(event)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_faithful_world_always_ends_after_a_stop(data: st.DataObject) -> None:
    """When every order is carried out and reported, a stop leads to the one Exit, whatever came before."""
    world = World(LIMITS)
    world.happens(HostReady())
    for _ in range(data.draw(st.integers(0, 12))):
        if world.now.state in FINAL:
            return
        world.at += data.draw(st.floats(0, 60))
        if world.engine is None:
            world.happens(PauseOver(world.pauses[-1].epoch))
        elif world.now.state in HOLDING and data.draw(st.booleans()):
            world.happens(EngineReady(world.engine))
        else:
            world.happens(EngineFailed(world.engine, data.draw(FAILURES)))
    if world.now.state in FINAL:
        return

    world.happens(StopRequested())
    if not world.now.is_stopping_now:
        ends: list[Event] = [Drained(), StopRequested()]
        world.happens(data.draw(st.sampled_from(ends)))
    assert world.now.is_stopping_now
    world.happens(EngineStopped())

    assert State.stopped is world.now.state
    assert [Exit(0, "stopped as asked")] == world.exits


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_faithful_world_serves_again_after_any_reload(data: st.DataObject) -> None:
    """However often the changed plan fails, the instance ends up with it or with what served before, in few starts."""
    limit = data.draw(st.integers(1, 4))
    world = World(replace(LIMITS, restart_limit=limit, choices=Choices(Floors(1024, 4))))
    for event in (HostReady(), EngineReady(1)):
        world.happens(event)
    served = world.now
    world.happens(FileChanged(1, world.now.limits, data.draw(st.sampled_from([OTHER, Course(PLAN, (LOWER,))]))))
    if data.draw(st.booleans()):
        world.happens(EngineFailed(1, data.draw(FAILURES)))
    else:
        world.happens(Drained())
        world.happens(EngineRetired(1))

    while world.now.before is not None:
        world.at += data.draw(st.floats(0, 60))
        hands: list[Event] = [DrainRequested(), ResumeRequested(), Heated(HOT), Cooled(), StepUpDue()]
        world.happens(data.draw(st.sampled_from(hands)))
        if world.engine is None:
            world.happens(PauseOver(world.pauses[-1].epoch))
        elif data.draw(st.booleans()):
            world.happens(EngineReady(world.engine))
        else:
            world.happens(EngineFailed(world.engine, data.draw(FAILURES), BUILT))

    is_kept = world.now.file == 1
    assert world.now.state in UP if is_kept else world.now.state is State.recovering
    assert is_kept or (served.course, PLAN) == (world.now.course, world.now.course.plan)
    if not is_kept:
        world.happens(PauseOver(world.pauses[-1].epoch))
        world.happens(EngineReady(world.now.epoch))
    assert world.now.state in UP
    assert [] == world.exits


RETRIED = st.builds(Failure, st.sampled_from((Kind.killed, Kind.crashed, Kind.unknown)), st.just("x"))


@given(st.lists(RETRIED, min_size=4, max_size=4))
def test_an_engine_that_never_starts_ends_in_giving_up(failures: list[Failure]) -> None:
    """With every start failing inside the window, the limit is used up exactly, then comes status 70."""
    world = World(replace(LIMITS, restart_limit=3, restart_window_s=3600.0))
    world.happens(HostReady())

    for failure in failures:
        if world.engine is not None:
            world.happens(EngineFailed(world.engine, failure))
            world.at += world.pauses[-1].seconds
            world.happens(PauseOver(world.pauses[-1].epoch))

    assert 3 == len(world.starts)
    assert [70] == [order.status for order in world.exits]
