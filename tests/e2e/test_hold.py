"""Waiting at the gate, with the real engine and the real clients: streams kept alive, errors in streams, fairness."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import psutil
import pytest

from tests.daemon import MODEL_NAME, Daemon, Later, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

PROMPT: Any = {"model": MODEL_NAME, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 12}
CHAT: Any = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Say hello."}]}
KEEP_ALIVE_S = 0.4


@contextlib.contextmanager
def frozen_start(daemon: Daemon) -> Iterator[None]:
    """Keep the engine's start from getting anywhere: what comes now waits, for as long as the test wants.

    Only the fork server and its children are stopped. A child of the daemon that has not reached its exec shares the
    daemon's memory (vfork), and to stop it is to stop the daemon.
    """
    daemon.wait_for_answers()
    children = eventually(lambda: fork_servers(daemon), bool, within_s=60, what="a fork server")
    for each in children:
        each.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for each in children:
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGCONT)


def fork_servers(daemon: Daemon) -> list[psutil.Process]:
    """The daemon's fork server and what has been forked from it."""
    found = []
    for each in psutil.Process(daemon.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(each.cmdline()):
                found.append(each)
    return found


def raw_stream(daemon: Daemon, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text of a streamed answer, comments included."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=180)) as connection:
        connection.request("POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def text_of(stream: str) -> str:
    """The completion that a stream's events add up to."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


def comments(text: str) -> list[str]:
    """The comments of an event stream."""
    return [line for line in text.splitlines() if line.startswith(":")]


def held(daemon: Daemon, number: int) -> None:
    """Wait until so many requests wait."""
    eventually(lambda: daemon.status()["requests_held"], lambda seen: seen == number, within_s=30, what="held")


def test_streams_that_wait_for_an_engine_are_kept_alive(daemon: Callable[..., Daemon]) -> None:
    """Before the first engine: comments on the wire, which OpenAI's and Anthropic's clients never see."""
    fresh = daemon({"server": {"stream_keep_alive_s": KEEP_ALIVE_S, "anthropic_messages": True}})
    with (
        openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="none", max_retries=0, timeout=180) as client,
        anthropic.Anthropic(base_url=fresh.url, api_key="none", max_retries=0, timeout=180) as claude,
        contextlib.ExitStack() as frozen,
    ):
        frozen.enter_context(frozen_start(fresh))
        raw = fresh.later(lambda: raw_stream(fresh, "/v1/completions", PROMPT))
        chat = fresh.later(lambda: list(client.chat.completions.create(**CHAT, max_tokens=8, stream=True)))
        response = fresh.later(
            lambda: list(client.responses.create(model=MODEL_NAME, input="Hi", max_output_tokens=8, stream=True))
        )
        message = fresh.later(lambda: list(claude.messages.create(**CHAT, max_tokens=8, stream=True)))
        plain = fresh.later(lambda: client.completions.create(**PROMPT))
        held(fresh, 5)
        time.sleep(4 * KEEP_ALIVE_S)
        assert not raw.is_done
        frozen.close()

        status, text = raw.result()
        assert 200 == status
        assert len(comments(text)) >= 3
        assert text.endswith("data: [DONE]\n\n")
        assert plain.result().choices[0].text == text_of(text)
        assert chat.result()[-1].choices[0].finish_reason
        assert response.result()[-1].type in ("response.completed", "response.incomplete")
        assert "message_stop" == message.result()[-1].type


def test_an_error_after_the_stream_began_is_one_for_the_clients(daemon: Callable[..., Daemon]) -> None:
    """vLLM's refusal of a held stream, and ours, reach OpenAI's and Anthropic's clients as API errors."""
    fresh = daemon({"server": {"stream_keep_alive_s": KEEP_ALIVE_S, "anthropic_messages": True}})
    long: Any = CHAT | {"messages": [{"role": "user", "content": "again " * 5000}], "stream": True}
    with (
        openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="none", max_retries=0, timeout=180) as client,
        anthropic.Anthropic(base_url=fresh.url, api_key="none", max_retries=0, timeout=180) as claude,
    ):
        with frozen_start(fresh):
            asked: list[Later] = [
                fresh.later(lambda: list(client.chat.completions.create(**long))),
                fresh.later(
                    lambda: list(client.responses.create(model=MODEL_NAME, input="again " * 5000, stream=True))
                ),
                fresh.later(lambda: list(claude.messages.create(**long, max_tokens=8))),
            ]
            held(fresh, 3)
            time.sleep(2 * KEEP_ALIVE_S)
        for each, kind in zip(asked, (openai.APIError, openai.APIError, anthropic.APIStatusError), strict=True):
            with pytest.raises(kind) as caught:
                each.result()
            assert "2048" in str(caught.value)


def test_a_stream_that_waits_too_long_ends_with_an_error(daemon: Callable[..., Daemon]) -> None:
    """hold_timeout_s holds for a stream that has begun, and a request without a stream gets 503 and Retry-After."""
    fresh = daemon({"server": {"stream_keep_alive_s": KEEP_ALIVE_S, "hold_timeout_s": 4 * KEEP_ALIVE_S}})
    with (
        openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        frozen_start(fresh),
    ):
        with pytest.raises(openai.APIError, match=r"server\.hold_timeout_s") as caught:
            list(client.completions.create(**PROMPT, stream=True))
        plain = fresh.http.post("/v1/completions", json=PROMPT)

    assert not isinstance(caught.value, openai.APIStatusError)
    assert 503 == plain.status_code
    assert int(plain.headers["retry-after"]) >= 1


def test_a_stream_is_kept_alive_over_the_death_of_its_engine(daemon: Callable[..., Daemon]) -> None:
    """Asked while the next engine is on its way: comments, then the whole answer; Retry-After knows the first start."""
    fresh = daemon({"server": {"stream_keep_alive_s": KEEP_ALIVE_S, "max_queued": 1}}).wait_ready()
    before = fresh.http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"]
    for pid in fresh.status()["engine_pids"]:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    fresh.wait_until(lambda seen: seen.status_code == 503, within_s=30)

    raw = fresh.later(lambda: raw_stream(fresh, "/v1/completions", PROMPT))
    held(fresh, 1)
    refused = fresh.http.post("/v1/completions", json=PROMPT)
    _, text = raw.result()

    assert 503 == refused.status_code
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert comments(text)
    assert before == text_of(text)


def test_a_crowd_is_served_without_overfilling_the_engine(daemon: Callable[..., Daemon]) -> None:
    """Thirty at once on four slots: all complete, and the scheduler never had more than the batch and its reserve."""
    fresh = daemon({"engine": {"max_num_seqs": 4}}).wait_ready()
    seen: list[float] = []
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(fresh.chat, f"Say {number}.", max_tokens=16) for number in range(30)]
        while not all(each.done() for each in asked):
            load = {name: _vllm(fresh, f"vllm:num_requests_{name}") for name in ("running", "waiting")}
            seen.append(sum(load.values()))
            time.sleep(0.1)

    assert {200} == {each.result().status_code for each in asked}
    assert 4 <= max(seen) <= 6
    assert 0 == fresh.status()["requests_held"]


def _vllm(daemon: Daemon, name: str) -> float:
    lines = daemon.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def test_two_keys_share_the_engine(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Ten of one key's requests wait; one of another key's, asked last, is not the last to be answered."""
    keys = tmp_path / "keys"
    keys.write_text("many-0123456789\nfew-0123456789\n")
    keys.chmod(0o600)
    fresh = daemon({"server": {"api_keys": str(keys)}, "engine": {"max_num_seqs": 1}})
    eventually(lambda: fresh.http.get("/livez").status_code, lambda code: code == 200, within_s=60, what="/livez")
    ended: list[str] = []

    def ask(key: str) -> None:
        headers = {"authorization": f"Bearer {key}-0123456789"}
        assert 200 == fresh.chat(headers=headers, max_tokens=16).status_code
        ended.append(key)

    with ThreadPoolExecutor(11) as pool:
        crowd = [pool.submit(ask, "many") for _ in range(10)]
        time.sleep(1)
        few = pool.submit(ask, "few")
        for each in [*crowd, few]:
            each.result()

    assert ended.index("few") <= 4


def test_a_long_body_is_refused_while_it_is_sent(daemon: Callable[..., Daemon]) -> None:
    """413 reaches the client in the middle of its upload, of known and of unknown length."""
    fresh = daemon({"server": {"max_body_bytes": 100_000}}).wait_for_answers()
    whole = fresh.http.post("/v1/completions", content=b"x" * 3_000_000)
    pieces = fresh.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(3000)))

    assert [413, 413] == [whole.status_code, pieces.status_code]
    assert "request_too_large" == pieces.json()["error"]["code"]
