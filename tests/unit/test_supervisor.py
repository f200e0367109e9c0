"""The supervisor's part in reload and drain, with engines that take no time and a gate that only counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_serve import supervisor as module
from llm_serve.core.admission import IDLE
from llm_serve.core.course import Course, Effective
from llm_serve.core.events import DrainRequested, ResumeRequested
from llm_serve.core.evidence import Failure, Kind
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.machine import Situation
from llm_serve.core.plan import EnginePlan
from llm_serve.core.states import State
from llm_serve.core.telemetry import Reading
from llm_serve.engine_room import EngineRoom
from llm_serve.host import boot
from llm_serve.host.closed_network import OPEN
from llm_serve.host.systemd import Silence
from llm_serve.instance import Instance
from llm_serve.supervisor import Supervisor
from tests.patience import patient

BROKEN = Failure(Kind.weights, "HeaderTooLarge.")


def instance(text: str) -> Instance:
    """What is read of a file with these lines."""
    settings = parse_instance(f'model = "m"\n{text}', source="/etc/llm-serve/x.toml", name="x")
    return Instance(settings, EnginePlan.from_settings(settings), frozenset(), Path("/nowhere"), text)


OLD = instance("[server]\ndrain_timeout_s = 0.2\n[gpu]\npause_above_celsius = 85\n[engine]\nmax_num_seqs = 16")
NEW = instance(
    "[server]\ndrain_timeout_s = 0.2\nmax_queued = 1\n[gpu]\npause_above_celsius = 85\n[engine]\nmax_num_seqs = 8"
)


class Gate:
    """What the supervisor orders of a gate, in order. `in_flight` counts those that wait as well."""

    def __init__(self) -> None:
        self.in_flight = self.held = 0
        self.heard: list[str] = []

    def open(self, _: object, slots: int | None) -> None:
        """Written down."""
        assert slots is None, "the engine's own number counts, and this one has none"
        self.heard.append("open")

    def note(self, _: object) -> None:
        """Nothing."""

    def hold(self) -> None:
        """Written down."""
        self.heard.append("hold")

    def refuse(self, *_: object) -> None:
        """Written down; who waits is answered."""
        self.heard.append("refuse")
        self.in_flight -= self.held
        self.held = 0


class Factory:
    """Builds engines at once, but for the plans in `refused`."""

    def __init__(self) -> None:
        self.built, self.idle_s, self.origin, self.network = Effective(), 0.0, "", OPEN
        self.stalled_s = 0.0
        self.alive: list[int] = []
        self.plans: list[int] = []
        self.refused: set[int] = set()
        self.ending = self
        self.weights = SimpleNamespace(pids=())

    def prepare(self, *_: object) -> None:
        """Nothing."""

    def read_from(self, origin: Any) -> None:
        """Keep the text."""
        self.origin = origin.text

    async def build(self, plan: EnginePlan, epoch: int, _: object) -> Any:
        """An engine, if there is none."""
        assert [] == self.alive, "a second engine"
        seqs = int(str(plan.arguments["max_num_seqs"]))
        self.plans.append(seqs)
        if seqs in self.refused:
            raise RuntimeError("refused")
        self.alive.append(epoch)
        steps = SimpleNamespace(
            last_step_at=None, stalled_for_s=lambda: self.stalled_s, tell=lambda note: None, load=IDLE
        )
        args = SimpleNamespace(data_parallel_size=1)
        return SimpleNamespace(
            epoch=epoch, steps=steps, args=args, tasks=(), processes=[], is_dead=False, llm=SimpleNamespace()
        )

    async def stop(self, engine: Any) -> None:
        """The engine is gone."""
        self.alive.remove(engine.epoch)

    async def kill_rest(self) -> None:
        """Everything is gone."""
        self.alive.clear()

    def close(self) -> None:
        """Nothing."""


class Memory:
    """Remembers in memory."""

    def __init__(self) -> None:
        self.courses: list[Course] = []

    def recall(self, plan: EnginePlan) -> Course:
        """Nothing was learned."""
        return Course(plan)

    async def remember(self, course: Course) -> None:
        """Written down."""
        self.courses.append(course)

    def was_reset(self) -> bool:
        """Never."""
        return False


class Host:
    """A machine where every failed start is explained in the same way."""

    def __init__(self) -> None:
        self.memory, self.postmortem, self.telemetry = Memory(), self, self
        self.last = ()
        self.temperature = 60.0

    def readings(self) -> tuple[Reading, ...]:
        """One GPU."""
        return (Reading(0, "GPU-a", "NVIDIA L4", temperature_celsius=self.temperature),)

    def close(self) -> None:
        """Nothing."""

    def serving(self, _: Instance) -> Host:
        """The same."""
        return self

    def begin(self) -> None:
        """Nothing."""

    async def wait_for_memory(self) -> None:
        """It is back at once."""

    async def of_start(self, _: BaseException) -> Failure:
        """Always this."""
        return BROKEN

    async def of_death(self, engine: Any) -> Failure:
        """The dead engine is removed."""
        engine.factory.alive.remove(engine.epoch)
        return Failure(Kind.killed, "EngineCore was ended by SIGKILL.")


class Rig:
    """A supervisor that runs, and everything around it."""

    def __init__(self) -> None:
        self.gate, self.factory, self.host = Gate(), Factory(), Host()
        collector = SimpleNamespace(phase=None)
        self.supervisor = Supervisor(OLD, Silence(), cast("Any", self.factory), cast("Any", collector))
        self.supervisor.gate = cast("Any", self.gate)
        self.adopted: list[Instance] = []
        self.supervisor.on_change = self.adopted.append

    async def until(self, is_so: Callable[[Situation], bool]) -> Situation:
        """The situation, when it is so."""
        async with asyncio.timeout(5):
            return await self.supervisor.until(is_so)

    async def in_state(self, state: State) -> Situation:
        """The situation, when this is its state."""
        return await self.until(lambda now: now.state is state)


RigMaker = Callable[[], Any]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> RigMaker:
    """A maker of rigs: a context, at whose beginning the first engine serves."""

    async def bind(self: EngineRoom, engine: Any, _instance: Instance) -> None:
        engine.factory = self._factory
        self.survivor = SimpleNamespace(unbind=lambda: None, end=lambda why: None, explain=lambda **_: None)

    @asynccontextmanager
    async def make() -> AsyncIterator[Rig]:
        built = Rig()

        async def ready_host(*_: object) -> Any:
            return built.host

        monkeypatch.setattr(module, "ready_host", ready_host)
        monkeypatch.setattr(boot, "check_host", lambda *_: None)
        monkeypatch.setattr(EngineRoom, "_bind", bind)
        running = asyncio.create_task(built.supervisor.run([]))
        await built.in_state(State.serving)
        yield built
        built.supervisor.request_stop()
        built.supervisor.request_stop()
        async with asyncio.timeout(5):
            assert 0 == await running
        assert [] == built.factory.alive

    return make


async def test_how_long_the_engine_has_stood_still_is_told(rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the watch judges it, so that an alarm comes before the remedy; the next engine begins anew."""
    monkeypatch.setattr(module, "_WATCH_EVERY_S", 0.01)
    async with rig() as here:
        here.factory.stalled_s = 3.0
        await asyncio.sleep(0.1)
        assert 3.0 == here.supervisor.snapshot().engine_stalled_s

        here.factory.stalled_s = 0.0
        await here.supervisor.offer(NEW, needs_engine=True)
        await here.until(lambda now: now.epoch == 2 and now.state is State.serving)
        assert 0.0 == here.supervisor.snapshot().engine_stalled_s


