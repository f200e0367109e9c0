"""What every front end puts before the model, made of what the file says: the gate, its limits, the loop it runs in."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from llm_serve.core.company import ALONE, Company
from llm_serve.core.edge import Edge
from llm_serve.core.hosts import Hosts
from llm_serve.core.settings import ServerSettings, Settings
from llm_serve.engine import long_texts, openai_routes
from llm_serve.engine.openai_routes import Route
from llm_serve.web import origins
from llm_serve.web.asgi import Asgi
from llm_serve.web.deadlines import Timeouts
from llm_serve.web.gate import Gate
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits
from llm_serve.web.places import Places


def make_gate(settings: Settings, keys: tuple[str, ...], operations: Asgi, company: Company = ALONE) -> Gate:
    """The gate that these settings ask for."""
    return Gate(
        keys=Keys(keys),
        hosts=_hosts(settings, keys),
        limits=_limits(settings),
        routes=routes(settings),
        operations=operations,
        open_metrics=settings.server.open_metrics,
        company=company,
    )


def entrance(gate: Gate, settings: Settings) -> Asgi:
    """What clients meet: the gate, behind what web pages of other origins have to pass."""
    return origins.around(gate, settings.engine)


def reconfigure(gate: Gate, settings: Settings, keys: tuple[str, ...]) -> None:
    """Have the gate count by these settings from now on."""
    open_metrics, hosts = settings.server.open_metrics, _hosts(settings, keys)
    gate.reconfigure(Keys(keys), _limits(settings), open_metrics=open_metrics, hosts=hosts)


def timeouts(server: ServerSettings) -> Timeouts:
    """How long clients may take."""
    return Timeouts(server.header_timeout_s, server.body_timeout_s, server.write_timeout_s)


def places(server: ServerSettings) -> Places:
    """How many connections each front end may have."""
    return Places.of(server.max_connections, server.max_connections_per_client, server.front_ends)


def routes(settings: Settings) -> frozenset[Route]:
    """What clients may call on the model."""
    return openai_routes.allowed(anthropic_messages=settings.server.anthropic_messages)


def model_names(settings: Settings) -> tuple[str, ...]:
    """The names that vLLM will give the model: a list, or one, or the model itself."""
    names = settings.engine.get("served_model_name") or settings.model
    return (names,) if isinstance(names, str) else tuple(names)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    with contextlib.suppress(ImportError):
        uvloop: Any = importlib.import_module("uvloop")
        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
        return factory
    return None


def _hosts(settings: Settings, keys: tuple[str, ...]) -> Hosts:
    return Hosts.of(settings.server, has_keys=bool(keys))


def _limits(settings: Settings) -> Limits:
    server = settings.server
    long_texts.limit_to(settings.limits.max_prompt_chars)
    return Limits(
        max_queued=server.max_queued,
        hold_timeout_s=server.hold_timeout_s,
        max_body_bytes=server.max_body_bytes,
        stream_keep_alive_s=server.stream_keep_alive_s,
        request_timeout_s=server.request_timeout_s,
        edge=Edge.of(settings.limits, settings.engine, long_texts.longest_prompt),
    )
