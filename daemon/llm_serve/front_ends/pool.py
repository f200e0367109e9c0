"""The front ends beside the daemon's own: started, told what the supervisor decides, and replaced when they die.

To the supervisor they are one gate with the daemon's own. A front end that comes later, or again, is told what holds:
the last order of each kind is kept for that. While one has not heard the last order to its gate, it counts as busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_serve import metrics
from llm_serve.core import tally
from llm_serve.core.admission import IDLE, Load
from llm_serve.core.company import Company
from llm_serve.core.restarts import backoff_s
from llm_serve.core.status import FrontEndStatus, Snapshot
from llm_serve.engine import forkserver
from llm_serve.front_ends import messages, spawn
from llm_serve.front_ends.birth import Birth
from llm_serve.front_ends.messages import Order, Pipe
from llm_serve.front_ends.totals import Totals
from llm_serve.front_ends.turns import Turns
from llm_serve.host import processes
from llm_serve.host.board import Board, Row, Seat
from llm_serve.host.logs import get_logger
from llm_serve.web.asgi import Asgi
from llm_serve.web.gate import Gate

if TYPE_CHECKING:
    from llm_serve.engine.attach import Party
    from llm_serve.engine.steps import StepWatch
    from llm_serve.instance import Instance

_LOOK_EVERY_S, _STANDS_STILL_S = 0.5, 30.0
_COUNT_EVERY_S, _COUNTED_WITHIN_S = 5.0, 1.0
_LAST_WORDS_S, _GONE_S = 8.0, 2.0
_LIVED_WELL_S = 60.0
"""Who has lived so long is replaced at once."""


class _Child:
    """One front end: its process, and the pipe to it."""

    def __init__(self, place: int, pid: int, pipe: Pipe) -> None:
        self.place, self.pid, self.pipe = place, pid, pipe
        self.began = time.monotonic()
        self.sent = 0
        self.is_counted = asyncio.Event()

    def send(self, order: Order) -> None:
        self.sent += isinstance(order, messages.TO_THE_GATE)
        self.pipe.send(order)


class FrontEnds:
    """All front ends of one instance as one: a gate, and the engine room's crew.

    `beginning` makes what the one in a place begins with. `spared` holds their pids; `found_dead(epoch)` is called when
    one has met a dead engine; `abort(place)` has the engine of the moment give up what the one there has given it.
    """

    def __init__(
        self, gate: Gate, seat: Seat, listener: socket.socket, beginning: Callable[[int], Birth], party: Party
    ) -> None:
        self._gate, self._seat, self._listener, self._beginning = gate, seat, listener, beginning
        self.company: Company = seat
        self.party = party
        self.spared: set[int] = set()
        self._board: Board = seat.board
        self._turns = Turns(seat, gate)
        tally.HERE.move_to(seat.row.tally)
        self._children: dict[int, _Child] = {}
        self._held: dict[str, Order] = {}
        self._bans: dict[str, float] = {}
        self._lost_epoch = 0
        self._bound_at = 0.0
        self._forking = asyncio.Lock()  # while the fork server loads, each would keep a thread waiting
        self.totals = Totals(metrics.continuous, self._newest)
        self.found_dead: Callable[[int], None] = lambda _: None
        self.abort: Callable[[int], Awaitable[None]] = _nothing

    # As a gate: what the supervisor orders and asks.
    def open(self, model: Asgi, slots: int | None = None) -> None:
        """Let requests through, everywhere."""
        self._gate.open(model, slots)
        self._order(messages.Open(slots), instead_of="Gate")

    def hold(self) -> None:
        """Make requests wait, everywhere."""
        self._gate.hold()
        self._order(messages.Hold(), instead_of="Gate")

    def refuse(self, message: str, retry_after_s: int) -> None:
        """Answer 503, everywhere."""
        self._gate.refuse(message, retry_after_s)
        self._order(messages.Refuse(message, retry_after_s), instead_of="Gate")

    def note(self, load: Load) -> None:
        """The engine has told the first process of its work."""
        self._turns.note(load)

    @property
    def held(self) -> int:
        """How many requests wait, everywhere."""
        return self._gate.held + sum(int(row.waiting) for row in self._rows())

    @property
    def in_flight(self) -> int:
        """How many requests there are, everywhere."""
        return self._gate.in_flight + sum(map(_in_flight, self._rows())) + self._deaf

    @property
    def load(self) -> Load:
        """The engine's work, as any of them was told last."""
        at, load = self._board.newest_load()
        return load if at > self._bound_at else IDLE

    @property
    def tallies(self) -> tuple[Sequence[float], ...]:
        """What the clients of each have got so far."""
        return tuple(row.tally for row in self._board.rows)

    @property
    def _deaf(self) -> int:
        """How many have not heard the last order yet, and may be doing what it forbids."""
        return sum(self._board.rows[child.place].heard < child.sent for child in self._children.values())

    def _rows(self) -> tuple[Row, ...]:
        return self._board.rows[1:]

    # As the engine room's crew.
    def attach(self, epoch: int, offer: bytes) -> None:
        """An engine is being started, for all."""
        self._held.pop("Bind", None)
        self._order(messages.Attach(epoch, offer), instead_of="Attach")

    def bind(self, epoch: int, tasks: tuple[str, ...], steps: StepWatch) -> None:
        """See Crew."""
        steps.share(lambda: sum(int(row.unfinished) for row in self._rows() if row.turns))
        self._turns.steps, self._bound_at = steps, time.monotonic()
        self._seat.row.epoch = epoch
        self._order(messages.Bind(epoch, tasks, self.party.ready), instead_of="Bind")

    def unbind(self, epoch: int) -> None:
        """See Crew."""
        self._turns.steps, self._seat.row.epoch = None, 0
        self._lost_epoch = epoch
        self._held.pop("Attach", None)
        self._held.pop("Bind", None)
        self._order(messages.Unbind(epoch))

    def judge(self, own: int, *, may_be_a_request: bool) -> int:
        """See Crew. Who has not said yet what it has lost may have lost anything: then nobody was alone."""
        rows = [self._board.rows[place] for place in self._children]
        silent = sum(row.lost_epoch != self._lost_epoch for row in rows)
        everywhere = own + sum(int(row.lost) for row in rows if row.lost_epoch == self._lost_epoch) + 2 * silent
        self._order(messages.Judge(may_be_a_request, everywhere))
        return everywhere

    def cut(self, why: str) -> None:
        """See Crew."""
        self._order(messages.Cut(why), instead_of="Cut")

    def ban(self, fingerprint: str, seconds: float) -> None:
        """The first process has found a request that kills engines."""
        self._ban(None, messages.Banned(fingerprint, seconds))

    # What they are told beside that.
    def reconfigure(self, instance: Instance) -> None:
        """The file was read again."""
        self._order(messages.Reconfigure(instance.settings, instance.keys), instead_of="Reconfigure")

    def tell(self, now: Snapshot) -> None:
        """What the instance is now; of it they need what they answer /readyz with."""
        brief = replace(now, failures=(), gpus=(), asked={}, engine_arguments={}, front_ends=())
        self._order(messages.Tell(brief), instead_of="Tell")

    def status(self) -> tuple[FrontEndStatus, ...]:
        """Each front end, the first process's own included."""
        pids = {0: os.getpid()} | {child.place: child.pid for child in self._children.values()}
        return tuple(_status(self._board.rows[place], pid) for place, pid in sorted(pids.items()))

    async def metrics(self) -> bytes:
        """Everything that is counted, by all of them. Who does not answer in time counts as it did last."""
        await self._count()
        return metrics.render(self.totals)

    # Their lives.
    async def run(self, survivor: Callable[[], Any], env: Callable[[], Mapping[str, str]]) -> None:
        """Keep all places filled. `survivor` is the first process's, `env` what is in the others' environment."""
        places = range(1, len(self._board.rows))
        keeping = [asyncio.create_task(self._keep(place, env)) for place in places]
        others = [asyncio.create_task(work) for work in (self._turns.run(), self._watch(survivor), self._count_often())]
        try:
            await asyncio.gather(*keeping, *others)
        finally:
            for task in (*keeping, *others):
                task.cancel()

    async def _keep(self, place: int, env: Callable[[], Mapping[str, str]]) -> None:
        """Start a front end, listen to it until its end, and start the next one."""
        deaths_in_a_row = 0
        while True:
            child = await self._start(place, env)
            await self._listen(child)
            await self._bury(child)
            lived_s = time.monotonic() - child.began
            deaths_in_a_row = 0 if lived_s > _LIVED_WELL_S else deaths_in_a_row + 1
            get_logger().error(
                "a front end has ended, and is replaced", front_end=place, pid=child.pid, lived_s=round(lived_s, 1)
            )
            await asyncio.sleep(backoff_s(deaths_in_a_row) if deaths_in_a_row > 1 else 0.0)

    async def _listen(self, child: _Child) -> None:
        while (fact := await child.pipe.receive()) is not None:
            self._hear(child, fact)

    async def _start(self, place: int, env: Callable[[], Mapping[str, str]]) -> _Child:
        pid = None
        while pid is None:
            ours, theirs = socket.socketpair()
            try:
                pid = await self._fork(place, theirs, env)
            except (OSError, EOFError) as error:  # the fork server has ended meanwhile
                get_logger().warning("a front end could not be started", front_end=place, error=repr(error))
                ours.close()
                await asyncio.sleep(_LOOK_EVERY_S)
        child = _Child(place, pid, await Pipe.over(ours))
        self._children[place] = child
        for order in self._what_holds():
            child.send(order)
        return child

    async def _fork(self, place: int, theirs: socket.socket, env: Callable[[], Mapping[str, str]]) -> int:
        with theirs:
            while not forkserver.is_running():  # noqa: ASYNC110 - another one is started with the next engine
                await asyncio.sleep(_LOOK_EVERY_S)
            arguments = (self._beginning(place), self._listener, theirs, forkserver.Handed(self._board.descriptor))
            async with self._forking:
                process = await asyncio.to_thread(forkserver.start_process, spawn.live, arguments, env())
        self.spared.add(process.pid)
        return int(process.pid)

    def _what_holds(self) -> list[Order]:
        """The orders that bring a new front end to where the others are."""
        now = time.monotonic()
        self._bans = {fingerprint: until for fingerprint, until in self._bans.items() if until > now}
        bans = [messages.Ban(fingerprint, until - now) for fingerprint, until in self._bans.items()]
        kinds = ("Reconfigure", "Tell", "Attach", "Bind", "Gate", "Cut")
        return [*bans, *(self._held[kind] for kind in kinds if kind in self._held)]

    async def _bury(self, child: _Child) -> None:
        """What the dead one has left: requests in the engine, a row, counts that stay."""
        child.pipe.close()
        await _end_process(child.pid)
        del self._children[child.place]
        self._board.rows[child.place].clear()
        self.totals.ended(child.place)
        self.spared.discard(child.pid)
        await self.abort(child.place)

    def _hear(self, child: _Child, fact: messages.Message) -> None:
        match fact:
            case messages.Attached(epoch, after_s):
                get_logger().info("a front end is attached", front_end=child.place, epoch=epoch, after_s=after_s)
            case messages.FoundDead(epoch):
                self.found_dead(epoch)
            case messages.Banned():
                self._ban(child, fact)
            case messages.Counted(families):
                self.totals.report(child.place, families)
                child.is_counted.set()
            case messages.Logged(level, event, values):
                log = getattr(get_logger(), level, get_logger().info)
                log(event, **{**values, "front_end": child.place})

    def _ban(self, child: _Child | None, fact: messages.Banned) -> None:
        self._bans[fact.fingerprint] = time.monotonic() + fact.seconds
        if child is not None and self._turns.survivor is not None:
            self._turns.survivor.ban(fact.fingerprint, fact.seconds)
        for each in self._children.values():
            if each is not child:
                each.send(messages.Ban(fact.fingerprint, fact.seconds))

    async def _watch(self, survivor: Callable[[], Any]) -> None:
        """Pass the engine's steps on to the first process, and end front ends that stand still."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._turns.survivor = survivor()
            if (steps := self._turns.steps) is not None and (at := max(row.stepped_at for row in self._rows())):
                steps.heard_of_step(at)
            for child in self._children.values():
                if (turned_at := self._board.rows[child.place].turned_at) and (
                    time.monotonic() - turned_at > _STANDS_STILL_S
                ):
                    get_logger().error("a front end stands still, and is ended", front_end=child.place, pid=child.pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)

    async def _count_often(self) -> None:
        """What a front end has counted since its last report is lost with it."""
        while True:
            await asyncio.sleep(_COUNT_EVERY_S)
            await self._count()

    async def _count(self) -> None:
        children = list(self._children.values())
        for child in children:
            child.is_counted.clear()
            child.send(messages.Count())
        waits = [asyncio.create_task(child.is_counted.wait()) for child in children]
        if waits:
            _, late = await asyncio.wait(waits, timeout=_COUNTED_WITHIN_S)
            for wait in late:
                wait.cancel()

    def _newest(self) -> int:
        return max(self._board.rows, key=lambda row: row.loaded_at).place

    def _order(self, order: Order, *, instead_of: str = "") -> None:
        """Send it to all; `instead_of` which kept order it holds for those that come later."""
        if instead_of:
            self._held[instead_of] = order
        for child in self._children.values():
            child.send(order)

    async def end(self) -> None:
        """Have them finish, and end those that do not."""
        await asyncio.gather(*map(self._end, self._children.values()))

    async def _end(self, child: _Child) -> None:
        child.send(messages.End())
        try:
            await asyncio.wait_for(self._listen(child), _LAST_WORDS_S)
        except TimeoutError:
            get_logger().warning("a front end does not end by itself", front_end=child.place, pid=child.pid)
        await _end_process(child.pid)


async def _nothing(_: int) -> None:
    """Where there is no engine, nothing is to be given up."""


async def _end_process(pid: int) -> None:
    """End a process that has closed its pipe, or should have, and return when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_S
    while processes.is_there(pid) and time.monotonic() < deadline:  # noqa: ASYNC110 - it is another one's child
        await asyncio.sleep(0.02)


def _status(row: Row, pid: int) -> FrontEndStatus:
    held, in_flight, connections = int(row.waiting), _in_flight(row), int(row.connections)
    return FrontEndStatus(row.place, pid, int(row.epoch), held, in_flight, connections, processes.resident_bytes(pid))


def _in_flight(row: Row) -> int:
    """The first number is as of the last turn, the others as of now."""
    return max(int(row.in_flight), int(row.inside + row.waiting))
