"""Ends connections whose client does not say what it wants, or does not read its answer; uvicorn would wait for ever.

Deadlines look at all connections twice a second instead of keeping a timer for each request: what is found in the same
phase of the same request for too long is ended. Only attributes that uvicorn's two HTTP/1.1 protocols share are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from llm_serve import metrics
from llm_serve.host.logs import get_logger
from llm_serve.web.errors import error_response
from llm_serve.web.places import UNLIMITED, Places

_HEADERS, _BODY, _ANSWER = "headers", "body", "answer"
MAX_HEAD_BYTES = 64 << 10


class BoundedHead(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # which class it is, is decided when it is imported
    """uvicorn's protocol, with an end to the head of a request and to the number of connections; it has neither."""

    places: Places = UNLIMITED
    _has_place = False
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin, or say that there are too many already."""
        super().connection_made(transport)
        self._has_place = not (why := self.places.take(self.client))
        if why:
            metrics.connections_refused.inc()
            transport.write(_answer("503 Service Unavailable", why, "too_many_connections", b"retry-after: 5\r\n"))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another one."""
        super().connection_lost(exc)
        if self._has_place:
            self._has_place = False
            self.places.give_back(self.client)

    def data_received(self, data: bytes) -> None:
        """Take in what has come."""
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if _is_in_head(self) else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            metrics.slow_clients.labels(_HEADERS).inc()
            message = f"the head of the request is longer than {MAX_HEAD_BYTES} bytes."
            self.transport.write(_answer("431 Request Header Fields Too Large", message, "head_too_large"))
            self.transport.close()


@dataclass(frozen=True)
class Timeouts:
    """How long a client may take for the head of a request, for its body, and to take any of its answer, in seconds."""

    header_timeout_s: float = 20.0
    body_timeout_s: float = 120.0
    write_timeout_s: float = 120.0


class Deadlines:
    """The connections that owe us the rest of a request, or do not take its answer, and since when."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._limits_s = {
            _HEADERS: timeouts.header_timeout_s, _BODY: timeouts.body_timeout_s, _ANSWER: timeouts.write_timeout_s
        }  # fmt: skip
        self._owing: dict[Any, tuple[str, Any, float]] = {}

    def look(self, connections: Iterable[Any], now: float) -> None:
        """End what is overdue at the monotonic time `now`."""
        still: dict[Any, tuple[str, Any, float]] = {}
        for connection in connections:
            if (phase := _phase(connection)) is None:
                continue
            stage = _stage(connection, phase)
            known = self._owing.get(connection)
            since = known[2] if known is not None and known[:2] == (phase, stage) else now
            if now - since < self._limits_s[phase]:
                still[connection] = phase, stage, since
            else:
                self._end(connection, phase)
        self._owing = still

    def _end(self, connection: Any, phase: str) -> None:
        metrics.slow_clients.labels(phase).inc()
        limit_s = self._limits_s[phase]
        get_logger().warning("a client was too slow", part=phase, seconds=limit_s, client=connection.client)
        if connection.transport.is_closing() or phase == _ANSWER:
            connection.transport.abort()  # it was told already, and does not even read that
        elif _may_be_told(connection, phase):
            message = f"the {phase} of the request took longer than {limit_s:g} s (server.{_OPTIONS[phase]})."
            connection.transport.write(_answer("408 Request Timeout", message, "request_timeout"))
        connection.transport.close()


_OPTIONS = {_HEADERS: "header_timeout_s", _BODY: "body_timeout_s"}


def _phase(connection: Any) -> str | None:
    """What the client owes us; None when it owes nothing, or when it is we who do not read."""
    cycle, flow = getattr(connection, "cycle", None), getattr(connection, "flow", None)
    if flow is not None and flow.write_paused:
        return _ANSWER
    if cycle is not None and not cycle.response_complete:
        return _BODY if cycle.more_body and not connection.flow.read_paused else None
    # Between two requests a timer of uvicorn's runs, which the first byte of the next one ends.
    is_idle = getattr(connection, "timeout_keep_alive_task", None) is not None
    return None if is_idle or not hasattr(connection, "flow") else _HEADERS


def _stage(connection: Any, phase: str) -> Any:
    """What is another one as soon as the client has come any further; while we are kept from writing, less is left."""
    return connection.transport.get_write_buffer_size() if phase == _ANSWER else connection.cycle


def _may_be_told(connection: Any, phase: str) -> bool:
    """False where an answer would be taken for something else: in the middle of one, or before any request."""
    if phase == _BODY:
        return not connection.cycle.response_started
    return _is_in_head(connection)


def _is_in_head(connection: Any) -> bool:
    """True from the first byte of a request to the end of its headers; always False for uvicorn's slower parser."""
    return connection.scope is not None and "method" not in connection.scope


def _answer(status: str, message: str, code: str, headers: bytes = b"") -> bytes:
    body = bytes(error_response(int(status[:3]), message, code=code).body)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + headers + b"connection: close\r\n\r\n" + body
