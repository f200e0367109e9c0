"""Who is suspected of killing engines, who runs alone, and who is guilty."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_serve.core.suspects import Suspects
from llm_serve.host.board import Board, Seat


def in_flight(names: Iterable[str], at: float = 0.0) -> Suspects:
    """A ledger with these requests at the engine."""
    ledger = Suspects()
    for name in names:
        ledger.enter(name)
        ledger.give(name, at)
    return ledger


def die(ledger: Suspects, at: float = 10.0, *, may_be_a_request: bool = True) -> None:
    """The engine dies."""
    ledger.engine_lost(at)
    ledger.verdict(may_be_a_request=may_be_a_request)


def again(ledger: Suspects, *names: str, at: float = 11.0) -> None:
    """The next engine has them."""
    for name in names:
        ledger.give(name, at)


def test_alone_at_two_deaths_is_guilty() -> None:
    """There is nobody else who could have done it."""
    ledger = in_flight("a")
    die(ledger)
    assert not ledger.is_guilty("a")
    again(ledger, "a")
    die(ledger, 20)

    assert ledger.is_guilty("a")


def test_company_at_two_deaths_is_suspected_and_not_guilty() -> None:
    """Each of them runs alone, the earliest first, and others wait."""
    ledger = in_flight("ab")
    die(ledger)
    assert all(map(ledger.may_run, "ab"))
    again(ledger, "a", "b")
    die(ledger, 20)
    ledger.enter("new")

    assert not ledger.is_guilty("a")
    assert "a" == ledger.next_suspect
    assert ["a"] == list(filter(ledger.may_run, ["a", "b", "new"]))


def test_the_one_that_dies_alone_is_guilty_and_its_company_is_not() -> None:
    """Three deaths are enough for two in flight; the innocent one goes on."""
    ledger = in_flight("ab")
    die(ledger)
    again(ledger, "a", "b")
    die(ledger, 20)
    again(ledger, "a", at=21)
    die(ledger, 22)

    assert [True, False] == [ledger.is_guilty(name) for name in "ab"]
    ledger.leave("a")
    assert ledger.may_run("b")


def test_an_answer_clears() -> None:
    """A suspect that is answered makes room for the next, and then for everybody."""
    ledger = in_flight("ab")
    die(ledger)
    again(ledger, "a", "b")
    die(ledger, 20)
    ledger.enter("new")
    for name in "ab":
        again(ledger, name)
        assert not ledger.may_run("new")
        ledger.leave(name)

    assert ledger.may_run("new")


def test_long_enough_alone_clears_too() -> None:
    """An endless answer does not keep the others out; it goes on beside them."""
    ledger = in_flight("ab")
    die(ledger)
    again(ledger, "a", "b")
    die(ledger, 20)
    ledger.leave("b")
    ledger.enter("new")
    again(ledger, "a", at=21)
    assert not ledger.may_run("new")
    ledger.clear("a")

    assert ledger.may_run("new")
    assert ledger.next_suspect is None


def test_a_clearance_that_comes_too_late_clears_nobody() -> None:
    """It has died in the meantime, or has gone."""
    ledger = in_flight("ab")
    die(ledger)
    again(ledger, "a", "b")
    die(ledger, 20)
    ledger.clear("a")
    ledger.clear("gone")

    assert "a" == ledger.next_suspect


@pytest.mark.parametrize(
    ("seconds", "trial_s"),
    [(0.1, 5.0), (2.5, 5.0), (4.0, 8.0), (30.0, 60.0), (3000.0, 60.0)],
)
def test_a_trial_is_twice_as_long_as_the_fatal_time(seconds: float, trial_s: float) -> None:
    """Within bounds; the longest of its fatal times counts."""
    ledger = in_flight("a", at=100.0)
    die(ledger, 100.0 + seconds)
    again(ledger, "a", at=5000.0)
    die(ledger, 5000.05)

    assert trial_s == pytest.approx(ledger.trial_s("a"))


def test_somebody_elses_kill_counts_against_nobody() -> None:
    """However often an engine is killed by hand, its requests are innocent."""
    ledger = in_flight("a")
    for at in (10, 20, 30):
        die(ledger, at, may_be_a_request=False)
        again(ledger, "a", at=at + 1)

    assert not ledger.is_guilty("a")
    assert ledger.next_suspect is None


def test_who_waits_at_a_death_is_not_part_of_it() -> None:
    """Only what is with the engine counts, also when the loss is told twice."""
    ledger = in_flight("a")
    ledger.enter("waiting")
    ledger.engine_lost(10)
    ledger.engine_lost(11)
    ledger.verdict(may_be_a_request=True)
    ledger.verdict(may_be_a_request=True)
    again(ledger, "a", "waiting")
    die(ledger, 20)

    assert "a" == ledger.next_suspect
    assert not ledger.is_guilty("waiting")


def test_a_ban_ends() -> None:
    """After its time the same request is let in again."""
    ledger = Suspects()
    assert not ledger.has_banned
    ledger.ban("f", until=100.0)

    assert [True, False, False] == [
        ledger.is_banned("f", at=99.0),
        ledger.is_banned("g", 99.0),
        ledger.is_banned("f", 100.0),
    ]
    assert not ledger.has_banned


class Life(RuleBasedStateMachine):
    """Requests come, run by the ledger's leave, and kill engines if they are of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Suspects()
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.deaths = 0

    @rule(kills=st.booleans())
    def comes(self, kills: bool) -> None:
        """A request, which kills engines or does not."""
        name = f"{'killer' if kills else 'good'} {len(self.waiting) + len(self.running)} {self.deaths} {id(object())}"
        if name not in self.waiting + self.running:
            self.ledger.enter(name)
            self.waiting.append(name)

    @rule()
    def run(self) -> None:
        """Everybody who may, runs; the guilty are refused."""
        for name in list(self.waiting):
            if self.ledger.is_guilty(name):
                assert "killer" in name
                self.waiting.remove(name)
                self.ledger.leave(name)
            elif self.ledger.may_run(name):
                self.ledger.give(name, float(self.deaths))
                self.waiting.remove(name)
                self.running.append(name)

    @precondition(lambda self: any("killer" in name for name in self.running))
    @rule()
    def kills(self) -> None:
        """One of the killers does it."""
        self.deaths += 1
        die(self.ledger, float(self.deaths))
        self.waiting, self.running = self.waiting + self.running, []

    @precondition(lambda self: not any("killer" in name for name in self.running))
    @rule()
    def answers(self) -> None:
        """All that runs is answered."""
        for name in self.running:
            self.ledger.leave(name)
        self.running = []

    @invariant()
    def nobody_is_stuck(self) -> None:
        """With nothing running, somebody of those who wait may run, or is guilty."""
        if self.waiting and not self.running:
            assert any(self.ledger.may_run(name) or self.ledger.is_guilty(name) for name in self.waiting)

    @invariant()
    def a_suspect_is_alone(self) -> None:
        """Beside a suspect nobody runs."""
        if self.ledger.next_suspect in self.running:
            assert [self.ledger.next_suspect] == self.running


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


