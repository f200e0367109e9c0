"""Engines are killed under requests of every kind: each is answered as if nothing had happened, or told what did."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.daemon import MODEL_NAME, Daemon, Later, Stream, eventually
from tests.faults.conftest import Fault
from tests.faults.mixed import CATALOG, Ask, Got
from tests.faults.test_engine import engine_processes
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
TABLES: Mapping[str, Mapping[str, Any]] = {
    "server": {"anthropic_messages": True},
    "engine": {
        "max_num_seqs": 32, "tool_call_parser": "hermes", "enable_auto_tool_choice": True,
        "kv_cache_memory_bytes": 1 << 30,
    },
    "recovery": {"restart_limit": 100},
}  # fmt: skip
FRONT_ENDS = pytest.mark.parametrize("front_ends", [1, 4])
KILLS = int(os.environ.get("LLM_SERVE_KILLS", "3"))
STREAMS = 32


def tables(front_ends: int, base: Mapping[str, Mapping[str, Any]] = TABLES) -> Mapping[str, Mapping[str, Any]]:
    """The same instance with so many front ends."""
    return {**base, "server": {**base.get("server", {}), "front_ends": front_ends}}


def wait_for_all(daemon: Daemon) -> Daemon:
    """Ready, and so are the front ends beside the daemon's own."""
    daemon.wait_ready()

    def are_attached(now: dict[str, Any]) -> bool:
        count = daemon.file.read_text().split("front_ends = ")[1].split()[0]
        all_ = now["front_ends"]
        return count == "1" or (len(all_) == int(count) and all(each["epoch"] == now["epoch"] for each in all_))

    eventually(daemon.status, are_attached, within_s=120, what="front ends")
    return daemon


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Got]:
    """What each request gets when nothing fails; filled by the first test."""
    return {}


def ask_all(daemon: Daemon, undisturbed: dict[str, Got]) -> None:
    """One request after another, once each."""
    for name, ask in CATALOG.items():
        undisturbed[name] = ask(daemon.url)


@pytest.mark.row("2a", "one kill in the middle of each kind of request")
def test_each_kind_goes_on_after_a_kill(
    daemon: Callable[..., Daemon], watch: Watch, undisturbed: dict[str, Got]
) -> None:
    """The same text, reasons, usage and tokens as without the kill, for each kind by itself."""
    serving = daemon(TABLES).wait_ready()
    ask_all(serving, undisturbed)
    wrong: dict[str, Any] = {}
    for name, ask in CATALOG.items():
        asked = serving.later(lambda ask=ask: ask(serving.url))  # type: ignore[misc]
        time.sleep(0.8)
        victim = engine_processes(serving)[0]
        victim.send_signal(signal.SIGKILL)
        try:
            got = asked.result(120)
        except Exception as error:  # noqa: BLE001 - a result like others, to be shown with its name
            got = {"error": repr(error)}
        if got != undisturbed[name]:
            wrong[name] = {"got": got, "undisturbed": undisturbed[name]}
        serving.wait_ready()
    watch.note(serving)
    outcomes = {
        line.split('"')[1]: float(line.split()[-1])
        for line in serving.http.get("/metrics").text.splitlines()
        if line.startswith("llm_serve_requests_total")
    }
    watch.figure(kinds=len(CATALOG), wrong=len(wrong), **{key: value for key, value in outcomes.items() if value})
    assert {} == wrong


@pytest.mark.row("2b", f"{KILLS} kills at random moments, {STREAMS} mixed requests at a time")
@FRONT_ENDS
def test_kills_at_random_moments(
    daemon: Callable[..., Daemon], watch: Watch, undisturbed: dict[str, Got], front_ends: int
) -> None:
    """Every request is answered, and each greedy one as without the kills; none is cut in silence."""
    serving = wait_for_all(daemon(tables(front_ends)))
    if not undisturbed:
        ask_all(serving, undisturbed)
    chance, is_over = random.Random(4), threading.Event()
    ended: Counter[str] = Counter()
    different: dict[str, Any] = {}

    def client(number: int) -> None:
        turn = number
        while not is_over.is_set():
            name, ask = list(CATALOG.items())[turn % len(CATALOG)]
            turn += 1
            ended[_outcome(serving, name, ask, undisturbed, different)] += 1

    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(client, number) for number in range(STREAMS)]
        try:
            gaps = [_kill(serving, chance) for _ in range(KILLS)]
        finally:
            is_over.set()
    for each in clients:
        each.result()

    watch.note(serving)
    watch.figure(kills=KILLS, **dict(ended), longest_gap_s=round(max(gaps), 1))
    assert {"completed"} == set(ended), different


def _outcome(daemon: Daemon, name: str, ask: Ask, undisturbed: dict[str, Got], different: dict[str, Any]) -> str:
    try:
        got = ask(daemon.url)
    except openai.APIError as error:
        different[f"{name}: error"] = repr(error)
        return "error"
    if got != undisturbed[name]:
        different[name] = {"got": got, "undisturbed": undisturbed[name]}
        return "different"
    return "completed"


