"""The HTTP server: uvicorn, without its signal handlers and its own life."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

_LAST_WORDS_S = 2.0
_KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """One uvicorn server on one socket that was bound before."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(_LAST_WORDS_S) + 3,
            )
        )
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the supervisor's."""
        yield

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
