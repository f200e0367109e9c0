"""What the supervisor's side makes of several front ends, with pipes that only write down. Real ones: tests/e2e."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from llm_serve.core.status import Snapshot
from llm_serve.front_ends import messages
from llm_serve.front_ends import pool as module
from llm_serve.front_ends.pool import FrontEnds, _Child
from llm_serve.host.board import Board, Seat
from tests.patience import patient


class Gate:
    """The first process's own."""

    def __init__(self) -> None:
        self.held, self.in_flight = 1, 3

    def open(self, *_: object) -> None:
        """Nothing."""

    def hold(self) -> None:
        """Nothing."""

    def refuse(self, *_: object) -> None:
        """Nothing."""


class Pipe:
    """What one front end has been sent."""

    def __init__(self) -> None:
        self.sent: list[messages.Message] = []

    def send(self, message: messages.Message) -> None:
        """Written down."""
        self.sent.append(message)


class Crowd:
    """Three front ends, two of which are other processes."""

    def __init__(self) -> None:
        self.board = Board(3)
        party = SimpleNamespace(ready=b"ready")
        seat, nobody = Seat(self.board, 0), SimpleNamespace()
        self.all = FrontEnds(Gate(), seat, nobody, nobody, party)  # type: ignore[arg-type]
        self.pipes = {place: Pipe() for place in (1, 2)}
        for place, pipe in self.pipes.items():
            self.all._children[place] = _Child(place, os.getpid(), pipe)  # type: ignore[arg-type]
            self.board.rows[place].turned_at = time.monotonic()

    def hear(self, place: int, fact: messages.Fact) -> None:
        """The front end there has said this."""
        self.all._hear(self.all._children[place], fact)

    def told(self, place: int) -> list[str]:
        """The kinds of orders that it was given."""
        return [type(each).__name__ for each in self.pipes[place].sent]


@pytest.fixture
def crowd() -> Crowd:
    """Nobody has been told anything yet."""
    return Crowd()


def snapshot() -> Snapshot:
    """Of any instance."""
    return Snapshot(
        "x",
        "m",
        "serving",
        "",
        0.0,
        0.0,
        0.0,
        "serving",
        1.0,
        "0",
        "0",
        1,
        "a:1",
        "x.toml",
        failures=({"much": "text"},),
    )


def test_what_waits_and_is_in_flight_is_added_up(crowd: Crowd) -> None:
    """A row's turn may be a while ago, and what was let in since counts."""
    crowd.board.rows[1].in_flight, crowd.board.rows[1].waiting = 5, 2
    crowd.board.rows[2].inside, crowd.board.rows[2].waiting = 4, 1

    assert (1 + 2 + 1, 3 + 5 + 5) == (crowd.all.held, crowd.all.in_flight)


def test_who_has_not_heard_yet_that_the_gate_is_closed_may_be_letting_somebody_in(crowd: Crowd) -> None:
    """A drain does not end before that; other orders do not matter to it."""
    crowd.all.hold()
    crowd.all.tell(snapshot())
    busy = [crowd.all.in_flight - 3]
    for place in (1, 2):
        crowd.board.rows[place].heard = 1
        busy.append(crowd.all.in_flight - 3)

    assert [2, 1, 0] == busy


def test_a_verdict_counts_what_all_have_lost(crowd: Crowd) -> None:
    """Who has not said yet may have lost anything, so that nobody was alone."""
    crowd.all.unbind(7)
    assert 1 + 2 + 2 == crowd.all.judge(1, may_be_a_request=True)
    crowd.board.rows[1].lost_epoch, crowd.board.rows[1].lost = 7, 0
    crowd.board.rows[2].lost_epoch, crowd.board.rows[2].lost = 6, 9
    assert 1 + 2 == crowd.all.judge(1, may_be_a_request=True)
    crowd.board.rows[2].lost_epoch, crowd.board.rows[2].lost = 7, 0
    assert 1 == crowd.all.judge(1, may_be_a_request=True)
    del crowd.all._children[1], crowd.all._children[2]
    assert 4 == crowd.all.judge(4, may_be_a_request=False)


def test_one_that_comes_later_is_told_what_holds(crowd: Crowd) -> None:
    """The last order of each kind, in an order that makes sense, and nothing of an engine that is gone."""
    steps: Any = SimpleNamespace(share=lambda _: None)
    crowd.all.attach(1, b"offer")
    crowd.all.hold()
    crowd.all.bind(1, ("generate",), steps)
    crowd.all.tell(snapshot())
    crowd.all.open(lambda *_: None, 16)  # type: ignore[arg-type]
    crowd.all.ban("abc", 60)
    holds = crowd.all._what_holds()

    assert ["Ban", "Tell", "Attach", "Bind", "Open"] == [type(each).__name__ for each in holds]
    assert messages.Bind(1, ("generate",), b"ready") in holds
    assert all(not each.now.failures for each in holds if isinstance(each, messages.Tell))
    crowd.all.unbind(1)
    crowd.all.attach(2, b"next")
    crowd.all.hold()
    crowd.all.cut("over")
    assert ["Ban", "Tell", "Attach", "Hold", "Cut"] == [type(each).__name__ for each in crowd.all._what_holds()]


def test_what_one_bans_is_banned_everywhere(crowd: Crowd) -> None:
    """At the first process too, and for those who come while it holds."""
    banned: list[tuple[str, float]] = []
    crowd.all._turns.survivor = SimpleNamespace(ban=lambda *given: banned.append(given))

    crowd.hear(1, messages.Banned("abc", 60.0))
    crowd.all.ban("old", -1.0)

    assert [("abc", 60.0)] == banned
    assert (["Ban"], ["Ban", "Ban"]) == (crowd.told(1), crowd.told(2))
    assert ["Ban"] == [type(each).__name__ for each in crowd.all._what_holds()]


async def test_a_scrape_waits_for_nobody_long(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not answer in time counts as it did last."""
    monkeypatch.setattr(module, "_COUNTED_WITHIN_S", 0.1)
    began = time.monotonic()

    text = await crowd.all.metrics()

    assert b"llm_serve_requests_total" in text
    assert time.monotonic() - began < patient(2)
    assert (["Count"], ["Count"]) == (crowd.told(1), crowd.told(2))


def test_a_dead_engine_that_one_has_met_is_told(crowd: Crowd) -> None:
    """The supervisor decides what follows."""
    found: list[int] = []
    crowd.all.found_dead = found.append

    crowd.hear(2, messages.FoundDead(3))

    assert [3] == found
