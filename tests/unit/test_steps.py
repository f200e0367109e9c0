"""Which of an engine's steps count as progress. The values are vLLM's own classes."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from llm_serve.core import tally
from llm_serve.core.admission import Load
from llm_serve.engine.steps import StepWatch

pytestmark = pytest.mark.vllm


class Engine:
    """A watch with a clock that the test turns, and a number of requests that the test sets."""

    def __init__(self) -> None:
        self.now, self.unfinished = 100.0, 0
        self.watch = StepWatch(lambda: self.now)
        self.watch.attach(lambda: self.unfinished)

    def stalled_at(self, now: float) -> float:
        """What the watch says at that time."""
        self.now = now
        return self.watch.stalled_for_s()

    def step_at(
        self, now: float, running: int = 1, waiting: int = 0, used: float = 0.1, *, token: bool = False
    ) -> None:
        """One step of the engine at that time."""
        self.now = now
        stats = SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=used)
        self.watch.record(stats, IterationStats() if token else None)


@pytest.fixture
def engine() -> Engine:
    """One that has nothing to do."""
    return Engine()


def test_nothing_to_do_is_no_stall(engine: Engine) -> None:
    """However long the last step is ago."""
    engine.step_at(101)

    assert engine.stalled_at(9999) == 0.0


def test_a_stall_counts_from_the_first_request(engine: Engine) -> None:
    """Not from the last step of an idle night before it."""
    engine.step_at(101)
    engine.stalled_at(5000)
    engine.unfinished = 1

    assert [engine.stalled_at(at) for at in (5001, 5004)] == [0.0, 3.0]


@pytest.mark.parametrize("token", [True, False], ids=["a token", "a number that moved"])
def test_progress_ends_a_stall(engine: Engine, token: bool) -> None:
    """A long prompt gives no token for many steps, but each of them fills more of the cache."""
    engine.unfinished = 1
    engine.step_at(101, used=0.1)
    assert [engine.stalled_at(at) for at in (101, 110)] == [0.0, 9.0]

    engine.step_at(120, used=0.1 if token else 0.2, token=token)

    assert engine.stalled_at(123) == pytest.approx(3.0)


def test_a_loop_that_turns_without_scheduling_stalls(engine: Engine) -> None:
    """The same numbers over and over, and no token: a scheduler's deadlock."""
    engine.unfinished = 1
    engine.step_at(100, running=0, waiting=1)
    engine.stalled_at(100)
    for at in range(101, 131):
        engine.step_at(at, running=0, waiting=1)

    assert engine.stalled_at(131) == pytest.approx(31.0)
    assert engine.watch.waiting_for() == "1 requests unfinished; the scheduler last had 0 running, 1 waiting"


def test_one_core_that_moves_does_not_hide_behind_another(engine: Engine) -> None:
    """Each core has numbers of its own: two that alternate between the same ones do not look like movement."""
    engine.unfinished = 2
    stats = [SchedulerStats(num_running_reqs=number, kv_cache_usage=number / 10) for number in (1, 2)]
    for at in (100.0, 101.0, 102.0):
        engine.now = at
        for core, each in enumerate(stats):
            engine.watch.record(each, None, engine_idx=core)
        engine.watch.stalled_for_s()

    assert engine.stalled_at(110) == pytest.approx(10.0)


def test_a_request_that_ends_ends_the_stall(engine: Engine) -> None:
    """The next one begins to count anew."""
    engine.unfinished = 1
    engine.stalled_at(100)
    engine.unfinished = 0
    assert engine.stalled_at(160) == 0.0
    engine.unfinished = 1

    assert engine.stalled_at(161) == 0.0
    assert engine.stalled_at(162) == pytest.approx(1.0)


def test_the_load_of_all_cores_is_told_after_each_step(engine: Engine) -> None:
    """Sequences are added up, also those that wait for something of their own; the fullest cache counts."""
    told: list[Load] = []
    engine.watch.tell(told.append)
    first = SchedulerStats(num_running_reqs=3, num_waiting_reqs=1, num_skipped_waiting_reqs=2, kv_cache_usage=0.5)
    second = SchedulerStats(num_running_reqs=4, num_waiting_reqs=0, kv_cache_usage=0.2)

    engine.watch.record(first, None, engine_idx=0)
    engine.watch.record(None, IterationStats(), engine_idx=0)
    engine.watch.record(second, None, engine_idx=1)

    assert [Load(3, 3, 0.5), Load(7, 3, 0.5)] == told


def test_other_clients_of_the_engine_count(engine: Engine) -> None:
    """Their requests are work to be done, and a step that only they were told of is one."""
    theirs = [1]
    engine.watch.share(lambda: theirs[0])

    assert [engine.stalled_at(at) for at in (5000, 5003)] == [0.0, 3.0]
    engine.watch.heard_of_step(5002)
    engine.watch.heard_of_step(4000)
    assert engine.stalled_at(5004) == 2.0
    theirs[0] = 0
    assert engine.stalled_at(6000) == 0.0


def test_what_clients_get_is_counted_from_their_first_request_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token of all is asked for by the daemon itself, before anybody is let in."""
    counted = tally.Tally()
    monkeypatch.setattr(tally, "HERE", counted)
    stats = IterationStats()
    stats.num_generation_tokens, stats.time_to_first_tokens_iter = 3, [0.2]
    stats.prompt_token_stats.total = 7

    engine.watch.record(None, stats)
    before = list(counted.cells)
    engine.watch.tell(lambda _: None)
    engine.watch.record(None, stats)

    assert 0.0 == sum(before)
    assert [7.0, 3.0, 1.0] == [*counted.cells[:2], sum(counted.cells[2:])]


def test_the_load_is_that_of_the_last_step(engine: Engine) -> None:
    """Also before there was one."""
    before = engine.watch.load
    engine.step_at(101, running=2, waiting=3, used=0.25)

    assert (Load(), Load(2, 3, 0.25)) == (before, engine.watch.load)
