"""The way back to the client: one answer, whoever gives it, and whenever it has begun."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_serve.web import sse
from llm_serve.web.asgi import Asgi, Message, Receive, Scope, Send

_ENDS_OF_EVENT = (b"\n\n", b"\r\n\r\n", b"\r\r")


class Answer:
    """What an application calls as `send`: puts the request's id on the answer and remembers how far it came.

    An event stream is kept alive while it is quiet. While a request is held, `wants_stream` says whether its client
    has asked for one; then the stream begins here, and whatever the application answers later is put into it.
    """

    __slots__ = (
        "_collected", "_is_between_events", "_is_closed", "_is_early", "_is_speaking", "_is_stream", "_late_status",
        "_path", "_quiet_since", "_send", "_spoke_at", "_ticker", "has_place", "is_complete", "is_refused",
        "request_id", "status", "wants_stream",
    )  # fmt: skip

    def __init__(self, send: Send, request_id: bytes, path: str, ticker: sse.Ticker) -> None:
        self._send, self.request_id, self._path, self._ticker = send, request_id, path, ticker
        self.status: int | None = None
        self.is_complete = self.is_refused = self.has_place = False
        self.wants_stream: Callable[[], bool] | None = None
        self._is_stream = self._is_early = self._is_speaking = self._is_closed = False
        self._is_between_events = True
        self._collected: bytearray | None = None
        self._late_status = 0
        self._quiet_since = self._spoke_at = 0.0

    async def __call__(self, message: Message) -> None:
        """Pass on one message of the application."""
        if self._is_closed:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._collected is not None:
            await self._collect(self._collected, message)
        else:
            self.is_complete = not message.get("more_body")
            if self._is_stream and (body := message.get("body")):
                self._quiet_since = self._spoke_at = time.monotonic()
                self._is_between_events = body.endswith(_ENDS_OF_EVENT)
            await self._send(message)

    async def _start(self, message: Message) -> None:
        headers = message.get("headers", ())
        is_stream = sse.is_event_stream(headers)
        if self._is_early:
            if not is_stream:
                self._late_status, self._collected = message["status"], bytearray()
            return
        self.status, self._is_stream = message["status"], is_stream
        rest = [pair for pair in headers if pair[0].lower() != b"x-request-id"]
        message["headers"] = [*rest, (b"x-request-id", self.request_id)]
        if is_stream:
            self.watch_silence()
        await self._send(message)

    async def _collect(self, collected: bytearray, message: Message) -> None:
        """Put an answer that is no stream into the stream that has begun, as its last event."""
        collected += message.get("body", b"")
        if not message.get("more_body"):
            self.is_complete = True
            event = sse.late_answer(self._path, self._late_status, bytes(collected))
            await self._send({"type": "http.response.body", "body": event})

    async def refuse(self, response: Asgi, scope: Scope, receive: Receive) -> None:
        """Give this answer, if none has begun but a stream, and let nobody else say anything."""
        self.is_refused = True
        self._is_early |= self._is_stream and self._is_between_events and not self.is_complete
        if self.status is None or self._is_early:
            await response(scope, receive, self)
        self._is_closed = True

    # How a silence is filled.
    def watch_silence(self) -> None:
        """Keep the stream alive from now on, for as long as it is not ended."""
        self._quiet_since = self._spoke_at = time.monotonic()
        self._ticker.add(self)

    def end_hold(self) -> None:
        """Begin no stream from here any more; one that has begun is kept alive."""
        self.wants_stream = None
        if not self._is_early:
            self._ticker.discard(self)

    def end_watch(self) -> None:
        """Send no comments any more."""
        self._ticker.discard(self)

    def is_quiet(self, since: float) -> bool:
        """True when nothing was said since then, and a comment would not fall into the middle of an event."""
        is_waiting = self.wants_stream is not None or (self._is_stream and self._is_between_events)
        return is_waiting and self._spoke_at <= since and not (self._is_speaking or self.is_complete)

    async def keep_alive(self, now: float) -> None:
        """Say how long the client has waited; begin the stream with that, if it has asked for one."""
        self._spoke_at = now
        if self.status is None and not (self.wants_stream is not None and self.wants_stream()):
            return
        self._is_speaking = True
        try:
            if self.status is None:
                self._is_stream = self._is_early = True
                self.status = 200
                headers = [*sse.HEADERS, (b"x-request-id", self.request_id)]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            comment = sse.comment(now - self._quiet_since)
            if self.is_complete:
                return
            await self._send({"type": "http.response.body", "body": comment, "more_body": True})
        finally:
            self._is_speaking = False