def _kill(daemon: Daemon, chance: random.Random) -> float:
    """Kill EngineCore or its worker at some moment; the seconds until the engine was back."""
    time.sleep(chance.uniform(1, 6))
    victims: list[psutil.Process] = engine_processes(daemon)
    starts = daemon.status()["engine_starts"]
    began = time.monotonic()
    chance.choice(victims).send_signal(signal.SIGKILL)
    # Another front end than the first may say a moment longer that all is well.
    eventually(lambda: daemon.status()["engine_starts"], lambda now: now > starts, within_s=60, what="the next start")
    daemon.wait_ready()
    return time.monotonic() - began


POISON = 40_000
"""A token of the vocabulary that no other prompt here has. That it kills is injected: no request is known that does."""


POISONED = {"model": MODEL_NAME, "prompt": [1, 2, POISON, 3], "max_tokens": 8}


def _poison(daemon: Daemon) -> httpx.Response:
    return daemon.http.post("/v1/completions", json=POISONED, timeout=200)


def _is_refused(answer: httpx.Response) -> bool:
    return (500, True) == (answer.status_code, "request_kills_engine" in answer.text)


@pytest.mark.row("36", "poison request, alone")
@FRONT_ENDS
def test_a_poison_request_is_refused_and_changes_no_plan(
    daemon: Callable[..., Daemon], watch: Watch, fault: Fault, front_ends: int
) -> None:
    """After two deaths with nobody else in flight it is refused, now and when it comes again; settings are untouched."""
    serving = wait_for_all(daemon(tables(front_ends, {}), environ=fault.environ))
    fault.arm("execute_model", "abort", times=99, token=POISON)

    assert _is_refused(_poison(serving))
    wait_for_all(serving)
    clients: list[httpx.Client] = []
    began = time.monotonic()
    for _ in range(front_ends):  # connections of their own, so each comes in somewhere else
        clients.append(httpx.Client(base_url=serving.url, trust_env=False))
        assert _is_refused(clients[-1].post("/v1/completions", json=POISONED, timeout=200))
    again_s = (time.monotonic() - began) / front_ends
    for client in clients:
        client.close()

    assert 200 == serving.chat().status_code
    watch.note(serving)
    watch.figure(deaths=fault.made, again_ms=round(1000 * again_s))
    assert (2, 0) == (fault.made, serving.status()["rung"])
    assert again_s < 1.0


@pytest.mark.row("36b", "poison request in company")
@FRONT_ENDS
def test_the_company_of_a_poison_request_is_answered(
    daemon: Callable[..., Daemon], watch: Watch, fault: Fault, front_ends: int
) -> None:
    """Who was in flight at two deaths runs alone: the poison is found by that, and everybody else is answered."""
    serving = wait_for_all(daemon(tables(front_ends, {"engine": {"max_num_seqs": 32}}), environ=fault.environ))
    streams = [Stream(serving.url, 150) for _ in range(6)]
    for stream in streams:
        stream.wait_for_tokens(2)
    fault.arm("execute_model", "abort", times=99, token=POISON)
    poison: Later = serving.later(lambda: _poison(serving))
    watch.begin()

    assert _is_refused(poison.result(200))
    for stream in streams:
        stream.wait(200).close()

    serving.wait_ready()
    watch.serving(serving)
    watch.figure(deaths=fault.made)
    assert [["length"]] * 6 == [stream.finish_reasons for stream in streams]
    assert [[]] * 6 == [stream.errors for stream in streams]
    assert 1 == len({"".join(event["choices"][0]["text"] for event in stream.events) for stream in streams})
    assert (3, 0) == (fault.made, serving.status()["rung"])


@pytest.mark.row("2e", "EngineCore killed under embeddings")
def test_embeddings_are_run_again(daemon: Callable[..., Daemon], watch: Watch) -> None:
    """They are delivered whole: one that an engine has taken along is asked of the next, and is as it would have been."""
    serving = daemon({"engine": {"runner": "pooling", "convert": "embed"}}).wait_ready()

    def ask() -> httpx.Response:
        return serving.http.post("/v1/embeddings", json={"model": MODEL_NAME, "input": ["One", "Two"]})

    whole = ask().json()["data"]
    core = engine_processes(serving)[0]
    core.send_signal(signal.SIGSTOP)
    asked = serving.later(ask)
    time.sleep(1)

    core.send_signal(signal.SIGKILL)

    answer = asked.result(120)
    watch.note(serving)
    assert 200 == answer.status_code, answer.text
    assert [each["index"] for each in whole] == [each["index"] for each in answer.json()["data"]]
    for before, after in zip(whole, answer.json()["data"], strict=True):
        assert after["embedding"] == pytest.approx(before["embedding"], abs=1e-5)
    assert 2 == serving.status()["engine_starts"]
    assert 1.0 <= serving.metric('llm_serve_requests_total{outcome="replayed"}')
