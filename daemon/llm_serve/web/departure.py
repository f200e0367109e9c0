"""Ends the work for a client that has gone, whatever the model's application does at the moment.

vLLM and Starlette look for that themselves, each in tasks that are made and ended for every request. That costs time,
and turns of the event loop before the engine knows the request. One look for both is here.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from llm_serve.web.answer import Answer
from llm_serve.web.hold import Body

ASGI = {"version": "3.0", "spec_version": "2.4"}
"""From 2.4 on applications rely on the server: Starlette's streams do not look for the end of the client."""


class Departure:
    """Cancels what is inside when the client leaves before its answer is complete; `has_come` tells afterwards."""

    __slots__ = ("_answer", "_body", "_cancelled_before", "_task", "_watch", "has_come")

    def __init__(self, body: Body, answer: Answer) -> None:
        self._body, self._answer = body, answer
        self.has_come = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelled_before = task, task.cancelling()
        self._watch: asyncio.Task[None] | None = asyncio.create_task(self._wait())
        return self

    async def _wait(self) -> None:
        await self._body.until_the_end()
        # The server also says that a client has gone when its answer is complete: there may be work left after it.
        if self._watch is not None and not self._answer.is_complete:
            self.has_come = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not self.has_come:
            return False
        # vLLM's handlers may have caught it. Somebody else's cancellation goes on.
        return self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError
