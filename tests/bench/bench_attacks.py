"""What good clients notice while the classes of vLLM's advisories are thrown at one daemon; `--open` opens the edge.

    python -m tests.bench.bench_attacks [--open] [--seconds 25] [--only texts,paths]

Good clients ask for two tokens at a steady rate. Each attack runs twice, in a process of its own: against a server that
answers 400 to everything (control: on a small machine attackers take CPU time from everybody, whomever they attack), and
against the daemon. What good clients notice of the attack itself is the difference. With `--open` there is no control.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import MODEL_NAME, Daemon, Tables
from tests.e2e.test_edge import BEARER, BOMBS, CHAT, HOSTILE, KEY, PLAIN, _asking, _fuzz

RATE = 5.0
WORDS = "the quick brown fox jumps over the lazy dog and then some "
HEAD = f"host: llm.example\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
OPENED: Tables = {
    "server": {
        "header_timeout_s": 3600, "body_timeout_s": 3600, "write_timeout_s": 3600, "max_connections": 1_000_000,
        "max_connections_per_client": 1_000_000, "max_body_bytes": 1 << 30,
    },
    "limits": {
        "max_choices": 16_384, "max_prompts": 10**9, "max_messages": 10**9, "max_tools": 10**9, "max_tools_bytes": 1 << 30,
        "max_schema_bytes": 1 << 30, "max_pattern_chars": 10**9, "max_label_chars": 10**9, "max_token_ids": 10**9,
        "max_nesting": 200, "max_values": 10**9, "max_prompt_chars": 10**9,
        "allow": [
            "logits_processors", "prompt_logprobs", "structured_outputs.grammar", "structured_outputs.regex", "vllm_xargs"
        ],
    },
    "engine": {
        "trust_request_chat_template": True, "trust_request_mm_kwargs": True, "enable_prompt_embeds": True,
        "max_logprobs": -1, "allowed_media_domains": ["127.0.0.1", "localhost"], "allowed_local_media_path": "/etc",
    },
}  # fmt: skip


def _text(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


def _constrained(**what: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", CHAT | {"structured_outputs": what}


def _schema(bomb: Any) -> tuple[str, dict[str, Any]]:
    kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": bomb}}
    return "/v1/chat/completions", CHAT | {"response_format": kind}


REQUESTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "texts": [
        ("/tokenize", {"model": MODEL_NAME, "prompt": _text(8 << 20)}),
        ("/v1/completions", PLAIN | {"prompt": [_text(30_000)] * 1000}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": _text(2 << 20)}]}),
    ],
    "parameters": list(HOSTILE.values()),
    "huge n": [
        ("/v1/completions", PLAIN | {"n": 16_384}),
        ("/v1/completions", PLAIN | {"n": 1_000_000}),
        ("/v1/completions", PLAIN | {"prompt": ["a"] * 50_000}),
    ],
    "small schemas": [  # no attack: they are served, as most of the next ones are, and take their part of the engine
        _schema({"type": "integer"}),
        _schema({"type": "object", "properties": {"name": {"type": "string"}}}),
    ],
    "schemas": [
        *map(_schema, BOMBS.values()),
        _schema({"properties": {f"p{n}": {"type": "string"} for n in range(3000)}}),
    ],
    "regex, grammars": [
        *(_constrained(regex=bomb["pattern"]) for bomb in BOMBS.values() if "pattern" in bomb),
        _constrained(grammar="root ::= root root"),
        _constrained(grammar="root ::= " + " ".join(f'("a" | "b{n}")*' for n in range(3000))),
    ],
    "templates": [
        ("/v1/chat/completions", CHAT | {"chat_template": "{% for a in range(99999999) %}x{% endfor %}"}),
        ("/v1/chat/completions", CHAT | {"chat_template": "{{ 'x' * 999999999 }}"}),
        ("/tokenize", {"model": MODEL_NAME, "messages": CHAT["messages"], "chat_template": "{{ [0] * 99999999 }}"}),
    ],
    "addresses": [
        ("/v1/chat/completions", _asking({"type": "image_url", "image_url": {"url": url}}))
        for url in ("http://127.0.0.1:9/a.png", "http://10.255.255.1/a.png", "file:///etc/passwd")
    ],
    "logprobs": [
        ("/v1/completions", PLAIN | {"prompt": _text(8000), "prompt_logprobs": -1}),
        ("/v1/completions", PLAIN | {"prompt": _text(8000), "echo": True, "logprobs": 1000}),
    ],
}
"""Attacks that are requests. The others are connections, below."""


# ---- attackers, in a process of their own -----------------------------------------------------------
async def _ask_for_ever(port: int, requests: list[tuple[str, dict[str, Any]]], seen: Counter[int]) -> None:
    """One attacker: one request after another, each given up after five seconds."""
    bodies = [(path, json.dumps(body).encode()) for path, body in requests]
    random.Random(id(seen)).shuffle(bodies)
    headers = BEARER | {"content-type": "application/json", "host": "llm.example"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5, trust_env=False) as client:
        for path, body in itertools.cycle(bodies):
            status = 0
            with contextlib.suppress(httpx.TransportError):
                status = (await client.post(path, content=body, headers=headers)).status_code
            seen[status] += 1
            await asyncio.sleep(0.02)


async def _paths(port: int, seen: Counter[int]) -> None:
    for seed in itertools.count():
        seen.update(each[-1] for each in await _fuzz(port, 200, seed))


async def _connect_and(words: bytes, number: int, port: int, seen: Counter[int]) -> None:
    """Keep so many connections that have said so much, and open a new one for each that is closed."""

    async def one() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(words)
                head = await reader.read(12)
                seen[int(head[9:12] or 0)] += 1
                await reader.read()
                writer.close()
            except (OSError, ValueError):
                seen[0] += 1
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(number)))


def _half_body() -> bytes:
    return f'POST /v1/completions HTTP/1.1\r\n{HEAD}content-length: 500\r\n\r\n{{"model": '.encode()


async def _slow_readers(port: int, seen: Counter[int]) -> None:
    """Ask for much, and read nothing of it."""
    body = json.dumps({"model": MODEL_NAME, "prompt": _text(200_000)}).encode()
    words = f"POST /tokenize HTTP/1.1\r\n{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body
    kept = []
    for _ in range(40):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        kept.append((reader, writer))
        writer.write(words)
        seen[0] += 1
        await asyncio.sleep(0.5)
    await asyncio.Event().wait()


CONNECTIONS: dict[str, Callable[[int, Counter[int]], Awaitable[None]]] = {
    "paths": lambda port, seen: _gather(_paths(port, seen) for _ in range(4)),
    "half requests": lambda port, seen: _gather(
        _connect_and(words, 150, port, seen) for words in (b"GET /v1/mod", _half_body(), b"")
    ),
    "connections": lambda port, seen: _connect_and(
        b"GET /livez HTTP/1.1\r\nhost: llm.example\r\n\r\n", 1500, port, seen
    ),
    "slow readers": _slow_readers,
}


async def _gather(work: Iterator[Awaitable[None]]) -> None:
    await asyncio.gather(*work)


async def attack(name: str, port: int, seconds: float) -> None:
    """Attack for so long, print what was answered, and end this process with whatever still goes on in it."""
    seen: Counter[int] = Counter()
    work = CONNECTIONS.get(name) or (
        lambda port, seen: _gather(_ask_for_ever(port, REQUESTS[name], seen) for _ in "12")
    )
    await asyncio.wait({asyncio.ensure_future(work(port, seen))}, timeout=seconds)
    print(json.dumps(seen), flush=True)
    os._exit(0)


async def refuse_everything(port: int) -> None:
    """The control's server: reads requests, and answers 400."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                while length > 0 and (piece := await reader.read(min(length, 1 << 16))):
                    length -= len(piece)
                writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}")
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


