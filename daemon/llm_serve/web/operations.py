"""What operators and machines ask: alive? ready? how is it going? Answered from the first second, also as a page."""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from llm_serve import metrics
from llm_serve.core.states import State
from llm_serve.core.status import Reply, Snapshot
from llm_serve.web.assets import ASSETS, accepts_gzip
from llm_serve.web.errors import error_response

_WORTH_PACKING = 2048
_NUMBER = re.compile(r"[0-9]{1,15}")


def create(snapshot: Callable[[], Snapshot], model_names: tuple[str, ...], whole: Whole | None = None) -> FastAPI:
    """The operations application. `model_names` answers /v1/models until vLLM's own handler can.

    `whole` says what is known only where all is known; without it that is here.
    """
    whole = whole or Here(snapshot)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.api_route("/livez", methods=["GET", "HEAD"])
    async def livez() -> Response:
        """200 as long as the process answers at all."""
        return Response("ok\n", media_type="text/plain")

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def readyz() -> Response:
        """200 when requests are served at once; else 503 with the state."""
        now = snapshot()
        if now.state == State.serving:
            return JSONResponse({"state": now.state})
        body = {"state": now.state, "phase": now.phase, "progress": now.progress, "why": now.why}
        body |= {"is_drained": now.is_drained}
        return JSONResponse(body, 503, {"retry-after": "5"})

    @app.api_route("/status", methods=["GET", "HEAD"])
    async def status(request: Request) -> Response:
        """Everything that the supervisor knows; with ?since=NUMBER also the history after that number, with 0 all."""
        since = request.query_params.get("since")
        if since is None:
            return await whole.status(None)
        if not _NUMBER.fullmatch(since):
            return error_response(400, "since must be a whole number: 0, or the last one told.", code="invalid_since")
        return _packed(await whole.status(int(since)), request)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def scrape() -> Response:
        """Ours and vLLM's, for Prometheus."""
        return await whole.metrics()

    @app.get("/v1/models")
    async def models() -> Response:
        """The names from the file, while no engine has been up yet."""
        created = int(time.time())
        data = [{"id": name, "object": "model", "created": created, "owned_by": "llm-serve"} for name in model_names]
        return JSONResponse({"object": "list", "data": data})

    async def asset(request: Request) -> Response:
        return ASSETS[request.scope["path"]].answer(request.headers)

    for path in ASSETS:
        app.add_api_route(path, asset, methods=["GET", "HEAD"])
    return app


class Whole(Protocol):
    """Answers what is asked of an instance, not of one of its processes."""

    async def status(self, since: int | None) -> Response:
        """Everything that the supervisor knows, with the history after that number if there is one."""

    async def metrics(self) -> Response:
        """Everything that is counted."""


async def _render() -> bytes:
    return metrics.render()


def _nothing(_: int) -> dict[str, Any]:
    return {}


def _packed(answer: Response, request: Request) -> Response:
    """The same, compressed where that saves much and is understood."""
    if len(answer.body) < _WORTH_PACKING or not accepts_gzip(request.headers):
        return answer
    headers = {"content-encoding": "gzip", "vary": "accept-encoding", "cache-control": "no-store"}
    return Response(gzip.compress(answer.body, 1), answer.status_code, headers, answer.media_type)


class Here:
    """The answers of the process that the supervisor is in. `render` may be set where others count as well.

    `history(number)` is what came after that number, where somebody keeps one.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self.render: Callable[[], Awaitable[bytes]] = _render
        self.history: Callable[[int], dict[str, Any]] = _nothing

    async def status(self, since: int | None) -> Response:
        """Everything that the supervisor knows."""
        history = {} if since is None else {"history": self.history(since)}
        return JSONResponse(self._snapshot().to_json() | history)

    async def metrics(self) -> Response:
        """Everything that is counted."""
        return Response(await self.render(), media_type=metrics.CONTENT_TYPE)


def take_orders(app: FastAPI, orders: Mapping[str, Callable[[], Awaitable[Reply]]]) -> None:
    """Let the application take orders, with POST. The gate passes nothing but reading on, so they come from inside."""
    for path, order in orders.items():
        app.add_api_route(path, _answering(order), methods=["POST"])


def _answering(order: Callable[[], Awaitable[Reply]]) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        """200 when it was done, 409 when not; the body says what came of it."""
        reply = await order()
        return JSONResponse(asdict(reply), 409 if reply.exit_status else 200)

    return answer
