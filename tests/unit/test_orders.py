"""What becomes of orders: the answer, what the service manager hears, and what people can look up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from llm_serve.core.course import Course, Floors
from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.events import (
    Drained,
    EngineFailed,
    EngineReady,
    EngineRetired,
    Event,
    FileChanged,
    PauseOver,
    StopRequested,
)
from llm_serve.core.evidence import Failure, Kind
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.machine import Situation, step
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import Choices, Limits
from llm_serve.core.states import State
from llm_serve.host.systemd import Silence
from llm_serve.instance import Instance
from llm_serve.orders import Orders
from llm_serve.supervisor import Supervisor

LIMITS = Limits(4, 100.0, Choices(Floors(512, 1)))
BROKEN = Failure(Kind.weights, "HeaderTooLarge.")
STARTS: tuple[Event, ...] = (Drained(), EngineRetired(1), EngineReady(2))
FAILS: tuple[Event, ...] = (Drained(), EngineRetired(1), EngineFailed(2, BROKEN), PauseOver(3), EngineReady(3))


def instance(text: str = "") -> Instance:
    """What is read of a file with these lines."""
    settings = parse_instance(f'model = "m"\n{text}', source="/etc/llm-serve/x.toml", name="x")
    return Instance(settings, EnginePlan.from_settings(settings), frozenset(), Path("/nowhere"))


class Told(Silence):
    """Remembers what a service manager would have heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reloading(self) -> None:
        """Written down."""
        self.heard.append("RELOADING")

    def ready(self) -> None:
        """Written down."""
        self.heard.append("READY")


class Stand:
    """The real machine with a scripted world: `coming` are the facts that follow, one at each wait."""

    def __init__(self, coming: tuple[Event, ...] = (), **situation: Any) -> None:
        self.instance = self.before = instance()
        up = Situation(LIMITS, Course(self.instance.plan, is_proven=True), State.serving, epoch=1, has_engine=True)
        self.situation = replace(up, **{"has_served": True, **situation})
        self.reload_failed: str | None = None
        self._coming = list(coming)

    async def tell(self, event: Event) -> Situation:
        """One step."""
        before = self.situation
        self.situation, _ = step(before, event, 0.0)
        if self.situation.file < before.file:
            self.instance = self.before
        return self.situation

    async def offer(self, new: Instance, *, needs_engine: bool) -> Situation:
        """As the supervisor does it, without a disk."""
        await self.tell(FileChanged(1, LIMITS, Course(new.plan) if needs_engine else None))
        if self.situation.file == 1:
            self.instance = new
        return self.situation

    async def until(self, is_so: Callable[[Situation], bool]) -> Situation:
        """Let the facts come until it is so."""
        while not is_so(self.situation):
            await asyncio.sleep(0)
            await self.tell(self._coming.pop(0))
        return self.situation


def orders(stand: Stand, told: Told, read: Callable[[], Instance], examine: Callable[[Instance], None]) -> Orders:
    """Orders to a stand."""
    return Orders(cast("Supervisor", stand), told, read=read, examine=examine)


def refuse(*_: object) -> Any:
    """What a wrong file leads to."""
    raise ConfigError([Problem("x.toml", 3, "engine.dtype", "is not a type")])


LESS = "[engine]\nmax_num_seqs = 4"
RELOADS: dict[str, tuple[tuple[Event, ...], str, int, str]] = {
    "nothing has changed": ((), "", 0, "no option has changed; the API keys have been read again."),
    "a limit": ((), "[server]\nmax_queued = 1", 0, "applied server.max_queued without a new engine."),
    "another engine": (STARTS, LESS, 0, "applied engine.max_num_seqs with a new engine (start 2)."),
    "another engine that does not start": (
        FAILS,
        LESS,
        70,
        "the changed file's engine does not start: weights: HeaderTooLarge. The file as it was before serves again.",
    ),
    "a stop while requests finish": (
        (StopRequested(),),
        LESS,
        75,
        "the instance ended before the reload did: finishing requests in flight.",
    ),
    "another address": (
        (),
        '[server]\nlisten = "127.0.0.1:1"\nmax_queued = 1',
        78,
        (
            "server.listen cannot change while the instance runs: nothing was changed. `systemctl restart llm-serve@x` "
            "takes the file as it is now, and refuses no connection."
        ),
    ),
}


