"""Several processes that answer HTTP before one engine: whole to whoever asks, and each may die, and the engine too."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.daemon import MODEL_NAME, Daemon, Stream, eventually, http_client
from tests.e2e.conftest import Stage
from tests.patience import patient

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

COUNT = 4
TABLES = {"server": {"front_ends": COUNT, "max_queued": 12}}
REBUILD_S = 180
GIVEN_UP = 1900
"""Tokens of streams that nobody waits for: far longer than it takes to look, however slow the machine."""


def attached(daemon: Daemon, epoch: int | None = None) -> list[dict[str, Any]]:
    """All front ends, waited for until each gives requests to the engine of the moment, or to that of this epoch."""

    def look() -> tuple[int, list[dict[str, Any]]]:
        now = daemon.status()
        return now["epoch"], now["front_ends"]

    def are_all(seen: tuple[int, list[dict[str, Any]]]) -> bool:
        wanted = epoch or seen[0]
        return len(seen[1]) == COUNT and all(each["epoch"] == wanted for each in seen[1])

    return eventually(look, are_all, within_s=REBUILD_S, what="front ends attached")[1]


@contextlib.contextmanager
def streams(daemon: Daemon, count: int, tokens: int) -> Iterator[list[Stream]]:
    """So many streams, all of which have begun; the kernel's order is evened out, so each front end has its share."""
    opened = [Stream(daemon.url, tokens) for _ in range(count)]
    try:
        for stream in opened:
            stream.wait_for_tokens(2)
        yield opened
    finally:
        for stream in opened:
            stream.close()


@pytest.fixture
def crowd(stage: Stage) -> Daemon:
    """A daemon with four front ends, all attached: leave it serving."""
    daemon = stage.reuse(TABLES)
    attached(daemon)
    return daemon


def test_every_one_serves_and_the_instance_is_whole(crowd: Daemon) -> None:
    """Connections are spread, and /status and /metrics are the same wherever they are asked."""
    before = crowd.metric('llm_serve_requests_total{outcome="completed"}')
    tokens = f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL_NAME}"}}'
    tokens_before = crowd.metric(tokens)
    with streams(crowd, 2 * COUNT, 40) as opened:
        for stream in opened:
            stream.wait()
    clients = [http_client(crowd.url) for _ in range(2 * COUNT)]
    with contextlib.ExitStack() as stack:
        asked = [stack.enter_context(client).get("/status").json() for client in clients]
        ready = [client.get("/readyz").status_code for client in clients]
        pages = [client.get("/").headers["etag"] for client in clients]
        histories = [client.get("/status", params={"since": 0}).json()["history"] for client in clients]
        counted = [
            next(line for line in client.get("/metrics").text.splitlines() if line.startswith(tokens))
            for client in clients
        ]

    assert {crowd.pid} == {each["pid"] for each in asked}
    assert {200} == set(ready)
    assert 1 == len(set(pages))
    # Samples are of a second each, so what they say of all is what was generated, but for the last one, and for seconds
    # that were longer on a busy machine. One process's own share would be a quarter.
    told = [
        sum(dict(zip(each["columns"], row, strict=True))["generated_tokens_per_s"] for row in each["samples"])
        for each in histories
    ]
    assert all(2 * COUNT * 40 * 0.5 <= total for total in told), told
    assert 1 == len(set(counted)), counted
    assert before + 2 * COUNT == crowd.metric('llm_serve_requests_total{outcome="completed"}')
    assert tokens_before + 2 * COUNT * 40 == crowd.metric(tokens)


def test_what_is_in_flight_is_told_of_each_and_of_all(crowd: Daemon) -> None:
    """By whoever is asked, a tenth of a second later at the latest; and what is given up is in flight no more."""

    def told() -> tuple[int, list[int], int]:
        now = crowd.status()
        each = [front_end["requests_in_flight"] for front_end in now["front_ends"]]
        return now["requests_in_flight"], each, now["requests_held"]

    with streams(crowd, 2 * COUNT, GIVEN_UP):
        whole = lambda seen: 2 * COUNT == seen[0] == sum(seen[1])  # noqa: E731 - used once
        _, each_one, held = eventually(told, whole, within_s=5, what="all of them")
    eventually(told, (0, [0] * COUNT, 0).__eq__, within_s=20, what="nothing in flight")

    assert (COUNT, 0) == (len(each_one), held)
    assert max(each_one) < 2 * COUNT


def test_nobody_fits_in_twice_and_nobody_is_passed_over(crowd: Daemon) -> None:
    """The batch, its reserve and the queue are those of one gate: what is more is told so."""
    room = 16 + 4
    with contextlib.ExitStack() as stack:
        for _ in range(room):
            stack.enter_context(crowd.stream(GIVEN_UP))
        eventually(crowd.status, lambda now: now["requests_in_flight"] == room, within_s=60, what="all inside")
        # One address gets four fifths of the queue, wherever its requests happen to come in.
        held = [crowd.later(crowd.chat) for _ in range(10)]
        eventually(crowd.status, lambda now: now["requests_held"] == 10, within_s=60, what="the queue")
        refused = [crowd.later(crowd.chat).result() for _ in range(2 * COUNT)]

    assert all((503, True) == (each.status_code, "max_queued" in each.text) for each in refused)
    assert [200] * 10 == [each.result().status_code for each in held]


