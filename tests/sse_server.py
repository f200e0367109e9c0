"""A server that answers like OpenAI's API without any model: as fast as Python can, or badly, on cue.

A fake, because a real engine cannot be told to cut a stream after three tokens, nor be faster than a load generator.
`python -m tests.sse_server PORT TOKENS_PER_S` serves until it is ended; 0 tokens/s is without any pause.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL_NAME = "nothing"
_EVENT = b'data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
_TEXT = b'data: {"id": "x", "choices": [{"index": 0, "text": "word ", "finish_reason": null}]}\n\n'
_ROLE = b'data: {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'


@dataclass
class Behaviour:
    """How the next requests are answered. `slots`, as at the first one, run at once; others wait, as in an engine."""

    token_s: float = 0.0
    first_token_s: float = 0.0
    end_s: float = 0.0
    """Between the last event and the end of the body."""
    slots: int | None = None
    status: int = 200
    events: list[bytes] | None = None
    """What is sent instead of tokens; None of them is a cut."""
    usage: bool = True
    metrics: str | None = ""
    """The text of /metrics; empty for what this server knows of itself, None for none."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    running: int = 0
    waiting: int = 0


def application(behaviour: Behaviour) -> web.Application:
    """The server, which looks at `behaviour` at each request."""
    places: list[asyncio.Semaphore] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        behaviour.bodies.append(body)
        behaviour.connections.add(request.transport.get_extra_info("peername") if request.transport else None)
        if behaviour.status != 200:
            return web.json_response({"error": {"message": "on cue"}}, status=behaviour.status)
        if not places:
            places.append(asyncio.Semaphore(behaviour.slots or 1_000_000))
        behaviour.waiting += 1
        async with places[0]:
            behaviour.waiting -= 1
            behaviour.running += 1
            try:
                return await _stream(request, body, behaviour)
            finally:
                behaviour.running -= 1

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL_NAME, "root": MODEL_NAME}]})

    async def metrics(_: web.Request) -> web.Response:
        text = behaviour.metrics
        return web.Response(status=404) if text is None else web.Response(text=text or _metrics(behaviour))

    app = web.Application()
    app.add_routes([
        web.post("/v1/chat/completions", answer), web.post("/v1/completions", answer),
        web.get("/v1/models", models), web.get("/metrics", metrics),
    ])  # fmt: skip
    return app


async def _stream(request: web.Request, body: dict[str, Any], behaviour: Behaviour) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    if behaviour.events is not None:
        for event in behaviour.events:
            await response.write(event)
        if not behaviour.events or not behaviour.events[-1].startswith(b"data: [DONE]"):
            assert request.transport is not None
            request.transport.close()
        return response
    is_chat = request.path.endswith("chat/completions")
    if is_chat:
        await response.write(_ROLE)
    if behaviour.first_token_s:
        await asyncio.sleep(behaviour.first_token_s)
    tokens = body.get("max_tokens") or body["max_completion_tokens"]
    for number in range(tokens):
        if number and behaviour.token_s:
            await asyncio.sleep(behaviour.token_s)
        await response.write(_EVENT if is_chat else _TEXT)
    if behaviour.usage:
        usage = {"prompt_tokens": 3, "completion_tokens": tokens}
        await response.write(b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await asyncio.sleep(behaviour.end_s)
    return response


def _metrics(behaviour: Behaviour) -> str:
    slots = behaviour.slots or 1_000_000
    return (
        f'vllm:num_requests_running{{engine="0",model_name="{MODEL_NAME}"}} {behaviour.running}.0\n'
        f'vllm:num_requests_waiting{{engine="0",model_name="{MODEL_NAME}"}} {behaviour.waiting}.0\n'
        f'vllm:kv_cache_usage_perc{{engine="0"}} {0.3 * behaviour.running / slots}\n'
        f'vllm:num_preemptions_total{{engine="0"}} 0.0\n'
        f"llm_serve_plan_max_num_seqs {slots}.0\n"
    )


async def serve(behaviour: Behaviour, port: int = 0) -> tuple[str, Callable[[], Awaitable[None]]]:
    """Start it. Returns its address, and what ends it."""
    runner = web.AppRunner(application(behaviour), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    host, bound = runner.addresses[0][:2]
    return f"http://{host}:{bound}", runner.cleanup


async def _main(port: int, tokens_per_s: float) -> None:
    await serve(Behaviour(token_s=1 / tokens_per_s if tokens_per_s else 0.0), port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