@pytest.mark.parametrize(("coming", "text", "status", "message"), RELOADS.values(), ids=RELOADS)
async def test_a_reload_is_answered(coming: tuple[Event, ...], text: str, status: int, message: str) -> None:
    """With the exit status and one sentence; a failure is also there to be looked up."""
    stand, told = Stand(coming), Told()

    reply = await orders(stand, told, lambda: instance(text), lambda _: None).reload()

    assert (status, message) == (reply.exit_status, reply.message)
    assert (message if status else None) == stand.reload_failed
    is_up = stand.situation.state is State.serving
    assert ["RELOADING", "READY"][: 1 + is_up] == told.heard


@pytest.mark.parametrize("is_unreadable", [True, False], ids=["the file is wrong", "vLLM refuses it"])
async def test_a_file_that_is_refused_changes_nothing(is_unreadable: bool) -> None:
    """Status 78, every problem, and the machine has heard of nothing."""
    stand, told = Stand(), Told()
    before = stand.situation
    read: Callable[[], Instance] = refuse if is_unreadable else lambda: instance(LESS)

    reply = await orders(stand, told, read, refuse).reload()

    assert 78 == reply.exit_status
    assert reply.message.startswith("x.toml:3: engine.dtype: is not a type")
    assert (before, ["RELOADING", "READY"]) == (stand.situation, told.heard)


@pytest.mark.parametrize("state", [State.starting, State.recovering, State.draining])
async def test_a_reload_out_of_place_is_refused_before_anything_is_read(state: State) -> None:
    """Status 75, and the service manager hears nothing: READY would be a lie."""
    stand, told = Stand(state=state), Told()

    reply = await orders(stand, told, refuse, refuse).reload()

    assert (75, []) == (reply.exit_status, told.heard)
    assert f"the instance is {state}" in reply.message


async def test_an_engine_that_dies_during_the_check_ends_the_reload() -> None:
    """The recovery has the word, and its READY ends the reload for the service manager."""
    stand, told = Stand(), Told()

    def die(_: Instance) -> None:
        stand.situation = replace(stand.situation, state=State.recovering)

    reply = await orders(stand, told, lambda: instance(LESS), die).reload()

    assert (75, ["RELOADING"]) == (reply.exit_status, told.heard)


async def test_one_reload_at_a_time() -> None:
    """The second is told so at once, the first goes on."""
    stand, told = Stand(STARTS), Told()
    both = orders(stand, told, lambda: instance(LESS), lambda _: None)

    first, second = await asyncio.gather(both.reload(), both.reload())

    assert (0, 75) == (first.exit_status, second.exit_status)
    assert "under way already" in second.message


async def test_drain_and_resume_may_be_ordered_twice() -> None:
    """The second time says that there was nothing to do."""
    both = orders(Stand(), Told(), refuse, refuse)

    said = [(await order()).message for order in (both.drain, both.drain, both.resume, both.resume)]

    assert [
        "admission is stopped: new requests wait.",
        "admission is already stopped: new requests wait.",
        "admission is open.",
        "admission is already open.",
    ] == said


@pytest.mark.parametrize("state", [State.draining, State.failed])
async def test_an_instance_that_ends_takes_no_orders(state: State) -> None:
    """Status 75: there is nothing left to drain or to resume."""
    both = orders(Stand(state=state), Told(), refuse, refuse)

    assert [75, 75] == [(await both.drain()).exit_status, (await both.resume()).exit_status]


async def test_drain_before_the_engine_is_up_says_from_when_it_counts() -> None:
    """The order stands, and the sentence says what it waits for."""
    stand = Stand(state=State.starting)

    reply = await orders(stand, Told(), refuse, refuse).drain()

    assert (0, True) == (reply.exit_status, stand.situation.is_drained)
    assert reply.message.endswith("as soon as the engine answers (the instance is starting).")