def test_one_that_dies_is_replaced_and_the_others_do_not_notice(crowd: Daemon) -> None:
    """Its connections are lost, its requests leave the engine, and no count falls."""
    starts = crowd.status()["engine_starts"]
    counted = 'llm_serve_requests_total{outcome="completed"}'
    crowd.chat()
    before = crowd.metric(counted)
    with streams(crowd, 2 * COUNT, 150) as opened:
        victim = attached(crowd)[2]
        kept = 2 * COUNT - victim["requests_in_flight"]
        os.kill(victim["pid"], signal.SIGKILL)
        now = eventually(
            lambda: crowd.status()["front_ends"],
            lambda all_: len(all_) == COUNT and all_[2]["pid"] != victim["pid"],
            within_s=60,
            what="another in its place",
        )
        ends = []
        for stream in opened:
            with contextlib.suppress(httpx.TransportError):
                ends.append(stream.wait().finish_reasons)
    attached(crowd)
    running = f'vllm:num_requests_running{{engine="0",model_name="{MODEL_NAME}"}}'
    eventually(lambda: crowd.metric(running), lambda number: number == 0, within_s=30, what="an empty engine")

    assert 0 < kept < 2 * COUNT
    assert [["length"]] * kept == ends
    assert "what a front end has left in the engine is given up" in crowd.log()
    assert victim["pid"] not in {each["pid"] for each in now}
    assert starts == crowd.status()["engine_starts"]
    assert before + kept <= crowd.metric(counted)
    with streams(crowd, 2 * COUNT, GIVEN_UP):
        assert all(each["requests_in_flight"] for each in crowd.status()["front_ends"])
    with streams(crowd, 2 * COUNT, 60) as opened:
        assert [["length"]] * 2 * COUNT == [stream.wait().finish_reasons for stream in opened]


@pytest.mark.parametrize("victim", ["EngineCore", "fork server"])
def test_streams_at_all_of_them_survive(crowd: Daemon, victim: str) -> None:
    """The engine, or what engines and front ends are forked from, is killed: no front end ends, and no stream."""
    pids = {each["pid"] for each in attached(crowd)}
    now = crowd.status()
    with streams(crowd, 2 * COUNT, 60) as opened:
        core = min(now["engine_pids"])
        killed = core if victim == "EngineCore" else psutil.Process(core).ppid()
        os.kill(killed, signal.SIGKILL)
        ended = [stream.wait(REBUILD_S) for stream in opened]

    attached(crowd, now["epoch"] + 1)
    assert [["length"]] * 2 * COUNT == [stream.finish_reasons for stream in ended]
    assert [[]] * 2 * COUNT == [stream.errors for stream in ended]
    assert 1 == len({"".join(event["choices"][0]["text"] for event in stream.events) for stream in ended})
    assert pids == {each["pid"] for each in crowd.status()["front_ends"]}


def test_orders_reach_all_of_them(crowd: Daemon) -> None:
    """A reload and a stopped admission hold wherever a client has come in."""
    before = crowd.rewrite("max_queued = 12", "max_queued = 1")
    assert 0 == crowd.command("reload").returncode
    assert 0 == crowd.command("drain").returncode
    clients = [http_client(crowd.url) for _ in range(2 * COUNT)]
    try:
        assert {503} == {client.get("/readyz").status_code for client in clients}
        held = crowd.later(lambda: crowd.chat().status_code)
        eventually(crowd.status, lambda now: now["requests_held"] == 1, within_s=20, what="one held")
        body = {"model": MODEL_NAME, "prompt": "Hello", "max_tokens": 2}
        assert {503} == {client.post("/v1/completions", json=body).status_code for client in clients}
        assert 0 == crowd.command("resume").returncode
        assert 200 == held.result()
        eventually(
            lambda: {client.get("/readyz").status_code for client in clients}, {200}.__eq__, within_s=10, what="ready"
        )
    finally:
        for client in clients:
            client.close()
        crowd.file.write_text(before)
        assert 0 == crowd.command("reload").returncode


def test_a_new_engine_for_a_changed_file_serves_all_of_them(crowd: Daemon) -> None:
    """Requests in flight finish on the old engine, wherever they are."""
    epoch = crowd.status()["epoch"]
    crowd.rewrite("max_model_len = 2048", "max_model_len = 1024")
    with streams(crowd, COUNT, 60) as opened:
        assert 0 == crowd.command("reload").returncode
        ended = [stream.wait(REBUILD_S) for stream in opened]
    attached(crowd, epoch + 1)

    assert [["length"]] * COUNT == [stream.finish_reasons for stream in ended]
    assert 0.0 == crowd.metric('llm_serve_requests_total{outcome="interrupted"}')


def test_without_the_daemon_there_is_no_front_end(stage: Stage) -> None:
    """Killed, it takes all of them along, and the port is free for its successor."""
    serving = stage.take(TABLES)
    attached(serving)
    serving.signal(signal.SIGKILL)
    serving.wait_for_exit()
    began = time.monotonic()

    eventually(serving.processes, lambda left: not left, within_s=5, what="the others' end")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{serving.url}/livez", trust_env=False)
    assert time.monotonic() - began < patient(5)


def test_a_stop_lets_all_of_them_finish_and_leaves_nothing(daemon: Callable[..., Daemon]) -> None:
    """Streams at all front ends come to their end, and then there is nothing of any of them."""
    serving = daemon(TABLES).wait_ready()
    attached(serving)
    with streams(serving, 2 * COUNT, 60) as opened:
        serving.signal(signal.SIGTERM)
        ended = [stream.wait() for stream in opened]
    status = serving.wait_for_exit()

    assert [["length"]] * 2 * COUNT == [stream.finish_reasons for stream in ended]
    assert 0 == status
    # Python's resource trackers end by themselves, a moment after the last process that used them.
    eventually(serving.processes, lambda left: left == [], within_s=3, what="no process left")
    assert ([], []) == (serving.new_shared_memory(), serving.temporary_files())
