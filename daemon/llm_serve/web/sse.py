"""Event streams: comments that keep a waiting one alive, and answers that come after one has begun."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, Protocol

STREAMED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Routes that answer `"stream": true` with an event stream."""

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects the stream would keep back what keeps it alive
]
_TICKS = 4


def is_event_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """True for the headers of an answer that is an event stream."""
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def comment(waited_s: float) -> bytes:
    """What a client skips and a proxy counts as life."""
    return b": waiting for the engine, %d s\n\n" % waited_s


def late_answer(path: str, status: int, body: bytes) -> bytes:
    """An answer that is no stream, as the last event of one that has begun, in the words of the route's clients."""
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if status < HTTPStatus.BAD_REQUEST:
        return b"data: %s\n\ndata: [DONE]\n\n" % (b" ".join(body.splitlines()))
    error = _error(content, status)
    if path == "/v1/messages":
        told: dict[str, Any] = {
            "type": "error",
            "error": {"type": error.get("type", "api_error"), "message": error["message"]},
        }
        return b"event: error\ndata: %s\n\n" % _dump(told)
    if path == "/v1/responses":
        told = error | {"type": "error", "sequence_number": 0, "error": error}
        return b"event: error\ndata: %s\n\n" % _dump(told)
    return b"data: %s\n\ndata: [DONE]\n\n" % _dump({"error": error})


def _error(content: Any, status: int) -> dict[str, Any]:
    """The error object of an answer, and one with the status's name where it has none."""
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error
    return {"message": HTTPStatus(status).phrase, "type": "server_error", "param": None, "code": status}


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


class Stream(Protocol):
    """A stream that may have to be kept alive."""

    def is_quiet(self, since: float) -> bool:
        """True when the client has heard nothing since then (monotonic time) and may be sent a comment."""

    def keep_alive(self, now: float) -> Coroutine[Any, Any, None]:
        """Send a comment."""


class Ticker:
    """Keeps streams alive that have been quiet for `interval_s`, up to a quarter more; 0: never.

    One task for all of them, and none while there are none.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._streams: set[Stream] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    def add(self, stream: Stream) -> None:
        """Keep this one alive from now on."""
        if self._interval_s:
            self._streams.add(stream)
            if self._ticking is None:
                self._ticking = asyncio.create_task(self._tick())

    def discard(self, stream: Stream) -> None:
        """Leave this one alone."""
        self._streams.discard(stream)

    async def _tick(self) -> None:
        while self._streams:
            await asyncio.sleep(self._interval_s / _TICKS)
            now = time.monotonic()
            for stream in [each for each in self._streams if each.is_quiet(now - self._interval_s)]:
                # Not awaited here: one client that does not read must not silence the others.
                sending = asyncio.create_task(stream.keep_alive(now))
                self._sending.add(sending)
                sending.add_done_callback(self._sending.discard)
                await asyncio.sleep(0)  # a body that has to be looked at takes milliseconds; a crowd's, one by one
        self._ticking = None