# ---- good clients -----------------------------------------------------------------------------------
@dataclass
class Seen:
    """What good clients got, and how long /livez took meanwhile."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    livez_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        bad = {status: number for status, number in self.statuses.items() if status != 200}
        livez = f"{_share(self.livez_s, 0.99) * 1e3:5.0f} {max(self.livez_s) * 1e3:6.0f}"
        answers = (
            f"{len(self.seconds):4} {_share(self.seconds, 0.5) * 1e3:6.0f} {_share(self.seconds, 0.99) * 1e3:6.0f}"
        )
        return f"{answers}   {livez}   {bad or ''}"


def _share(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def good_clients(url: str, seconds: float) -> Seen:
    """Ask at a steady rate, whatever has become of the requests before."""
    seen = Seen()

    async def ask(client: httpx.AsyncClient) -> None:
        began, status = time.monotonic(), 0
        with contextlib.suppress(httpx.TransportError):
            status = (await client.post("/v1/chat/completions", json=CHAT)).status_code
        seen.statuses[status] += 1
        seen.seconds.append(time.monotonic() - began)

    async def probe(client: httpx.AsyncClient) -> None:
        while True:
            began = time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                await client.get("/livez")
            seen.livez_s.append(time.monotonic() - began)
            await asyncio.sleep(0.02)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, headers=BEARER, limits=limits) as client:
        probing, asking = asyncio.create_task(probe(client)), []
        began = time.monotonic()
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(began + number / RATE - time.monotonic())
            asking.append(asyncio.create_task(ask(client)))
        await asyncio.wait(asking)
        probing.cancel()
    return seen


# ---- the whole --------------------------------------------------------------------------------------
def _tables(folder: Path, *, is_open: bool) -> Tables:
    keys = folder / "tiny.keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    guarded: Tables = {
        "server": {"api_keys": str(keys), "anthropic_messages": True, "header_timeout_s": 5, "body_timeout_s": 8},
        "limits": {},
        "engine": {"override_generation_config.max_new_tokens": 32},
    }
    opened = OPENED if is_open else {}
    return {name: dict(table) | dict(opened.get(name, {})) for name, table in guarded.items()}


@contextlib.contextmanager
def _program(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.bench_attacks", *words]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as program:
        try:
            yield program
        finally:
            program.kill()


def _measured(daemon: Daemon, name: str, port: int, seconds: float) -> tuple[Seen, str]:
    with _program("--attack", name, "--port", str(port), "--seconds", str(seconds + 1)) as attackers:
        time.sleep(1.0)
        seen = asyncio.run(good_clients(daemon.url, seconds))
        told, _ = attackers.communicate(timeout=60)
    return seen, told.strip()


def _run(daemon: Daemon, names: list[str], seconds: float, control: int) -> None:
    daemon.wait_ready()
    daemon.http.headers.update(BEARER)
    asyncio.run(good_clients(daemon.url, 3))
    print(f"{'':28}   n    P50    P99   livez P99  max   not 200   (ms)")
    print(f"{'nobody else':28} {asyncio.run(good_clients(daemon.url, seconds))}", flush=True)
    for name in names:
        if control:
            print(f"{name + ', elsewhere':28} {_measured(daemon, name, control, seconds)[0]}", flush=True)
        starts = daemon.status()["engine_starts"]
        seen, told = _measured(daemon, name, daemon.port, seconds)
        began = time.monotonic()
        daemon.wait_ready(300)
        after = f"ready again after {time.monotonic() - began:.0f} s; " if time.monotonic() - began > 1 else ""
        deaths = daemon.status()["engine_starts"] - starts
        print(f"{name:28} {seen}   {after}deaths: {deaths}; attackers were told {told}", flush=True)


def main() -> None:
    """Print two lines for each attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open", action="store_true", help="open every limit that can be opened")
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--only", default="", help="attacks whose names begin with one of these")
    parser.add_argument("--attack")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    if asked.attack:
        asyncio.run(attack(asked.attack, asked.port, asked.seconds))
    elif asked.control:
        asyncio.run(refuse_everything(asked.port))
    else:
        names = [name for name in (*CONNECTIONS, *REQUESTS) if any(map(name.startswith, asked.only.split(",")))]
        with tempfile.TemporaryDirectory() as folder:
            tables = _tables(Path(folder), is_open=asked.open)
            daemon = Daemon(ensure_demo_model(default_cache(os.environ), print), tables, is_apart=True)
            control = daemon.port + 1 if daemon.port < 65_535 else daemon.port - 1
            try:
                with _program("--control", "--port", str(control)):
                    _run(daemon.start(), names, asked.seconds, 0 if asked.open else control)
            finally:
                daemon.destroy()


if __name__ == "__main__":
    main()
