"""The classes of vLLM's advisories, thrown at one daemon: it refuses them, its engine lives, good clients notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import psutil
import pytest

from llm_serve.engine import openai_routes
from llm_serve.web.assets import ASSETS
from tests.daemon import MODEL_NAME, Daemon, Tables, eventually, http_client
from tests.e2e.conftest import Stage
from tests.patience import patient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

KEY = "edge-key-4c1f"
BEARER = {"authorization": f"Bearer {KEY}"}
PATHS = 5000
LONGEST_ANSWER = 32
HEADER_TIMEOUT_S, BODY_TIMEOUT_S = 4.0, 6.0
MOST_CONNECTIONS = 700
CHAT: dict[str, Any] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PLAIN: dict[str, Any] = {"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 2}


@pytest.fixture(scope="session")
def guarded_tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A server with a key and a name, and short deadlines. What no client asks for itself ends soon."""
    keys = tmp_path_factory.mktemp("edge") / "tiny.keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    server = {
        "api_keys": str(keys), "hosts": ["llm.example"], "anthropic_messages": True, "max_body_bytes": 4 << 20,
        "header_timeout_s": HEADER_TIMEOUT_S, "body_timeout_s": BODY_TIMEOUT_S, "max_connections": MOST_CONNECTIONS,
    }  # fmt: skip
    return {"server": server, "engine": {"override_generation_config.max_new_tokens": LONGEST_ANSWER}}


@pytest.fixture
def guarded(stage: Stage, guarded_tables: Tables) -> Iterator[Daemon]:
    """The daemon, which has to be served by the same engine afterwards as before."""
    daemon = stage.reuse(guarded_tables)
    daemon.http.headers.update(BEARER)
    before = _engine(daemon)
    yield daemon
    daemon.wait_ready(20)
    assert before == _engine(daemon)


def _engine(daemon: Daemon) -> tuple[object, ...]:
    """What a death of the engine, or of anything else, would change."""
    status = daemon.status()
    return status["state"], status["engine_starts"], status["failures"], status["engine_pids"], daemon.pid


class GoodClient:
    """Asks for short answers, one after another, while the others are at work."""

    def __init__(self, daemon: Daemon) -> None:
        self._url, self._stop = daemon.url, threading.Event()
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()

    def _ask(self) -> None:
        with http_client(self._url, headers=BEARER) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                self.statuses[client.post("/v1/chat/completions", json=CHAT).status_code] += 1
                self.seconds.append(time.monotonic() - began)
                self._stop.wait(0.02)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Ask as long as this lasts."""
        thread = threading.Thread(target=self._ask, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)

    def share_s(self, share: float) -> float:
        """The time within which this share of all answers came."""
        assert {200} == set(self.statuses), self.statuses
        return sorted(self.seconds)[int(share * len(self.seconds))]


@contextlib.contextmanager
def unnoticed(daemon: Daemon, what: str) -> Iterator[None]:
    """Good clients get all their answers during this, and about as fast as before.

    Few samples, on a machine that the attackers need too: tests/bench/bench_attacks.py measures the P99.
    """
    quiet, troubled = GoodClient(daemon), GoodClient(daemon)
    with quiet.asking():
        time.sleep(1.5)
    with troubled.asking():
        yield
    for when, clients in (("before", quiet), ("during", troubled)):
        told = f"P50 {clients.share_s(0.5):.3f} s, P99 {clients.share_s(0.99):.3f} s of {len(clients.seconds)}"
        print(f"\n{what}, {when}: {told}")
    assert troubled.share_s(0.5) < 5 * quiet.share_s(0.5) + 1.0, what


# ---- paths and keys ---------------------------------------------------------------------------------

OPEN = {(method, path) for method in ("GET", "HEAD") for path in ("/livez", "/readyz", "/health", *ASSETS)}
WITH_KEY = OPEN | {(method, path) for method in ("GET", "HEAD") for path in ("/status", "/metrics")}
WITH_KEY |= openai_routes.allowed(anthropic_messages=True)
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "FOO")
SEEDS = (
    *sorted({path for _, path in WITH_KEY}),
    *("/", "/docs", "/openapi.json", "/redoc", "/version", "/load", "/sleep", "/wake_up", "/collective_rpc", "/pause"),
    *("/server_info", "/reset_prefix_cache", "/v1/load_lora_adapter", "/update_weights", "/start_profile", "/score"),
    *("/invocations", "/pooling", "/rerank", "/v1/audio/transcriptions", "/scale_elastic_ep", "/abort_requests"),
)
HOSTS = (
    "llm.example",
    "llm.example:80",
    "127.0.0.1",
    "localhost",
    "x/health?",
    "evil.example",
    "llm.example/v1",
    "[::1]",
)


def _mutated(dice: random.Random) -> str:
    """A path that is nearly one of those that there are."""
    path = dice.choice(SEEDS)
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(path) + 1)
        piece = dice.choice(
            ("/", "//", "/./", "/../", "%2e", "%2f", "%00", ";a=b", "%5c", "..;/", "%c0%af", "a", "%20")
        )
        path = dice.choice((
            path[:at] + piece + path[at:],
            path[:at] + path[at + 1 :],
            path.swapcase(),
            "".join(f"%{ord(each):02x}" if dice.random() < 0.3 else each for each in path),
            path + "?" + piece,
            "/" + "".join(dice.choices(string.printable[:62] + "/._-~", k=dice.randrange(1, 40))),
        ))  # fmt: skip
    return "/" + path.lstrip("/") if dice.random() < 0.8 else path or "/"


async def _answer(reader: asyncio.StreamReader, method: str) -> tuple[int, bool]:
    """The status of one answer, and whether the connection stays."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), None)
    if method != "HEAD" and length:
        await reader.readexactly(length)
    stays = b"connection: close" not in head and (length is not None or method == "HEAD")
    return status, stays


