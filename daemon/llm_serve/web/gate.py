"""The door before the model: who may come in, what waits for an engine or for room in it, and what is in flight.

A plain ASGI application, so that a streamed answer passes through without a copy or a task of its own.
Order of questions: is it us whom he means, has the caller a key, is the path there at all, is the body too long, may it
ask for that, is there an engine, is there room in it, is there room to wait.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

from llm_serve import metrics, passage
from llm_serve.core import retry_after
from llm_serve.core.admission import Admission, Load
from llm_serve.core.company import ALONE, Company
from llm_serve.core.hosts import Hosts
from llm_serve.host.logs import get_logger
from llm_serve.web.answer import Answer
from llm_serve.web.asgi import Asgi, Receive, Scope, Send
from llm_serve.web.assets import ASSETS
from llm_serve.web.departure import ASGI, Departure
from llm_serve.web.errors import error_response
from llm_serve.web.hold import Body, Budget, Reading, Verdict, Waiter
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits, not_allowed, too_large, took_too_long
from llm_serve.web.long_bodies import LongBodies
from llm_serve.web.sse import STREAMED, Ticker

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", *ASSETS})
OPERATIONS = frozenset({"/livez", "/readyz", "/health", "/status", "/metrics", *ASSETS})
BESIDE_THE_ENGINE = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
"""What vLLM's handlers answer by themselves; so they do cancelling, below."""
_READING = frozenset({"GET", "HEAD"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_PARAMETER = re.compile(r"\{[^}]+\}")
_REMEMBERED = 32
"""Recoveries, and requests let in, from which is told when to come back."""


ANY_HOST = Hosts()
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in, and when it makes sense to come back."""

    message: str
    retry_after_s: int


class Gate:
    """Lets requests through to `model` (vLLM's application) as far as its engine has room; else makes them wait."""

    def __init__(  # noqa: PLR0913 - each by its name
        self,
        *,
        keys: Keys,
        limits: Limits,
        routes: Iterable[tuple[str, str]],
        operations: Asgi,
        open_metrics: bool,
        hosts: Hosts = ANY_HOST,
        company: Company = ALONE,
    ) -> None:
        self._keys, self._hosts, self._limits, self._operations = keys, hosts, limits, operations
        self._open_paths = OPEN_PATHS | ({"/metrics"} if open_metrics else frozenset())
        self._routes = [_route(method, path) for method, path in routes]
        self._admission: Admission[Waiter] = Admission(limits.max_queued, is_shared=keys.are_shared, company=company)
        self._ticker = Ticker(limits.stream_keep_alive_s)
        self._budget = Budget()
        self._long_bodies = LongBodies()
        self._refusal: Refusal | None = None
        self._closed_at: float | None = time.monotonic()
        self._past_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._let_in_at: deque[float] = deque(maxlen=_REMEMBERED)
        self.model: Asgi | None = None
        self.in_flight = 0

    @property
    def held(self) -> int:
        """How many requests wait."""
        return len(self._admission)

    # What the supervisor orders.
    def open(self, model: Asgi, slots: int | None = None) -> None:
        """Let requests through, those that wait first, to an engine that runs `slots` of them at once."""
        self.model = model
        if self._closed_at is not None:
            self._past_s.append(time.monotonic() - self._closed_at)
            self._closed_at = None
        self._admission.open(slots)
        self._let_in_those_due()

    def hold(self) -> None:
        """Make requests wait."""
        self._closed_at = self._closed_at or time.monotonic()
        self._admission.close()

    def refuse(self, message: str, retry_after_s: int) -> None:
        """Answer 503 at once, also to those that wait."""
        self._refusal = Refusal(message, retry_after_s)
        for waiter in self._admission.everybody():
            waiter.decide(Verdict.stopping)

    def note(self, load: Load) -> None:
        """The engine has done a step, and this is what it has to do now."""
        self._admission.note(load)
        self.look()

    def look(self) -> None:
        """There may be room for those who wait."""
        if self._admission:
            self._let_in_those_due()

    def _let_in_those_due(self) -> None:
        for waiter in self._admission.due():
            self._let_in_at.append(time.monotonic())
            waiter.decide(Verdict.admitted)
        if not self._admission:
            self._let_in_at.clear()  # the pace of a queue that is over says nothing about the next one

    def reconfigure(self, keys: Keys, limits: Limits, *, open_metrics: bool, hosts: Hosts = ANY_HOST) -> None:
        """Ask and allow this from now on. Who waits already waits as long as he was promised."""
        self._keys, self._hosts, self._limits = keys, hosts, limits
        self._admission.resize(limits.max_queued, is_shared=keys.are_shared)
        self._open_paths = OPEN_PATHS | ({"/metrics"} if open_metrics else frozenset())

    # What clients meet.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        path, method = scope["path"], scope["method"]
        answer = Answer(send, _name_request(scope, headers), path, self._ticker)
        if not self._hosts.includes(headers.get(b"host")):
            await _NOT_THIS_HOST(scope, receive, answer)
            return
        holder = self._keys.holder(headers, scope.get("client"))
        if holder is None and path not in self._open_paths:
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
            try:
                await self._in_time(self.model(scope, receive, answer), scope, receive, answer)
            finally:
                answer.end_watch()
        elif int(headers.get(b"content-length", b"0")) > self._limits.max_body_bytes:
            await too_large(self._limits.max_body_bytes)(scope, receive, answer)
        else:
            await self._serve(scope, Body(receive, self._budget), answer, holder or b"")

    async def _serve(self, scope: Scope, body: Body, answer: Answer, holder: bytes) -> None:
        began, outcome = time.monotonic(), "aborted"
        self.in_flight += 1
        try:
            work = self._examine_and_admit(scope, body, answer, holder)
            outcome = await self._in_time(work, scope, body, answer) or outcome
        finally:
            self.in_flight -= 1
            body.close()
            answer.end_watch()
            if answer.has_place:
                self._admission.ended()
                self._let_in_those_due()
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

    async def _in_time(self, work: Awaitable[Done], scope: Scope, receive: Receive, answer: Answer) -> Done | None:
        """What the work returns; nothing where it took too long, which the client is told."""
        limit_s = self._limits.request_timeout_s
        try:
            async with asyncio.timeout(limit_s or None) as whole:
                return await work
        except TimeoutError:
            if not whole.expired():
                raise
            await answer.refuse(took_too_long(limit_s), scope, receive)
            return None

    async def _examine_and_admit(self, scope: Scope, body: Body, answer: Answer, holder: bytes) -> str:
        return await self._examine(scope, body, answer) or await self._admit(scope, body, answer, holder)

    async def _examine(self, scope: Scope, body: Body, answer: Answer) -> str:
        """Read the body and look at it. Returns how the request ended if it ended with that, else nothing."""
        if self._refusal is not None:
            return await self._refuse(self._refusal, "stopping", scope, body, answer)
        limits = self._limits
        reading = await body.read(limits.max_body_bytes, limits.hold_timeout_s)
        if reading is Reading.cut:
            return "aborted"
        if reading is Reading.no_room:
            message = "the requests that are being read fill the memory that is set aside for them."
            return await self._refuse(Refusal(message, self._retry_after_s()), "full", scope, body, answer)
        if reading is Reading.too_long:
            response = too_large(limits.max_body_bytes)
        elif (
            limits.edge is not None
            and (refused := await self._long_bodies.look(limits.edge.refusal, body.content)) is not None
        ):
            response = not_allowed(refused)
        else:
            return ""
        await answer.refuse(response, scope, body)
        return "rejected"

    async def _admit(self, scope: Scope, body: Body, answer: Answer, holder: bytes) -> str:
        """Let the request through when there is room for it. Returns how it ended."""
        if self._refusal is not None:
            return await self._refuse(self._refusal, "stopping", scope, body, answer)
        if self.model is not None and not _needs_engine(scope["path"]):
            return await self._pass(self.model, scope, body, answer)
        if self._admission.enter():
            answer.has_place = True
        else:
            verdict = await self._hold(Waiter(body, answer), scope["path"], answer, holder)
            if verdict is Verdict.gone:
                return "aborted"
            if verdict is not Verdict.admitted:
                return await self._refuse(self._why(verdict), verdict.value, scope, body, answer)
        assert self.model is not None, "the gate was opened without a model"
        return await self._pass(self.model, scope, body, answer)

    async def _hold(self, waiter: Waiter, path: str, answer: Answer, holder: bytes) -> Verdict:
        """Let one request wait until something is decided, at most for `hold_timeout_s`."""
        began = time.monotonic()
        if not self._admission.wait(holder, waiter, began):
            return Verdict.full
        metrics.requests_held.set(self.held)
        if path in STREAMED:
            answer.wants_stream = waiter.body.wants_stream
            answer.watch_silence()
        try:
            return await waiter.wait(self._limits.hold_timeout_s)
        finally:
            self._admission.withdraw(holder, waiter)
            answer.end_hold()
            metrics.requests_held.set(self.held)
            metrics.hold_seconds.observe(time.monotonic() - began)

    def _why(self, verdict: Verdict) -> Refusal:
        """Why a request that waited, or wanted to, is not let in."""
        if verdict is Verdict.stopping and self._refusal is not None:
            return self._refusal
        what = "room in the engine" if self._admission.is_open else "the engine"
        if verdict is Verdict.late:
            waited = f"{self._limits.hold_timeout_s:g} s (server.hold_timeout_s)"
            late = "had no room" if self._admission.is_open else "was not ready"
            return Refusal(f"the engine {late} within {waited}.", self._retry_after_s())
        full = f"{self._admission.waiting} requests are waiting for {what} already (server.max_queued)."
        return Refusal(full, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """When it makes sense to come back, from what this process has seen."""
        now = time.monotonic()
        if self._closed_at is not None:
            return retry_after.for_engine(self._past_s, now - self._closed_at)
        since = now - self._let_in_at[0] if self._let_in_at else 0.0
        return retry_after.for_room(self.held, len(self._let_in_at), since)

    async def _refuse(self, refusal: Refusal, reason: str, scope: Scope, receive: Receive, answer: Answer) -> str:
        metrics.refusals.labels(reason).inc()
        headers = {"retry-after": str(refusal.retry_after_s)}
        if refusal is self._refusal:
            headers["connection"] = "close"
        response = error_response(503, refusal.message, code="engine_unavailable", headers=headers)
        await answer.refuse(response, scope, receive)
        return "rejected"

    async def _pass(self, model: Asgi, scope: Scope, body: Body, answer: Answer) -> str:
        journey = passage.Passage()
        token = passage.current.set(journey)
        scope["asgi"] = ASGI
        try:
            with Departure(body, answer) as departure:
                await model(scope, body, answer)
        finally:
            passage.current.reset(token)
        is_complete = answer.is_complete and not departure.has_come
        return "rejected" if answer.is_refused else journey.outcome(is_complete=is_complete)


def _needs_engine(path: str) -> bool:
    return path not in BESIDE_THE_ENGINE and not path.endswith("/cancel")


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


_NOT_THIS_HOST = error_response(
    421,
    "this server is not called by that name (the Host header); server.hosts lists the names that it takes.",
    code="unknown_host",
)


def _wrong_method(path: str, method: str, methods: AbstractSet[str]) -> Asgi:
    allow = {"allow": ", ".join(sorted(methods))}
    return error_response(405, f"{path} does not take {method}.", code="method_not_allowed", headers=allow)


def _route(method: str, path: str) -> tuple[str, re.Pattern[str]]:
    """A route with its parameters as a pattern: /v1/responses/{id} -> /v1/responses/[^/]+."""
    return method, re.compile("[^/]+".join(map(re.escape, _PARAMETER.split(path))))
