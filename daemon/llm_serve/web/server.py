"""The HTTP server: uvicorn, without its signal handlers and its own life.

Several of them, in as many processes, accept on one socket; each connection is then taken by one that has fewest, for
an event loop left alone takes all that wait as soon as it wakes up (vLLM's API servers do the same).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any, Protocol

import uvicorn

from llm_serve.host.logs import get_logger
from llm_serve.web.deadlines import BoundedHead, Deadlines, Timeouts
from llm_serve.web.places import UNLIMITED, Places

_LAST_WORDS_S = 2.0
_KEEP_ALIVE_S = 75
_TICKS_PER_LOOK = 5
_YIELDS, _YIELD_S = 5, 0.001
"""How often, and for how long, a process with more connections lets others take the next one."""
_NO_DESCRIPTOR_S = 1.0
_PROBES = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 15,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 120_000,  # ms; what was sent, and is neither acknowledged nor read, holds a place
}


class Share(Protocol):
    """What servers on the same socket let each other know."""

    def tell_connections(self, number: int, *, accepts: bool) -> None:
        """This one holds so many connections, and takes more or not."""

    def is_least_connected(self) -> bool:
        """True when no other one that accepts holds fewer."""


class Server(uvicorn.Server):
    """One uvicorn server on one socket that was bound before. With a `share`, others accept on it as well."""

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        timeouts: Timeouts | None = None,
        share: Share | None = None,
        places: Places = UNLIMITED,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Protocol", (BoundedHead,), {"places": places}),
                ws="none",  # nothing here speaks it, and what was upgraded is in nobody's books
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(_LAST_WORDS_S) + 3,
            )
        )
        self._listener = listener
        _notice_dead_peers(listener)
        self._deadlines = Deadlines(timeouts or Timeouts())
        self._task: asyncio.Task[None] | None = None
        self._share = share
        self._accepting: asyncio.Task[None] | None = None
        self._arriving: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the supervisor's."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Look after slow clients; uvicorn calls this ten times a second."""
        if counter % _TICKS_PER_LOOK == 0:
            self._deadlines.look(list(self.server_state.connections), time.monotonic())
        self._tell_connections()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept, by uvicorn's own means or in turns with others."""
        await super().startup(sockets if self._share is None else [])
        if self._share is not None:
            self._accepting = asyncio.create_task(self._accept(self._share))

    async def _accept(self, share: Share) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        while True:
            self._tell_connections()
            await _readable(listener)
            for _ in range(_YIELDS):
                if share.is_least_connected():
                    break
                await asyncio.sleep(_YIELD_S)
                self._tell_connections()
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue  # another one has it
            except OSError as error:
                get_logger().error("cannot accept a connection", error=str(error))
                await asyncio.sleep(_NO_DESCRIPTOR_S)
                continue
            connection.setblocking(False)  # noqa: FBT003 - the library's signature
            arriving = loop.create_task(self._take(connection))
            self._arriving.add(arriving)
            arriving.add_done_callback(self._arriving.discard)

    async def _take(self, connection: socket.socket) -> None:
        loop, config = asyncio.get_running_loop(), self.config
        make: Any = config.http_protocol_class

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = make(
                config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )
            return made

        try:
            await loop.connect_accepted_socket(protocol, connection)
        except OSError:
            connection.close()  # its client has gone already

    def _tell_connections(self) -> None:
        if self._share is not None:
            accepts = self._accepting is not None and not self._accepting.done()
            self._share.tell_connections(len(self.server_state.connections) + len(self._arriving), accepts=accepts)

    async def start(self) -> None:
        """Accept connections from now on."""
        self._task = asyncio.create_task(self.serve(sockets=[self._listener]))
        while not self.started and not self._task.done():  # noqa: ASYNC110 - uvicorn sets a flag, no event
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop accepting, answer what was accepted, then end.

        The pause in between is for a connection that was accepted but has not sent its request yet: closing it
        would look like a refusal to its client, while one that waits in the backlog gets our successor.
        """
        for accepting in self.servers:
            accepting.close()
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
            self._tell_connections()
        await asyncio.sleep(0.25)
        self.should_exit = True
        if self._task is not None:
            await self._task


async def _readable(listener: socket.socket) -> None:
    """Return when somebody waits to be accepted, or did a moment ago."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(listener, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(listener)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _notice_dead_peers(listener: socket.socket) -> None:
    """Let the kernel end connections whose peer has gone without a word; each one that is accepted inherits it."""
    if listener.family == socket.AF_UNIX:
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
