"""What one request, and all that wait together, may take of our memory."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from llm_serve.core.edge import Edge, Refusal
from llm_serve.web.errors import error_response


@dataclass(frozen=True)
class Limits:
    """How many requests may wait and how long; how long a body may be, what it may ask, how long a stream be quiet."""

    max_queued: int
    hold_timeout_s: float
    max_body_bytes: int = 32 << 20
    stream_keep_alive_s: float = 15.0
    request_timeout_s: float = 0.0
    """0: any."""
    edge: Edge | None = None
    """None: bodies pass unexamined."""


def too_large(max_bytes: int) -> Response:
    """413. The connection stays, so that a client which is still sending gets to read it."""
    message = f"the request's body is longer than {max_bytes} bytes (server.max_body_bytes)."
    return error_response(413, message, code="request_too_large")


def took_too_long(limit_s: float) -> Response:
    """504, or where the answer is a stream that has begun, its last event."""
    message = f"the request took longer than {limit_s:g} s (server.request_timeout_s)."
    return error_response(504, message, code="request_timeout")


def not_allowed(refused: Refusal) -> Response:
    """400 or 413, with the field that is to blame."""
    return error_response(refused.status, refused.message, code=refused.code, param=refused.field or None)
