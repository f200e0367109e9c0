"""What one request, and all that wait together, may take of our memory."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from llm_serve.web.answer import Answer
from llm_serve.web.asgi import Message, Receive, Scope
from llm_serve.web.errors import error_response


@dataclass(frozen=True)
class Limits:
    """How many requests may wait for an engine, and how long; how long a body may be, and a stream quiet."""

    max_queued: int
    hold_timeout_s: float
    max_body_bytes: int = 32 << 20
    stream_keep_alive_s: float = 15.0


def too_large(max_bytes: int) -> Response:
    """413. The connection stays, so that a client which is still sending gets to read it."""
    message = f"the request's body is longer than {max_bytes} bytes (server.max_body_bytes)."
    return error_response(413, message, code="request_too_large")


def has_known_length(headers: dict[bytes, bytes]) -> bool:
    """True when the server reads no more of the body than its header says."""
    return b"content-length" in headers and b"transfer-encoding" not in headers


class Measured:
    """A body of unknown length: one that comes to more than `max_bytes` is refused, and then looks like a hang-up."""

    __slots__ = ("_answer", "_max_bytes", "_receive", "_scope", "_size")

    def __init__(self, scope: Scope, receive: Receive, answer: Answer, max_bytes: int) -> None:
        self._scope, self._receive, self._answer, self._max_bytes = scope, receive, answer, max_bytes
        self._size = 0

    async def __call__(self) -> Message:
        """What the application calls as `receive`."""
        if self._answer.is_refused:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size <= self._max_bytes:
            return message
        await self._answer.refuse(too_large(self._max_bytes), self._scope, self._receive)
        return {"type": "http.disconnect"}
