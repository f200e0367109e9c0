"""One request as a client sends it: a streamed answer read to its end, with the times of its first and last token."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llm_serve.core.figures import Sample
from llm_serve.core.workload import Ask

# Below uvicorn's 5 s: a server must not close a connection at the moment in which it is used again.
_KEEP_ALIVE_S = 4.0
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask: an address like http://127.0.0.1:8000, a unix socket instead of its host, and a key."""

    url: str
    socket: str | None = None
    key: str | None = None
    max_queued: int | None = None

    def session(self, timeout_s: float) -> aiohttp.ClientSession:
        """A session without limits of its own: whatever waits shall wait in the server."""
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": _KEEP_ALIVE_S}
        connector: aiohttp.BaseConnector = (
            aiohttp.UnixConnector(self.socket, **options) if self.socket else aiohttp.TCPConnector(**options)
        )
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        return aiohttp.ClientSession(self.url, connector=connector, headers=headers, timeout=timeout)


@dataclass(frozen=True, slots=True)
class Asking:
    """How everything is asked. `thinking` None leaves it to the model's template."""

    model: str
    completions: bool = False
    ignore_eos: bool = True
    thinking: bool | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The route that is asked."""
        return _COMPLETIONS if self.completions else _CHAT

    def body(self, ask: Ask) -> dict[str, Any]:
        """The body of one request."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        if self.completions:
            body["prompt"] = ask.prompt if isinstance(ask.prompt, str) else _plain(ask.prompt)
        else:
            is_text = isinstance(ask.prompt, str)
            body["messages"] = [{"role": "user", "content": ask.prompt}] if is_text else list(ask.prompt)
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body | dict(self.more)


def _plain(messages: tuple[Mapping[str, Any], ...]) -> str:
    return "\n".join(str(message["content"]) for message in messages)


async def ask(session: aiohttp.ClientSession, asking: Asking, what: Ask, *, late_s: float = 0.0) -> Sample:
    """Send one request and read its answer. Whatever goes wrong is a sample, too."""
    answer = _Answer(time.perf_counter())
    kind: str | None
    try:
        async with session.post(asking.path, json=asking.body(what)) as response:
            if response.status == 200:
                kind = await answer.read(response.content)
            else:
                await response.read()
                kind = f"HTTP {response.status}"
    except TimeoutError:
        kind = "time-out"
    except aiohttp.ClientConnectorError as error:
        is_refused = error.os_error.errno in {errno.ECONNREFUSED, errno.ENOENT}
        kind = "refused" if is_refused else f"no connection: {error.os_error.strerror}"
    except (aiohttp.ClientError, ConnectionError):
        kind = "cut"
    return answer.sample(kind, late_s)


class _Answer:
    """What has come of one answer."""

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._first_s: float | None = None
        self._last_s = sent_s
        self._usage: dict[str, Any] = {}

    async def read(self, content: aiohttp.StreamReader) -> str | None:
        """Take in the events to the end. Returns the kind of error, None when it is whole."""
        is_whole = False
        async for event in _events(content):
            # What follows is the end of the body, without which the connection could not be used again.
            if is_whole := event == b"[DONE]":
                continue
            # Between the first token and the end only the time of an event counts: quotes within a JSON string are
            # escaped, so that these keys cannot be part of a text.
            if self._first_s is not None and b'"usage"' not in event and b'"error"' not in event:
                self._last_s = time.perf_counter()
            elif (kind := self._take(event)) is not None:
                return kind
        if not is_whole:
            return "cut"
        return None if self._first_s is not None else "empty answer"

    def _take(self, event: bytes) -> str | None:
        now = time.perf_counter()
        try:
            told = json.loads(event)
        except ValueError:
            return "no JSON in an event"
        if error := told.get("error"):
            code = error.get("code") if isinstance(error, dict) else None
            return f"error event ({code})" if code else "error event"
        if told.get("usage"):
            self._usage = told["usage"]
        if told.get("choices"):
            self._last_s = now
            if self._first_s is None and _has_content(told["choices"][0]):
                self._first_s = now
        return None

    def sample(self, error: str | None, late_s: float) -> Sample:
        """What there is to say of it, now that it has ended."""
        if error is not None:
            return Sample(self._sent_s, time.perf_counter(), error=error, late_s=late_s)
        tokens, asked = self._usage.get("completion_tokens"), self._usage.get("prompt_tokens")
        return Sample(self._sent_s, self._last_s, self._first_s, tokens, asked, late_s=late_s)


def _has_content(choice: Mapping[str, Any]) -> bool:
    """True for a token that a person could read; the first event of a chat may hold a role alone."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls"))


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event, without comments and names."""
    rest = b""
    async for part in content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
