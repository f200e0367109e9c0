"""vLLM's own OpenAI routes, mounted by allow-list and re-bound for each engine.

Everything about the wire format (protocol models, parsers, templates, streaming) is vLLM's. What is not on
the list is not there: vLLM's development, weight-update, scaling and fault routes would otherwise be open to
every client.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from llm_serve.engine import short_texts
from llm_serve.web.errors import error_response


def build_app(args: Namespace, tasks: Sequence[str], model_config: Any, allowed: frozenset[tuple[str, str]]) -> Any:
    """vLLM's FastAPI application with only the allowed routes. It needs `bind` before it can answer."""  # noqa: D403 - its name
    from vllm.entrypoints.launchers.app import build_app as vllm_build_app

    app = vllm_build_app(args, tuple(tasks), model_config)
    # Web pages of other origins are let in, or not, before the gate (web/origins.py).
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    app.middleware_stack = None  # vLLM's bootstrap has built it with that already
    app.router.routes = [route for route in app.router.routes if _is_allowed(route, allowed)]
    app.router.default = _not_served
    _leave_departures_to_the_gate(app.router.routes)
    # vLLM's error handlers look at a server that they may stop; ours is not theirs to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def _is_allowed(route: Any, allowed: frozenset[tuple[str, str]]) -> bool:
    path = getattr(route, "path", None)
    return any((method, path) in allowed for method in getattr(route, "methods", None) or ())


def _leave_departures_to_the_gate(routes: Iterable[Any]) -> None:
    """Take vLLM's own look for clients that have gone out of the way; see web/departure.py."""
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    looks = with_cancellation(_not_served).__code__
    for route in routes:
        handler: Any = getattr(getattr(route, "dependant", None), "call", None)
        if getattr(handler, "__code__", None) is looks:
            route.dependant.call = handler.__wrapped__


async def _not_served(scope: Any, receive: Any, send: Any) -> None:
    """Answer for a route that is allowed, but that vLLM does not have for this model: 404 as an OpenAI error."""
    message = f"the model that is served here does not do {scope['path']}."
    await error_response(404, message, code="not_found")(scope, receive, send)


async def bind(app: Any, survivor: Any, args: Namespace, tasks: Sequence[str]) -> None:
    """Make the handlers use this epoch's model configuration, renderer and parsers.

    vLLM renders a chat to warm up, 0.4 s in which the loop would answer nobody, so this runs in a thread; but a tool
    server's sessions belong to the loop that opened them.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    _keep_from_loading_the_tokenizer_again(survivor)
    initialised = init_app_state(survivor, app.state, args, tuple(tasks))
    await (initialised if args.tool_server else asyncio.to_thread(asyncio.run, initialised))
    short_texts.trust(getattr(app.state, "openai_serving_chat", None))


def _keep_from_loading_the_tokenizer_again(survivor: Any) -> None:
    """Tell vLLM that a model without images and the like has no processor that could bring a chat template.

    To find that out it would load the tokenizer once more and drop it: 0.4 s, most of it with the interpreter locked.
    Where vLLM keeps such answers is its own affair, so where it is not found nothing happens.
    """
    import vllm.renderers.hf as hf_renderer

    config, tokenizer = survivor.model_config, survivor.renderer.tokenizer
    known = getattr(hf_renderer, "_PROCESSOR_CHAT_TEMPLATES", None)
    if known is None or tokenizer is None or config.is_multimodal_model:
        return
    code_revision = config.code_revision if config.tokenizer == config.model else None
    where = (getattr(tokenizer, "name_or_path", ""), config.tokenizer_revision, code_revision, config.trust_remote_code)
    known.setdefault(where, None)
