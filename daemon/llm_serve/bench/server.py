"""The server under test: what a command's URL|NAME means, which model it serves, and what its /metrics say."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp

from llm_serve.bench.client import Server
from llm_serve.core.bottleneck import Observation
from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.scrape import observation

_KEY = "OPENAI_API_KEY"
_TIMEOUT = aiohttp.ClientTimeout(total=10)
"""Of what takes no engine to answer."""
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to ask, not to listen


def find(target: str, environ: Mapping[str, str]) -> Server:
    """The server that URL|NAME means; its key is the environment's, else the first of the instance's. ConfigError."""
    if "://" in target:
        return Server(_checked(target), key=environ.get(_KEY))
    settings, _ = read_instance(target)
    key = environ.get(_KEY) or next(iter(read_api_keys(settings, environ)), None)
    listen, queued = settings.server.listen_on, settings.server.max_queued
    if listen.path is not None:
        return Server("http://localhost", listen.path, key, queued)
    host = _EVERYWHERE.get(listen.host or "", listen.host or "")
    return Server(
        f"http://[{host}]:{listen.port}" if ":" in host else f"http://{host}:{listen.port}", None, key, queued
    )


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_sound = False
    if not is_sound or parts.query or parts.fragment or parts.path.rstrip("/") not in {"", "/v1"}:
        raise ConfigError([Problem(url, None, "", "is not the address of a server", "Give one like http://HOST:PORT")])
    return f"{parts.scheme}://{parts.netloc}"


async def model_of(session: aiohttp.ClientSession, server: Server) -> str:
    """The first model that it serves. Raises HostError when it does not answer, ConfigError when not to us."""
    where = server.socket or server.url
    try:
        async with session.get("/v1/models", timeout=_TIMEOUT) as answer:
            if answer.status in {401, 403}:
                raise ConfigError([Problem(where, None, "", f"wants an API key: set {_KEY} to one that it knows")])
            body = await answer.json(content_type=None) if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise HostError(f"{where} does not answer: {_words(error)}. Does it run?") from error
    try:
        return str(body["data"][0]["id"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        what = f"answers /v1/models with HTTP {answer.status} and no model: is it an OpenAI-compatible server?"
        raise HostError(f"{where} {what}") from None


def _words(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno)
    return str(error) or type(error).__name__


async def observe(session: aiohttp.ClientSession) -> Observation | None:
    """What its /metrics say now, or None."""
    at_s = time.perf_counter()
    try:
        async with session.get("/metrics", timeout=_TIMEOUT) as answer:
            text = await answer.text() if answer.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None
    return observation(text, at_s) if text else None


async def keep_observing(session: aiohttp.ClientSession, every_s: float, seen: list[Observation]) -> None:
    """Observe again and again, at most this often, until cancelled."""
    while True:
        if (now := await observe(session)) is not None:
            seen.append(now)
        await asyncio.sleep(every_s)
