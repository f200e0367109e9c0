"""A front end beside the daemon's own: a process that serves HTTP, given to an engine that the daemon has started.

It decides nothing about engines. Orders come in over a pipe, one after the other; facts go out over it and onto the
board. Its end is nobody's but its own clients': whoever has lost its connections connects again, to another one. It
ends itself when the daemon is gone, whatever its loop is doing then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import structlog
from starlette.responses import Response

from llm_serve import door
from llm_serve.core import tally
from llm_serve.engine import attach, ending, forkserver, openai
from llm_serve.engine.survivor import Survivor
from llm_serve.front_ends import messages, totals
from llm_serve.front_ends.birth import Birth
from llm_serve.front_ends.messages import Pipe
from llm_serve.front_ends.turns import Turns
from llm_serve.host import interpreter, logs
from llm_serve.host.board import Board, Seat
from llm_serve.host.logs import get_logger
from llm_serve.metrics import continuous
from llm_serve.web import operations
from llm_serve.web.errors import error_response
from llm_serve.web.server import Server

_ANSWER_TIMEOUT_S = 5.0
_FAILED = 70


def main(birth: Birth, listener: socket.socket, connection: socket.socket, board: int) -> None:
    """The whole life of a front end, in a fork of the fork server."""
    forkserver.outlive_the_server(f"front-end-{birth.place}")
    _end_with(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener.setblocking(False)  # noqa: FBT003 - the library's signature
    seat = Seat(Board(birth.places, board), birth.place)
    with asyncio.Runner(loop_factory=door.loop_factory()) as runner:
        status = runner.run(_serve(birth, listener, connection, seat))
        os._exit(status)  # a thread inside vLLM may never return


def _end_with(connection: socket.socket) -> None:
    """End this process at once when nobody has the other end any more, also while the loop stands still."""
    watched = select.poll()
    watched.register(connection.fileno(), 0)  # for nothing but the end

    def wait() -> None:
        watched.poll()
        os._exit(_FAILED)

    threading.Thread(target=wait, name="end-with-daemon", daemon=True).start()


async def _serve(birth: Birth, listener: socket.socket, connection: socket.socket, seat: Seat) -> int:
    pipe = await Pipe.over(connection)
    loop = asyncio.get_running_loop()
    _log(birth, lambda event: loop.call_soon_threadsafe(_send_log, pipe, event))
    front_end = FrontEnd(birth, pipe, seat)
    entrance = door.entrance(front_end.gate, birth.settings)
    asked = birth.settings.server
    server = Server(entrance, listener, door.timeouts(asked), share=seat, places=door.places(asked))

    async def accept() -> None:
        """Not before there is an engine: one that has no connection yet would be given all that come."""
        await front_end.has_engine.wait()
        await server.start()

    accepting = asyncio.create_task(accept())
    try:
        return await front_end.run()
    finally:
        if not accepting.cancel():
            await server.stop()


def _log(birth: Birth, send: Callable[[MutableMapping[str, Any]], object]) -> None:
    """Log to where the first process does, with this front end's place."""
    settings = birth.settings
    if birth.is_to_journal:
        logs.set_up(settings.name, level=settings.log.level, output_format="journal")
    else:
        logs.send_to(send, level=settings.log.level)
    structlog.contextvars.bind_contextvars(front_end=birth.place)


def _send_log(pipe: Pipe, event: MutableMapping[str, Any]) -> None:
    values = {name: value if isinstance(value, str | int | float) else repr(value) for name, value in event.items()}
    level, sentence = str(values.pop("level", "info")), str(values.pop("event", ""))
    pipe.send(messages.Logged(level, sentence, values))