async def _fuzz(port: int, number: int, seed: int) -> list[tuple[str, str, str, bool, int]]:
    """Ask for so many paths over one connection, opened again where the server closes it."""
    dice, seen = random.Random(seed), []
    reader = writer = None
    for _ in range(number):
        method, path, host = dice.choice(METHODS), _mutated(dice), dice.choice(HOSTS)
        has_key = dice.random() < 0.5
        key = BEARER["authorization"] if has_key else dice.choice(("", "Bearer", "Bearer x", f"Basic {KEY}"))
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert reader is not None
        head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 2\r\n\r\n[]".encode())
        try:
            status, stays = await asyncio.wait_for(_answer(reader, method), 20)
        except (asyncio.IncompleteReadError, ConnectionError):
            status, stays = 0, False
        seen.append((method, path, host, has_key, status))
        if not stays:
            writer.close()
            reader = writer = None
    if writer is not None:
        writer.close()
    return seen


async def _fuzz_all(port: int) -> list[tuple[str, str, str, bool, int]]:
    parts = await asyncio.gather(*(_fuzz(port, PATHS // 8, seed) for seed in range(8)))
    return [each for part in parts for each in part]


def test_five_thousand_paths_open_nothing(guarded: Daemon) -> None:
    """Only what is on the list answers, with its key, under our name; nobody gets a 5xx, and nobody's time is lost."""
    began = time.monotonic()
    with unnoticed(guarded, "5,000 paths"):
        seen = asyncio.run(_fuzz_all(guarded.port))
    print(
        f"{len(seen)} paths in {time.monotonic() - began:.1f} s: {sorted(Counter(each[-1] for each in seen).items())}"
    )

    wrong = []
    for method, path, host, has_key, status in seen:
        named = host.startswith(("llm.example", "127.0.0.1", "localhost", "[::1]")) and "/" not in host
        listed = (method, unquote(path.partition("?")[0])) in (WITH_KEY if has_key else OPEN)
        if status >= 500 or (status and status < 400 and not (named and listed)):
            wrong.append((method, path, host, has_key, status))
    assert [] == wrong
    assert PATHS == len(seen)
    assert 5 < sum(200 == each[-1] for each in seen)  # else the fuzzer never comes near anything


# ---- parameters -------------------------------------------------------------------------------------


def _deep(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "CVE-2026-34756 n": ("/v1/chat/completions", CHAT | {"n": 1_000_000}),
    "n in text": ("/v1/completions", PLAIN | {"n": "16384"}),
    "n below nothing": ("/v1/completions", PLAIN | {"n": -(2**63)}),
    "best_of": ("/v1/completions", PLAIN | {"best_of": 1_000_000}),
    "beams": ("/v1/completions", PLAIN | {"n": 5000, "use_beam_search": True}),
    "prompts": ("/v1/completions", PLAIN | {"prompt": ["a"] * 100_000}),
    "all prompt logprobs": ("/v1/completions", PLAIN | {"prompt_logprobs": -1}),
    "echoed logprobs": ("/v1/completions", PLAIN | {"echo": True, "logprobs": 20}),
    "all logprobs": ("/v1/completions", PLAIN | {"logprobs": -1}),
    "too many logprobs": ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 10**9}),
    "PYSEC-2026-4350 logprob ids": ("/v1/completions", PLAIN | {"logprobs": 1, "logprob_token_ids": [-1, 10**9]}),
    "max_tokens": ("/v1/completions", PLAIN | {"max_tokens": 10**18}),
    "min_tokens": ("/v1/completions", PLAIN | {"min_tokens": 10**9}),
    "temperature is no number": ("/v1/completions", PLAIN | {"temperature": "nan"}),
    "penalty is no number": ("/v1/completions", PLAIN | {"repetition_penalty": "inf"}),
    "top_p is no number": ("/v1/completions", PLAIN | {"top_p": "NaN"}),
    "bias on no token": ("/v1/completions", PLAIN | {"logit_bias": {"999999999": 1}}),
    "bias is no number": ("/v1/completions", PLAIN | {"logit_bias": {"1": "nan"}}),
    "biases": ("/v1/completions", PLAIN | {"logit_bias": {str(n): 1 for n in range(40_000)}}),
    "allowed tokens": ("/v1/completions", PLAIN | {"allowed_token_ids": list(range(40_000))}),
    "no token allowed": ("/v1/completions", PLAIN | {"allowed_token_ids": [10**9]}),
    "token ids": ("/v1/completions", PLAIN | {"prompt": [10**9]}),
    "token ids below nothing": ("/v1/completions", PLAIN | {"prompt": [-1]}),
    "tokens that are none": ("/detokenize", {"model": MODEL_NAME, "tokens": [2**62]}),
    "a text to count": ("/tokenize", {"model": MODEL_NAME, "prompt": "a b " * 900_000}),
    "a chat to count": ("/tokenize", {"model": MODEL_NAME, "messages": [{"role": "user", "content": "a b " * 900_000}]}),
    "long prompts": ("/v1/completions", PLAIN | {"prompt": ["a b " * 7000] * 120}),
    "stops": ("/v1/completions", PLAIN | {"stop": ["x" * 100_000]}),
    "bad words": ("/v1/completions", PLAIN | {"bad_words": ["x" * 100_000]}),
    "CVE-2025-62164 embeds": ("/v1/completions", {"model": MODEL_NAME, "prompt_embeds": "gASVAAAA", "max_tokens": 1}),
    "transfer": ("/v1/completions", PLAIN | {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.1.1.1"}}),
    "xargs": ("/v1/completions", PLAIN | {"vllm_xargs": {"session_id": "x"}}),
    "CVE-2025-29770 grammar": ("/v1/completions", PLAIN | {"structured_outputs": {"grammar": "root ::= root root"}}),
    "CVE-2026-55574 regex": ("/v1/completions", PLAIN | {"structured_outputs": {"regex": "((a+)+)+$"}}),
    "no grammar": ("/v1/completions", PLAIN | {"structured_outputs": {"json_object": False}}),
    "CVE-2026-105757 schema": (
        "/v1/completions", PLAIN | {"structured_outputs": {"json": '{"type": "object", "properties": {"a": 1}}'}}),
    "schema of no kind": (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}}),
    "CVE-2025-48944 tool": (
        "/v1/chat/completions",
        CHAT | {"tool_choice": "required", "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"properties": {"c": {"pattern": "(", "type": 1}}}}}]}),
    "structural tag": (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": "(a*)*b"}}}),
    "nested schema": (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _deep(80)}}}),
    "CVE-2025-62426 template": ("/v1/chat/completions", CHAT | {"chat_template": "{% for a in range(99999999) %}x{% endfor %}"}),
    "template among the values": ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
    "template for counting": ("/tokenize", {"model": MODEL_NAME, "messages": CHAT["messages"], "chat_template": "{{ 1 }}"}),
    "template of Anthropic's": ("/v1/messages", CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
    "processor": ("/v1/chat/completions", CHAT | {"mm_processor_kwargs": {"a": 1}}),
    "responses without end": ("/v1/responses", {"model": MODEL_NAME, "input": "a", "max_output_tokens": 10**18}),
    "cache salt": ("/v1/completions", PLAIN | {"cache_salt": "x" * 100_000}),
    "priority": ("/v1/completions", PLAIN | {"priority": 2**80}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_parameter_is_refused(guarded: Daemon, case: str) -> None:
    """With 4xx and an error object, at once."""
    path, body = HOSTILE[case]
    began = time.monotonic()
    answer = guarded.http.post(path, json=body)
    seconds = time.monotonic() - began

    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert answer.json()["error"]["message"] if path != "/v1/messages" else answer.json()["error"]
    assert seconds < patient(2)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"model": "x", "prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400),
        (b'{"prompt": [' + b"1," * 1_500_000 + b"1]}", 413),
        (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413),
        (b'{"model": "x", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "x", "prompt": "\\ud800"}', 400),
        (b'{"temperature": 1' + b"0" * 5000 + b"}", 400),
    ],
    ids=["unclosed", "nested", "values", "long", "no text", "half a letter", "a long number"],
)
def test_a_hostile_body_is_refused(guarded: Daemon, content: bytes, status: int) -> None:
    """Before anything of it is built, and without memory that stays."""
    rss = psutil.Process(guarded.pid).memory_info().rss
    for _ in range(5):
        answer = guarded.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert status == answer.status_code, answer.text[:500]
    assert psutil.Process(guarded.pid).memory_info().rss - rss < 64 << 20


@pytest.mark.parametrize(
    "options",
    [{"tokenize": True}, {"messages": []}, {"add_generation_prompt": "x"}, {"return_dict": True}, {"tools": 1},
     {"padding": "max_length", "max_length": 10**9}, {"conversation": "x"}, {"tokenizer_kwargs": {"a": 1}}],
)  # fmt: skip
def test_values_for_the_template_break_nothing(guarded: Daemon, options: dict[str, Any]) -> None:
    """CVE-2025-62426: they may name arguments of the function that renders. It may refuse them, or not care."""
    with unnoticed_briefly():
        answer = guarded.http.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": options})

    assert answer.status_code < 500, answer.text[:500]


@contextlib.contextmanager
def unnoticed_briefly() -> Iterator[None]:
    """What is inside takes no longer than a request does."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < patient(5)


def test_what_users_write_is_no_template(guarded: Daemon) -> None:
    """Braces in a message arrive at the model as braces."""
    words = "{{ 7 * 7 }} {% for a in range(9) %}x{% endfor %} ${7*7} {{ ''.__class__.__mro__ }}"
    asked = {"model": MODEL_NAME, "messages": [{"role": "user", "content": words}]}
    tokens = guarded.http.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
    back = guarded.http.post("/detokenize", json={"model": MODEL_NAME, "tokens": tokens}).raise_for_status().json()

    assert words in back["prompt"]


BOMBS: dict[str, Any] = {
    "repeated": {"type": "string", "pattern": "^((a{1,200}){1,200}){1,200}$"},
    "ambiguous": {"type": "string", "pattern": "^(((a+)+)+)+b$"},
    "many states": {"type": "string", "pattern": "^(a|b)*a(a|b){60}$"},
    "any letter": {"type": "string", "pattern": "^[^c]*a[^c]{200}d$"},
    "alternatives": {"type": "string", "pattern": "(a|aa)" * 170},
    "long": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "wide": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(600)}},
    "choices": {"enum": [f"choice {n}" for n in range(1500)]},
    "items": {"type": "array", "items": _deep(20), "minItems": 10**5, "maxItems": 10**6},
    "itself": {"$ref": "#"},
    "branches": {
        "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 4} for n in range(30)} | {"d30": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
}  # fmt: skip


def test_bombs_in_schemas_hurt_nobody_else(guarded: Daemon) -> None:
    """Those that pass the limits are compiled beside the engine's work; each gets an answer of some kind.

    500 is vLLM's for a grammar that lets it make no token at all: that one request ends, and nothing else.
    """
    statuses = {}
    with unnoticed(guarded, "schema bombs"):
        for name, bomb in BOMBS.items():
            kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": bomb}}
            with contextlib.suppress(httpx.ReadTimeout):  # its own client may wait for ever, and leave
                answer = guarded.http.post("/v1/chat/completions", json=CHAT | {"response_format": kind}, timeout=8)
                statuses[name] = answer.status_code
    print(statuses)
    assert set(statuses.values()) <= {200, 400, 500}
    assert 200 == guarded.http.post("/v1/chat/completions", json=CHAT).status_code


@pytest.mark.parametrize(
    "bomb",
    [{"properties": {f"p{n}": {"type": "string"} for n in range(3000)}}, {"enum": list(map(str, range(10_000)))}],
)
def test_schemas_that_take_the_engine_half_a_minute_are_refused(guarded: Daemon, bomb: dict[str, Any]) -> None:
    """3,000 properties: 60 s of CPU and 1.1 GB of memory that stays, before there was a limit."""
    kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": bomb}}
    forced = {"tools": [{"type": "function", "function": {"name": "f", "parameters": bomb}}], "tool_choice": "required"}

    answers = [
        guarded.http.post("/v1/chat/completions", json=CHAT | more) for more in ({"response_format": kind}, forced)
    ]

    assert [413, 413] == [answer.status_code for answer in answers]


# ---- other machines ---------------------------------------------------------------------------------


class Listener:
    """A server of somebody else's, which counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.callers = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._socket.accept()
                self.callers += 1
                caller.close()

    def close(self) -> None:
        """Count no more."""
        self._socket.close()


def test_no_request_makes_the_server_fetch_anything(guarded: Daemon, tmp_path: Path) -> None:
    """CVE-2026-24779 and its siblings, on each route, however the address is written; no connection is made."""
    listener, secret = Listener(), tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG")
    port = listener.port
    addresses = [
        f"http://127.0.0.1:{port}/a.png", f"HTTP://127.0.0.1:{port}/", f"http://localhost:{port}/", f"http://[::ffff:127.0.0.1]:{port}/",
        f"http://2130706433:{port}/", f"http://user@127.0.0.1:{port}/", f" http://127.0.0.1:{port}/", f"//127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}#@example.com/", f"http:\\\\127.0.0.1:{port}/", secret.as_uri(), "file:///etc/passwd",
    ]  # fmt: skip
    bodies: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
        ("/v1/chat/completions", lambda url: _asking({"type": "image_url", "image_url": {"url": url}})),
        ("/v1/chat/completions", lambda url: _asking({"image_url": url})),
        ("/v1/chat/completions", lambda url: _asking({"type": "video_url", "video_url": {"url": url}})),
        ("/v1/chat/completions", lambda url: _asking({"type": "audio_url", "audio_url": {"url": url}})),
        ("/v1/responses", lambda url: {"model": MODEL_NAME, "input": _asking({"type": "input_image", "image_url": url})["messages"]}),
        ("/v1/messages", lambda url: _asking({"type": "image", "source": {"type": "url", "url": url}})),
        ("/v1/messages/count_tokens", lambda url: _asking({"type": "image", "source": {"type": "url", "url": url}})),
        ("/tokenize", lambda url: _asking({"type": "image_url", "image_url": {"url": url}})),
        ("/v1/embeddings", lambda url: _asking({"type": "image_url", "image_url": {"url": url}})),
    ]  # fmt: skip
    statuses = Counter(
        guarded.http.post(path, json=make(address)).status_code for path, make in bodies for address in addresses
    )
    time.sleep(0.2)
    assert 0 == listener.callers
    assert {400: len(bodies) * len(addresses)} == statuses
    socket.create_connection(("127.0.0.1", port)).close()
    eventually(lambda: listener.callers, lambda seen: seen == 1, within_s=5, what="a caller that there is")
    listener.close()


def _asking(part: dict[str, Any]) -> dict[str, Any]:
    return CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]}


