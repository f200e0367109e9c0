"""The door before the model: who may come in, what waits for an engine, and what is in flight.

A plain ASGI application, so that a streamed answer passes through without a copy or a task of its own.
Order of questions: has the caller a key, is the path there at all, is there room, is there an engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from llm_serve import metrics, passage
from llm_serve.host.logs import get_logger
from llm_serve.web.errors import error_response

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/livez", "/readyz"})
OPERATIONS = frozenset({"/livez", "/readyz", "/health", "/status", "/metrics"})
_READING = frozenset({"GET", "HEAD"})
_READ_AHEAD_BYTES = 4 << 20  # times max_queued is the most that waiting bodies take
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_PARAMETER = re.compile(r"\{[^}]+\}")


class Keys:
    """The API keys, as digests. Without keys everybody may come in (loopback only, see the settings)."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        """True for a request that carries a key. Takes as long for a wrong key as for a right one."""
        if not self._digests:
            return True
        offered = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            offered = token.strip()
        digest = hashlib.sha256(offered).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: no early exit
        return any(matches)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no request is let in any more, and when it makes sense to come back."""

    message: str
    retry_after_s: int


@dataclass
class Limits:
    """How many requests may wait for an engine, and how long."""

    max_queued: int
    hold_timeout_s: float


class Gate:
    """Lets requests through to `model` (vLLM's application) while it is open; else makes them wait."""

    def __init__(
        self,
        *,
        keys: Keys,
        limits: Limits,
        routes: Iterable[tuple[str, str]],
        operations: Asgi,
        open_metrics: bool,
    ) -> None:
        self._keys, self._limits, self._operations = keys, limits, operations
        self._open_paths = OPEN_PATHS | ({"/metrics"} if open_metrics else frozenset())
        self._routes = [_route(method, path) for method, path in routes]
        self._is_decided = asyncio.Event()
        self._refusal: Refusal | None = None
        self.model: Asgi | None = None
        self.held = 0
        self.in_flight = 0

    # What the supervisor orders.
    def open(self, model: Asgi) -> None:
        """Let requests through, those that wait first."""
        self.model = model
        self._is_decided.set()

    def hold(self) -> None:
        """Make requests wait."""
        self._is_decided.clear()

    def refuse(self, message: str, retry_after_s: int) -> None:
        """Answer 503 at once, also to those that wait."""
        self._refusal = Refusal(message, retry_after_s)
        self._is_decided.set()

    def reconfigure(self, keys: Keys, limits: Limits, *, open_metrics: bool) -> None:
        """Ask and allow this from now on. Who waits already waits as long as he was promised."""
        self._keys, self._limits = keys, limits
        self._open_paths = OPEN_PATHS | ({"/metrics"} if open_metrics else frozenset())

    # What clients meet.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        answer = _Answer(send, _name_request(scope, headers))
        path, method = scope["path"], scope["method"]
        if path not in self._open_paths and not self._keys.allow(headers):
            await _NO_KEY(scope, receive, answer)
        elif path in OPERATIONS and method not in _READING:
            await _wrong_method(path, method, _READING)(scope, receive, answer)
        elif path in OPERATIONS or (path == "/v1/models" and method == "GET" and self.model is None):
            await self._operations(scope, receive, answer)
        elif not (methods := {known for known, pattern in self._routes if pattern.fullmatch(path)}):
            await error_response(404, f"there is no {path} here.", code="not_found")(scope, receive, answer)
        elif method not in methods:
            await _wrong_method(path, method, methods)(scope, receive, answer)
        elif method == "GET" and self.model is not None:
            await self.model(scope, receive, answer)
        else:
            await self._serve(scope, receive, answer)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        began, outcome = time.monotonic(), "aborted"
        self.in_flight += 1
        try:
            outcome = await self._admit(scope, receive, answer)
        finally:
            self.in_flight -= 1
            metrics.requests.labels(outcome).inc()
            get_logger().info(
                "request",
                request_id=answer.request_id.decode(),
                method=scope["method"],
                path=scope["path"],
                status=answer.status,
                seconds=round(time.monotonic() - began, 3),
                outcome=outcome,
            )

    async def _admit(self, scope: Scope, receive: Receive, send: _Answer) -> str:
        """Let the request through when there is an engine. Returns how it ended."""
        if not self._is_decided.is_set():
            if self.held >= self._limits.max_queued:
                full = f"{self.held} requests are waiting for the engine already (server.max_queued)."
                return await _refuse(Refusal(full, 5), scope, receive, send)
            buffered = _Buffered(receive)
            if (answer := await self._hold(buffered)) != "admitted":
                if answer == "gone":
                    return "aborted"
                waited = f"{self._limits.hold_timeout_s:g} s (server.hold_timeout_s)"
                late = f"the engine was not ready within {waited}."
                return await _refuse(Refusal(late, 10), scope, receive, send)
            receive = buffered
        if self._refusal is not None:
            return await _refuse(self._refusal, scope, receive, send)
        return await self._pass(scope, receive, send)

    async def _hold(self, body: _Buffered) -> str:
        """Wait for a decision: "admitted", or "late", or "gone" when the client left meanwhile."""
        self.held += 1
        metrics.requests_held.set(self.held)
        decided, left = (
            asyncio.create_task(self._is_decided.wait()),
            asyncio.create_task(body.until_client_leaves()),
        )
        try:
            done, _ = await asyncio.wait(
                {decided, left}, timeout=self._limits.hold_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return "late"
            return "admitted" if decided in done else "gone"
        finally:
            decided.cancel()
            await body.stop_watching(left)
            self.held -= 1
            metrics.requests_held.set(self.held)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> str:
        assert self.model is not None, "the gate was opened without a model"
        journey = passage.Passage()
        token = passage.current.set(journey)
        try:
            await self.model(scope, receive, answer)
        finally:
            passage.current.reset(token)
        return journey.outcome(is_complete=answer.is_complete)


class _Answer:
    """The way back to the client: puts the request's id on the answer and remembers how far it came."""

    __slots__ = ("_send", "is_complete", "request_id", "status")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send, self.request_id = send, request_id
        self.status: int | None = None
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        """What the application calls as `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            rest = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message["headers"] = [*rest, (b"x-request-id", self.request_id)]
        elif not message.get("more_body"):
            self.is_complete = True
        await self._send(message)


class _Buffered:
    """A request's body, read ahead while the request waits, so that a client that leaves is noticed."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._pending: asyncio.Task[Message] | None = None

    async def until_client_leaves(self) -> None:
        """Read the body, and return when the client has gone; of a very long body only the beginning is read."""
        size = 0
        while size < _READ_AHEAD_BYTES:
            if self._pending is None:
                self._pending = asyncio.ensure_future(self._receive())
            message = await asyncio.shield(self._pending)
            self._pending = None
            self._messages.append(message)
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
        await asyncio.Event().wait()

    async def stop_watching(self, watcher: asyncio.Task[None]) -> None:
        """End the watch. A read that is under way is kept for the one who reads next."""
        watcher.cancel()
        await asyncio.wait({watcher})

    async def __call__(self) -> Message:
        """What the application calls as `receive`."""
        if self._messages:
            return self._messages.pop(0)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return await pending
        return await self._receive()


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> str:
    headers = {"retry-after": str(refusal.retry_after_s), "connection": "close"}
    await error_response(503, refusal.message, code="engine_unavailable", headers=headers)(scope, receive, send)
    return "rejected"


def _name_request(scope: Scope, headers: dict[bytes, bytes]) -> bytes:
    """The request's id: the client's own if it is a plain one, else a new one, which vLLM then sees too."""
    given = headers.get(b"x-request-id", b"")
    if _REQUEST_ID.fullmatch(given):
        return given
    name = uuid.uuid4().hex.encode()
    scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"] + [(b"x-request-id", name)]
    return name


_NO_KEY = error_response(
    401,
    "a valid API key is needed: Authorization: Bearer KEY.",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


def _wrong_method(path: str, method: str, methods: AbstractSet[str]) -> Asgi:
    allow = {"allow": ", ".join(sorted(methods))}
    return error_response(405, f"{path} does not take {method}.", code="method_not_allowed", headers=allow)


def _route(method: str, path: str) -> tuple[str, re.Pattern[str]]:
    """A route with its parameters as a pattern: /v1/responses/{id} -> /v1/responses/[^/]+."""
    return method, re.compile("[^/]+".join(map(re.escape, _PARAMETER.split(path))))
