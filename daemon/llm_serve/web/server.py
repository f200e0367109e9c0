"""The HTTP server: uvicorn, without its signal handlers and its own life."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from llm_serve.web.deadlines import BoundedHead, Deadlines, Timeouts

_LAST_WORDS_S = 2.0
_KEEP_ALIVE_S = 75
_TICKS_PER_LOOK = 5
_PROBES = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 15,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 120_000,  # ms; what was sent, and is neither acknowledged nor read, holds a place
}


class Server(uvicorn.Server):
    """One uvicorn server on one socket that was bound before."""

    def __init__(self, app: Any, listener: socket.socket, timeouts: Timeouts | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHead,
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the supervisor's."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Look after slow clients; uvicorn calls this ten times a second."""
        if counter % _TICKS_PER_LOOK == 0:
            self._deadlines.look(list(self.server_state.connections), time.monotonic())
        return await super().on_tick(counter)

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
        await asyncio.sleep(0.25)
        self.should_exit = True
        if self._task is not None:
            await self._task


def _notice_dead_peers(listener: socket.socket) -> None:
    """Let the kernel end connections whose peer has gone without a word; each one that is accepted inherits it."""
    if listener.family == socket.AF_UNIX:
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