class FrontEnd:
    """Carries out orders, one after the other; what takes long goes on beside them."""

    def __init__(self, birth: Birth, pipe: Pipe, seat: Seat) -> None:
        self._birth, self._pipe, self._seat, self._now = birth, pipe, seat, birth.now
        inside = operations.create(lambda: self._now, door.model_names(birth.settings), _FirstProcess(birth.control))
        self.gate = door.make_gate(birth.settings, birth.keys, inside, seat)
        self._turns = Turns(seat, self.gate)
        tally.HERE.move_to(seat.row.tally)
        self._survivor = Survivor(lambda epoch: pipe.send(messages.FoundDead(epoch)), seat)
        self._survivor.on_ban = lambda fingerprint, seconds: pipe.send(messages.Banned(fingerprint, seconds))
        self._turns.survivor = self._survivor
        self._app: Any = None
        self._epoch = 0
        self._is_bound = False
        self.has_engine = asyncio.Event()
        """Set with the first engine, for good."""
        self._opens: messages.Open | None = None
        self._attaching: asyncio.Task[attach.Client] | None = None
        self._client: attach.Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until told to end. Returns the exit status."""
        self._spawn(self._turns.run())
        orders = asyncio.create_task(self._take_orders())
        await asyncio.wait({orders, self._failed}, return_when=asyncio.FIRST_COMPLETED)
        return self._failed.result() if self._failed.done() else orders.result()

    async def _take_orders(self) -> int:
        while (order := await self._pipe.receive()) is not None:
            if isinstance(order, messages.End):
                return 0
            self._carry_out(order)
            self._seat.row.heard += isinstance(order, messages.TO_THE_GATE)
        return _FAILED

    def _carry_out(self, order: messages.Message) -> None:  # noqa: C901 - a table, one row an order
        match order:
            case messages.Attach(epoch, offer):
                self._detach()
                self._epoch = epoch
                self._attaching = asyncio.create_task(self._attach(offer))
            case messages.Bind():
                self._spawn(self._bind(order))
            case messages.Unbind(epoch):
                self._unbind(epoch)
            case messages.Judge(may_be_a_request, everywhere):
                self._survivor.explain(may_be_a_request=may_be_a_request, everywhere=everywhere)
            case messages.Open():
                self._opens = order
                self._open()
            case messages.Hold():
                self._opens = None
                self.gate.hold()
            case messages.Refuse(message, retry_after_s):
                self.gate.refuse(message, retry_after_s)
            case messages.Cut(why):
                self._survivor.end(why)
            case messages.Ban(fingerprint, seconds):
                self._survivor.ban(fingerprint, seconds)
            case messages.Reconfigure(settings, keys):
                door.reconfigure(self.gate, settings, keys)
            case messages.Tell(now):
                self._now = now
            case messages.Count():
                self._pipe.send(messages.Counted(totals.of_this_process(continuous)))

    # The engine of the moment.
    async def _attach(self, offer: bytes) -> attach.Client:
        """A client that has met its engine, once that has come up so far."""
        ending.free_dead_engines()
        with interpreter.loop_first(is_kept=False):
            client = await asyncio.to_thread(attach.build, offer, self._birth.place, self._birth.places)
        try:
            await attach.meet(client)
        except BaseException:
            attach.detach(client)
            raise
        return client

    async def _bind(self, order: messages.Bind) -> None:
        began, attaching = time.monotonic(), self._attaching
        if order.epoch != self._epoch or attaching is None:
            return
        with contextlib.suppress(asyncio.CancelledError):  # the engine has gone meanwhile
            client = await attaching
            if order.epoch == self._epoch:
                await self._put_behind_handlers(client, order)
                self._pipe.send(messages.Attached(order.epoch, round(time.monotonic() - began, 3)))

    async def _put_behind_handlers(self, client: attach.Client, order: messages.Bind) -> None:
        """As the engine room does it for the first process."""
        attach.hear(client, order.ready)
        self._client = client
        self._survivor.attach(client.llm)
        with interpreter.loop_first(is_kept=False):
            if self._app is None:
                routes = door.routes(self._birth.settings)
                self._app = await asyncio.to_thread(
                    openai.build_app, client.args, order.tasks, client.llm.model_config, routes
                )
            await openai.bind(self._app, self._survivor, client.args, order.tasks)
        continuous.observe()
        if order.epoch != self._epoch:
            return
        self._survivor.bind(client.llm, order.epoch)
        self._turns.steps, self._is_bound, self._seat.row.epoch = client.steps, True, order.epoch
        client.steps.tell(self._turns.note)
        self._open()
        self.has_engine.set()

    def _open(self) -> None:
        if self._opens is not None and self._is_bound:
            self.gate.open(self._app, self._opens.slots)

    def _unbind(self, epoch: int) -> None:
        row = self._seat.row
        row.lost = self._survivor.unbind() if epoch == self._epoch else 0
        row.lost_epoch = epoch
        if epoch != self._epoch:
            return
        self.gate.hold()
        self._detach()

    def _detach(self) -> None:
        """Let go of the last engine, wherever this front end is with it."""
        self._epoch, self._is_bound, self._turns.steps, self._seat.row.epoch = 0, False, None, 0
        attaching, client, self._attaching, self._client = self._attaching, self._client, None, None
        if client is not None:
            continuous.engine_ended()
            attach.detach(client)
        elif attaching is not None and attaching.done() and not attaching.cancelled() and not attaching.exception():
            attach.detach(attaching.result())
        elif attaching is not None:
            attaching.cancel()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """What goes wrong here ends this front end: the next one begins anew."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            get_logger().error("a front end has met an error of its own, and ends", exc_info=error)
            self._failed.set_result(_FAILED)


class _FirstProcess:
    """Asks the daemon's own process for what only that one knows."""

    def __init__(self, control: Path) -> None:
        self._control = control

    async def status(self, since: int | None) -> Response:
        """Everything that the supervisor knows."""
        return await self._ask("/status" if since is None else f"/status?since={since}")

    async def metrics(self) -> Response:
        """Everything that is counted."""
        return await self._ask("/metrics")

    async def _ask(self, path: str) -> Response:
        """Its answer; 503 when it has none in time."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(_ANSWER_TIMEOUT_S)
        try:
            connector = aiohttp.UnixConnector(str(self._control))
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get(f"http://localhost{path}") as answer,
            ):
                return Response(await answer.read(), answer.status, {"content-type": answer.headers["content-type"]})
        except (aiohttp.ClientError, TimeoutError, OSError):
            message = f"the instance's first process did not answer within {_ANSWER_TIMEOUT_S:g} s."
            return error_response(503, message, code="busy", headers={"retry-after": "5"})