class Ledgers:
    """The ledgers of two front ends before one engine."""

    def __init__(self) -> None:
        board = Board(2)
        self.each = [Suspects(Seat(board, place)) for place in range(2)]

    def give(self, place: int, *names: str) -> None:
        """These are with the engine."""
        for name in names:
            if name not in self.each[place]._records:
                self.each[place].enter(name)
            self.each[place].give(name, 0.0)

    def die(self) -> None:
        """Each says what it has lost, and hears of all."""
        everywhere = sum(ledger.engine_lost(10.0) for ledger in self.each)
        for ledger in self.each:
            ledger.verdict(may_be_a_request=True, everywhere=everywhere)

    def may_run(self, *names: str) -> list[str]:
        """Those of these, the first ledger's in capitals, that the engine may have."""
        return [name for name in names if self.each[name.islower()].may_run(name)]


def test_company_at_another_front_end_is_company() -> None:
    """The only one of its front end was not alone: it is suspected, and not guilty."""
    ledgers = Ledgers()
    for _ in range(2):
        ledgers.give(0, "A")
        ledgers.give(1, "b")
        ledgers.die()

    assert not ledgers.each[0].is_guilty("A")
    assert not ledgers.each[1].is_guilty("b")


def test_a_trial_is_alone_before_all_front_ends() -> None:
    """One suspect at a time, the first front end's first, each in an empty engine; whoever is new waits everywhere."""
    ledgers = Ledgers()
    for _ in range(2):
        ledgers.give(0, "A", "B")
        ledgers.give(1, "c")
        ledgers.die()
    for place, name in ((0, "N"), (1, "n")):
        ledgers.each[place].enter(name)
    everybody = ("A", "B", "N", "c", "n")

    assert ["A"] == ledgers.may_run(*everybody)
    ledgers.give(0, "A")
    assert [] == ledgers.may_run("B", "N", "c", "n")
    ledgers.each[0].leave("A")
    assert ["B"] == ledgers.may_run("B", "N", "c", "n")
    ledgers.give(0, "B")
    ledgers.each[0].clear("B")  # it goes on for long, and nobody may join the next suspect
    assert [] == ledgers.may_run("N", "c", "n")
    ledgers.each[0].leave("B")
    assert ["c"] == ledgers.may_run("N", "c", "n")
    ledgers.give(1, "c")
    ledgers.die()

    assert ledgers.each[1].is_guilty("c")
    ledgers.each[1].leave("c")
    assert ["N", "n"] == ledgers.may_run("N", "n")