async def test_another_engine_is_built_when_the_last_has_finished(rig: RigMaker) -> None:
    """The gate closes, what is in flight ends, the old engine goes, the new one comes, the gate opens."""
    async with rig() as here:
        here.gate.in_flight = 1
        now = await here.supervisor.offer(NEW, needs_engine=True)
        await asyncio.sleep(0.05)
        assert (State.reloading, [1]) == (now.state, here.factory.alive)
        here.gate.in_flight = 0

        now = await here.in_state(State.serving)

        assert (2, [2], [16, 8]) == (now.epoch, here.factory.alive, here.factory.plans)
        assert ["open", "hold", "open"] == here.gate.heard
        assert ([NEW], NEW.text) == (here.adopted, here.factory.origin)
        assert 8 == here.supervisor.snapshot().engine_arguments["arguments"]["max_num_seqs"]


async def test_requests_that_wait_keep_no_engine_from_going(rig: RigMaker) -> None:
    """Only what an engine works on is waited for, and that not for longer than the drain time."""
    async with rig() as here:
        here.gate.in_flight, here.gate.held = 3, 3
        await here.supervisor.offer(NEW, needs_engine=True)
        await here.in_state(State.serving)
        here.gate.in_flight = 4
        began = asyncio.get_running_loop().time()
        await here.supervisor.offer(replace(OLD), needs_engine=True)
        await here.in_state(State.serving)

        assert 0.2 < asyncio.get_running_loop().time() - began < patient(2)
        assert [16, 8, 16] == here.factory.plans
        here.gate.in_flight = here.gate.held = 0


