"""What operators and machines ask: alive? ready? how is it going? Answered from the first second."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from llm_serve import metrics
from llm_serve.core.machine import State
from llm_serve.core.status import Reply, Snapshot


def create(snapshot: Callable[[], Snapshot], model_names: tuple[str, ...]) -> FastAPI:
    """The operations application. `model_names` answers /v1/models until vLLM's own handler can."""
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
    async def status() -> Response:
        """Everything that the supervisor knows."""
        return JSONResponse(snapshot().to_json())

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def scrape() -> Response:
        """Ours and vLLM's, for Prometheus."""
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        """The names from the file, while no engine has been up yet."""
        created = int(time.time())
        data = [{"id": name, "object": "model", "created": created, "owned_by": "llm-serve"} for name in model_names]
        return JSONResponse({"object": "list", "data": data})

    return app


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