# ---- clients that do not come to the point ----------------------------------------------------------


def _connected(port: int, words: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(words)
    return connection


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_half_requests_take_nobodys_place(guarded: Daemon) -> None:
    """More half bodies than the engine has places, and many half heads: good clients are served, the rest is closed."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: llm.example\r\nauthorization: Bearer {KEY}\r\n"
    half_body = f'{head}content-type: application/json\r\ncontent-length: 500\r\n\r\n{{"model": '.encode()
    with unnoticed(guarded, "half requests"):
        opened = [_connected(guarded.port, b"GET /v1/mod") for _ in range(300)]
        opened += [_connected(guarded.port, half_body) for _ in range(100)]
        opened += [_connected(guarded.port, b"") for _ in range(100)]
        eventually(
            lambda: sum(map(_is_closed, opened)),
            lambda closed: closed == len(opened),
            within_s=BODY_TIMEOUT_S + 10,
            what="half-open connections that were closed",
        )
    for connection in opened:
        connection.close()


def test_one_address_leaves_connections_to_others(guarded: Daemon) -> None:
    """It is told so when it has four fifths of them; another one is served, and so is the first when it lets go."""
    opened: list[socket.socket] = []
    told = b""
    while not told:
        assert len(opened) < MOST_CONNECTIONS
        connection = socket.create_connection(("127.0.0.1", guarded.port), timeout=30, source_address=("127.0.0.2", 0))
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        head = connection.recv(4096)
        opened.append(connection)
        told = head if b" 200 OK" not in head.partition(b"\r\n")[0] else b""

    assert told.startswith(b"HTTP/1.1 503 ")
    with http_client(guarded.url, headers=BEARER) as other:
        assert 200 == other.post("/v1/chat/completions", json=CHAT).status_code
        assert other.get("/status").json()["state"] == "serving"
    for connection in opened:
        connection.close()
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=guarded.url, transport=transport, timeout=60) as again:
        eventually(lambda: again.get("/livez").status_code, lambda code: code == 200, within_s=30, what="its next one")


def test_slow_readers_hold_little_and_nobody_up(guarded: Daemon) -> None:
    """Clients that ask for streams and long answers and read nothing: memory has an end, and others are served."""
    stream = PLAIN | {"stream": True, "logprobs": 20, "max_tokens": LONGEST_ANSWER, "ignore_eos": True}
    tokens = {"model": MODEL_NAME, "prompt": "a b c d e f g h " * 2000}
    slow = []
    process = psutil.Process(guarded.pid)
    with unnoticed(guarded, "slow readers"):
        rss = process.memory_info().rss
        for path, body in [("/v1/completions", stream)] * 4 + [("/tokenize", tokens)] * 4:
            content = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: llm.example\r\nauthorization: Bearer {KEY}\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", guarded.port))
            connection.sendall(head.encode() + content)
            slow.append(connection)
        most = 0
        for _ in range(30):
            time.sleep(0.1)
            most = max(most, process.memory_info().rss - rss)
    print(f"eight slow readers: {most >> 20} MiB more at most")
    assert most < 256 << 20
    for connection in slow:
        connection.close()
    eventually(
        lambda: guarded.status()["requests_in_flight"], lambda left: left == 0, within_s=20, what="requests in flight"
    )


# ---- everything that the document says --------------------------------------------------------------


def document(model: Path) -> dict[str, Any]:
    """The OpenAPI document of what is served, with answers that end soon."""
    from llm_serve.core.plan import EnginePlan
    from llm_serve.engine import arguments
    from llm_serve.engine import openai as mounted

    plan = EnginePlan(model=str(model), arguments={"dtype": "float32"}, env={})
    args = arguments.parse_plan(plan, source="test")
    app = mounted.build_app(args, ("generate",), None, openai_routes.allowed(anthropic_messages=True))
    made: dict[str, Any] = app.openapi()
    for schema in made["components"]["schemas"].values():
        for name in {"max_tokens", "max_output_tokens", "max_completion_tokens"} & schema.get("properties", {}).keys():
            schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 2}
            schema["required"] = [*schema.get("required", ()), name]
    return made


def test_nothing_that_the_document_allows_or_forbids_ends_the_engine(
    guarded: Daemon, model: Path, tmp_path: Path
) -> None:
    """schemathesis makes right and wrong requests of every schema: there is always an answer, and the engine lives."""
    pytest.importorskip("schemathesis")
    file, report = tmp_path / "openapi.json", tmp_path / "report.json"
    file.write_text(json.dumps(document(model)))
    options = [
        *("--url", guarded.url, "--header", f"authorization:{BEARER['authorization']}", "--seed", "1", "--no-shrink"),
        *(
            "--phases",
            "fuzzing",
            "--max-examples",
            "25",
            "--workers",
            "4",
            "--request-timeout",
            "20",
        ),
        *("--checks", "not_a_server_error", "--continue-on-failure", "--suppress-health-check", "all"),
        *("--warnings", "off", "--report", "json", "--report-json-path", str(report), "--no-color"),
    ]
    before = guarded.log().count(" request ")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", str(file)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    asked = guarded.log().count(" request ") - before
    print(f"schemathesis: {asked} requests got past the door\n{done.stdout[-3000:]}")

    assert asked > 50, done.stdout[-3000:] + done.stderr[-2000:]
    assert "Server error" not in done.stdout, done.stdout[-6000:]