async def test_a_plan_that_does_not_start_brings_back_all_that_was_before(rig: RigMaker) -> None:
    """File, limits, plan and memory are the old ones again, and the reason is kept."""
    async with rig() as here:
        here.factory.refused.add(8)
        await here.supervisor.offer(NEW, needs_engine=True)

        now = await here.in_state(State.serving)

        assert ([16, 8, 16], [3]) == (here.factory.plans, here.factory.alive)
        assert ([NEW, OLD], OLD, OLD.text) == (here.adopted, here.supervisor.instance, here.factory.origin)
        assert str(BROKEN) == now.fell_back
        assert OLD.plan == here.host.memory.courses[-1].asked


async def test_numbers_alone_need_no_engine(rig: RigMaker) -> None:
    """The same engine serves on, with the gate open all the time."""
    async with rig() as here:
        limits = replace(NEW, plan=OLD.plan)

        now = await here.supervisor.offer(limits, needs_engine=False)

        assert (State.serving, [1], ["open"]) == (now.state, here.factory.alive, here.gate.heard)
        assert limits is here.supervisor.instance


async def test_an_engine_that_dies_before_it_has_made_room_is_buried_first(rig: RigMaker) -> None:
    """Its death ends the wait, and the new engine is built once, when nothing of the old one is left."""
    async with rig() as here:
        here.gate.in_flight = 1
        await here.supervisor.offer(NEW, needs_engine=True)
        here.supervisor._room.found_dead(1)

        now = await here.in_state(State.serving)

        assert (2, [16, 8], [2]) == (now.epoch, here.factory.plans, here.factory.alive)
        here.gate.in_flight = 0


async def test_admission_can_be_stopped_and_resumed(rig: RigMaker) -> None:
    """The engine stays; a snapshot says what is going on."""
    async with rig() as here:
        drained = await here.supervisor.tell(DrainRequested())
        seen = here.supervisor.snapshot()
        resumed = await here.supervisor.tell(ResumeRequested())
        await asyncio.sleep(0)

        assert (State.drained, State.serving) == (drained.state, resumed.state)
        assert ("drained", True) == (seen.state, seen.is_drained)
        assert (["open", "hold", "open"], [1]) == (here.gate.heard, here.factory.alive)


async def test_heat_pauses_admission(rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a GPU is too hot requests wait, the engine stays, and `status` says why."""
    monkeypatch.setattr(module, "_WATCH_EVERY_S", 0.01)
    async with rig() as here:
        here.host.temperature = 91.0
        paused = await here.in_state(State.drained)
        seen = here.supervisor.snapshot()
        here.host.temperature = 80.0
        await here.in_state(State.serving)
        await asyncio.sleep(0)

        assert paused.why == seen.too_hot
        assert "GPU 0 has 91 °C" in seen.too_hot
        assert not seen.is_drained
        assert 91.0 == seen.gpus[0].temperature_celsius
        assert (["open", "hold", "open"], [1]) == (here.gate.heard, here.factory.alive)


STOPS: dict[str, Callable[[Rig], Awaitable[object]]] = {
    "drained": lambda here: here.supervisor.tell(DrainRequested()),
    "reloading": lambda here: here.supervisor.offer(NEW, needs_engine=True),
}


@pytest.mark.parametrize("begin", STOPS.values(), ids=STOPS)
async def test_a_stop_lets_requests_in_flight_finish(rig: RigMaker, begin: Callable[[Rig], Awaitable[object]]) -> None:
    """In the middle of a drain or a reload as at any other time: no new engine, and the old one until the end."""
    async with rig() as here:
        here.gate.in_flight = 1
        await begin(here)
        here.supervisor.request_stop()
        await here.in_state(State.draining)
        await asyncio.sleep(0.1)
        assert [1] == here.factory.alive
        here.gate.in_flight = 0

        await here.in_state(State.stopped)

        assert ([16], []) == (here.factory.plans, here.factory.alive)
