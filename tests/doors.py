"""A gate with a model behind it, and calls to it, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY

from llm_serve.core.status import Snapshot
from llm_serve.engine.openai_routes import allowed
from llm_serve.web import operations
from llm_serve.web.asgi import Message, Receive, Scope, Send
from llm_serve.web.gate import Gate
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits

COMPLETIONS = "/v1/completions"
KEY = {"authorization": "Bearer right"}


@dataclass
class Call:
    """One client: its request in pieces, and what came back."""

    path: str = COMPLETIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] = (b"{}",)
    answers: list[Message] = field(default_factory=list)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    client: str = "127.0.0.1"

    async def ask(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> Call:
        """Send the request and keep the answer."""
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers,
            "client": (self.client, 1),
            "server": ("127.0.0.1", 8000),
        }
        await app(scope, self._receive_from(list(self.pieces)), self._send)
        return self

    def _receive_from(self, rest: list[bytes]) -> Receive:
        async def receive() -> Message:
            if rest:
                piece = rest.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(rest)}
            await self.leaves.wait()
            return {"type": "http.disconnect"}

        return receive

    async def _send(self, message: Message) -> None:
        self.answers.append(message)

    @property
    def status(self) -> int:
        """The status of the answer."""
        return int(self.answers[0]["status"])

    @property
    def head(self) -> dict[str, str]:
        """The headers of the answer."""
        return {name.decode(): value.decode() for name, value in self.answers[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The body of the answer."""
        return b"".join(message.get("body", b"") for message in self.answers[1:])

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the answer."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Model:
    """Stands for vLLM's application: answers with the body that it was sent, in pieces."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.ids: list[bytes] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then answer."""
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body += message["body"]
            more = message["more_body"]
        self.seen.append((scope["path"], body))
        self.ids.append(dict(scope["headers"])[b"x-request-id"])
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"inner")]})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})


def snapshot() -> Snapshot:
    """An instance that is starting."""
    return Snapshot(
        instance="a",
        model="m",
        state="starting",
        why="w",
        since=0.0,
        started=0.0,
        uptime_s=0.0,
        phase="loading weights",
        progress=0.4,
        version="1",
        vllm_version="0.32.0",
        pid=1,
        listen="127.0.0.1:8000",
        source="a.toml",
    )


def gate(keys: Iterable[str] = (), *, open_metrics: bool = False, **limits: Any) -> Gate:
    """A gate that holds, as at the start of a daemon."""
    return Gate(
        keys=Keys(keys),
        limits=Limits(**({"max_queued": 2, "hold_timeout_s": 30.0} | limits)),
        routes=allowed(anthropic_messages=True),
        operations=operations.create(snapshot, ("qwen",)),
        open_metrics=open_metrics,
    )


def open_gate(keys: Iterable[str] = ()) -> tuple[Gate, Model]:
    """A gate that lets through, and the model behind it."""
    door, model = gate(keys), Model()
    door.open(model)
    return door, model


def counted(outcome: str) -> float:
    """Requests that have ended like this."""
    return REGISTRY.get_sample_value("llm_serve_requests_total", {"outcome": outcome}) or 0.0


async def until(is_so: Callable[[], object]) -> None:
    """Let the loop turn until something is so, which is a matter of turns, not of time."""
    for _ in range(10_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it has not become so")


@contextlib.asynccontextmanager
async def waiting(door: Gate, *calls: Call) -> AsyncIterator[list[asyncio.Task[Call]]]:
    """Calls that wait at the gate."""
    tasks = [asyncio.create_task(call.ask(door)) for call in calls]
    await until(lambda: door.held == len(calls))
    yield tasks
    for call in calls:
        call.leaves.set()
