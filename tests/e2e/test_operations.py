"""What operators and machines see over an instance's life: loading, serving, recovering, draining, gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.daemon import MODEL_NAME, Daemon, eventually
from tests.patience import patient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

MakeDaemon = Callable[..., Daemon]


def assert_unavailable(answer: httpx.Response, phrase: str) -> None:
    """503 with a time to come back and OpenAI's form of an error."""
    assert 503 == answer.status_code, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert "engine_unavailable" == answer.json()["error"]["code"]
    assert phrase in answer.json()["error"]["message"]


def assert_nothing_left(daemon: Daemon) -> None:
    """No process, no shared memory, no file of a daemon that has ended."""
    # Python's resource tracker ends by itself, a moment after the last process that used it.
    eventually(daemon.processes, lambda left: left == [], within_s=3, what="no process left")
    assert [] == daemon.new_shared_memory()
    assert [] == daemon.temporary_files()


def kill_engine(daemon: Daemon, which: int = 0) -> None:
    """SIGKILL one of the engine's processes, as the kernel's OOM killer does."""
    os.kill(daemon.status()["engine_pids"][which], signal.SIGKILL)


# ---- while the model loads --------------------------------------------------------------------------


def test_operations_answer_while_the_model_loads(daemon: MakeDaemon) -> None:
    """From the start: alive, not ready and why, status, metrics, and the names of the models."""
    loading = daemon().wait_for_answers()

    alive, ready, health = (loading.http.get(path) for path in ("/livez", "/readyz", "/health"))
    models = loading.http.get("/v1/models")
    status = eventually(loading.status, lambda seen: seen["state"] == "starting", within_s=10, what="a start")

    assert 200 == alive.status_code
    assert (503, 503) == (ready.status_code, health.status_code)
    assert ready.json()["state"] in {"waiting_for_host", "starting"}
    assert ready.json()["phase"]
    assert 0 <= ready.json()["progress"] < 1
    assert int(ready.headers["retry-after"]) > 0
    assert [MODEL_NAME] == [model["id"] for model in models.json()["data"]]
    assert loading.pid == status["pid"]
    assert 1.0 == loading.metric('llm_serve_state{state="starting"}')
    assert 0.0 == loading.metric('llm_serve_state{state="serving"}')


def test_a_request_sent_while_the_model_loads_is_answered(daemon: MakeDaemon) -> None:
    """A client that comes too early waits, and gets its answer instead of an error."""
    loading = daemon().wait_for_answers()

    asked = loading.later(loading.chat)
    eventually(lambda: loading.status()["requests_held"], lambda held: held == 1, within_s=10, what="requests_held")

    assert loading.status()["state"] in {"waiting_for_host", "starting"}
    assert 200 == asked.result().status_code
    assert 0 == loading.status()["requests_held"]
    assert 1.0 == loading.metric('llm_serve_requests_total{outcome="completed"}')


def test_one_more_than_max_queued_is_refused_at_once(daemon: MakeDaemon) -> None:
    """A full queue answers 503 within milliseconds, and the one who waits goes on waiting."""
    loading = daemon({"server": {"max_queued": 1}}).wait_for_answers()
    first = loading.later(loading.chat)
    eventually(lambda: loading.status()["requests_held"], lambda held: held == 1, within_s=10, what="requests_held")

    refused = [loading.chat() for _ in range(5)]

    for answer in refused:
        assert_unavailable(answer, "server.max_queued")
    assert 0.05 > min(answer.elapsed.total_seconds() for answer in refused)
    assert not first.is_done
    assert 1 == loading.status()["requests_held"]
    assert 5.0 == loading.metric('llm_serve_requests_total{outcome="rejected"}')


def test_a_wait_ends_with_hold_timeout(daemon: MakeDaemon) -> None:
    """A request waits for hold_timeout_s and no longer."""
    loading = daemon({"server": {"hold_timeout_s": 1}}).wait_for_answers()

    began = time.monotonic()
    answer = loading.chat()

    assert_unavailable(answer, "server.hold_timeout_s")
    assert 1 <= time.monotonic() - began < patient(5)


def test_a_client_that_leaves_does_not_wait_on(daemon: MakeDaemon) -> None:
    """Who hangs up while waiting gives its place in the queue back."""
    loading = daemon({"server": {"max_queued": 1}}).wait_for_answers()

    with httpx.Client(base_url=loading.url, timeout=1, trust_env=False) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "x"})

    eventually(lambda: loading.status()["requests_held"], lambda held: held == 0, within_s=5, what="requests_held")
    assert 1.0 == loading.metric('llm_serve_requests_total{outcome="aborted"}')
    assert 0.0 == loading.metric("llm_serve_requests_held")


@pytest.mark.parametrize("after_s", [0, 6], ids=["at once", "with an engine coming up"])
def test_a_stop_while_the_model_loads_is_clean(daemon: MakeDaemon, after_s: float) -> None:
    """SIGTERM during a start: whoever waits is told so, the status is 0, and nothing is left."""
    loading = daemon().wait_for_answers()
    waiting = loading.later(loading.chat)
    eventually(lambda: loading.status()["requests_held"], lambda held: held == 1, within_s=10, what="requests_held")
    time.sleep(after_s)  # the start itself is what has to be interrupted
    assert loading.status()["state"] in {"waiting_for_host", "starting"}

    loading.stop()

    assert_unavailable(waiting.result(5), "stopping")
    assert_nothing_left(loading)


# ---- when the engine dies ---------------------------------------------------------------------------


def test_a_request_that_was_there_at_two_kills_is_answered(shared: Daemon) -> None:
    """Somebody's SIGKILL is held against no request, however often it meets the same one."""
    outcomes = [f'llm_serve_requests_total{{outcome="{outcome}"}}' for outcome in ("replayed", "poisoned")]
    first, (replayed, poisoned) = shared.status()["epoch"], map(shared.metric, outcomes)
    prompt = "one two three " * 600  # long in prefill, so that there is no output yet
    asked = shared.later(lambda: shared.chat(prompt, max_tokens=1))
    for epoch in (first + 1, first + 2):
        kill_engine(shared)
        eventually(
            shared.status,
            lambda seen, epoch=epoch: seen["epoch"] == epoch and seen["state"] == "serving",  # type: ignore[misc]
            within_s=60,
            what=f"engine {epoch}",
        )
    assert 200 == asked.result(60).status_code
    assert [replayed + 1, poisoned] == [*map(shared.metric, outcomes)]


@pytest.mark.parametrize("which", [0, -1], ids=["core", "worker"])
def test_an_idle_engine_that_is_killed_is_replaced(shared: Daemon, which: int) -> None:
    """The next request waits for the next engine and is answered; the daemon stays the same process."""
    before = shared.status()
    kill_engine(shared, which)

    answer = shared.chat()

    after = shared.status()
    assert 200 == answer.status_code, answer.text
    assert "serving" == after["state"]
    assert before["pid"] == after["pid"]
    assert before["epoch"] + 1 == after["epoch"]
    assert set() == set(before["engine_pids"]) & set(after["engine_pids"])
    assert after["last_failure"].startswith(("killed:", "crashed:"))


def test_the_kernel_shares_the_cpu_between_daemon_and_engine_as_between_equals(shared: Daemon) -> None:
    """A session of its own is a scheduling group of its own, in which an engine that spins starves the daemon; a process
    group of its own is what keeps a terminal's Ctrl-C from it."""
    pids = shared.status()["engine_pids"]

    assert len(pids) > 1
    assert {os.getsid(shared.pid)} == {os.getsid(pid) for pid in pids}
    assert os.getpgid(shared.pid) not in {os.getpgid(pid) for pid in pids}


def test_streams_of_an_engine_that_is_killed_go_on(shared: Daemon) -> None:
    """All end as if nothing had happened, each with the same text; meanwhile the HTTP server says what it does."""
    before = shared.status()
    resumed = shared.metric('llm_serve_requests_total{outcome="resumed"}')
    with shared.stream(120) as first, shared.stream(120) as second, shared.stream(120) as third:
        streams = (first, second, third)
        for stream in streams:
            stream.wait_for_tokens(3)
        kill_engine(shared)
        eventually(
            lambda: shared.http.get("/readyz"), lambda seen: seen.status_code == 503, within_s=5, what="recovering"
        )
        assert 200 == shared.http.get("/livez").status_code
        assert 200 == shared.http.get("/v1/models").status_code

        for stream in streams:
            stream.wait(60)
            assert ([], ["length"], "[DONE]") == (stream.errors, stream.finish_reasons, stream.end)
        texts = {"".join(event["choices"][0]["text"] for event in stream.events) for stream in streams}
        assert 1 == len(texts)

    after = shared.status()
    assert ("serving", before["pid"], before["epoch"] + 1) == (after["state"], after["pid"], after["epoch"])
    assert resumed + 3 == shared.metric('llm_serve_requests_total{outcome="resumed"}')


def test_a_request_without_output_yet_is_replayed(shared: Daemon) -> None:
    """An answer that is not streamed has delivered nothing when its engine dies: the client never knows."""
    replayed = shared.metric('llm_serve_requests_total{outcome="replayed"}')
    body = {"model": MODEL_NAME, "prompt": "One, two,", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    asked = shared.later(lambda: shared.http.post("/v1/completions", json=body))
    running = "vllm:num_requests_running"
    eventually(
        lambda: [line for line in shared.http.get("/metrics").text.splitlines() if line.startswith(running)],
        lambda lines: any(line.endswith(" 1.0") for line in lines),
        within_s=30,
        what=running,
    )
    kill_engine(shared)

    answer = asked.result()

    assert 200 == answer.status_code, answer.text
    assert 200 == answer.json()["usage"]["completion_tokens"]
    assert "length" == answer.json()["choices"][0]["finish_reason"]
    assert replayed + 1 == shared.metric('llm_serve_requests_total{outcome="replayed"}')


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_stops_for_a_client_that_has_gone(shared: Daemon, path: str, *, stream: bool) -> None:
    """Nobody would read what it goes on computing, streamed or not."""
    running = f'vllm:num_requests_running{{engine="0",model_name="{MODEL_NAME}"}}'
    aborted = shared.metric('llm_serve_requests_total{outcome="aborted"}')
    what = {"prompt": "One, two,"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {"model": MODEL_NAME, "max_tokens": 1900, "ignore_eos": True, "stream": stream, **what}

    with (
        httpx.Client(base_url=shared.url, timeout=1.5, trust_env=False) as impatient,
        contextlib.suppress(httpx.ReadTimeout),
        impatient.stream("POST", path, json=body) as answer,
    ):
        next(answer.iter_lines())
        eventually(lambda: shared.metric(running), lambda count: count == 1, within_s=10, what=running)

    eventually(lambda: shared.metric(running), lambda count: count == 0, within_s=2, what=running)
    assert aborted + 1 == shared.metric('llm_serve_requests_total{outcome="aborted"}')


def test_the_engines_own_counters_do_not_go_backwards(shared: Daemon) -> None:
    """A counter of vLLM's that shrank when the engine was replaced would look like a burst to Prometheus."""
    series = f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL_NAME}"}}'
    assert 200 == shared.chat(max_tokens=20, ignore_eos=True).status_code
    before = eventually(lambda: shared.metric(series), lambda seen: seen >= 20, within_s=10, what=series)
    kill_engine(shared)

    assert 200 == shared.chat(max_tokens=1).status_code

    assert before < eventually(lambda: shared.metric(series), lambda seen: seen > 0, within_s=10, what=series)


# ---- the end ----------------------------------------------------------------------------------------


def test_a_request_that_goes_on_is_counted_as_one(shared: Daemon) -> None:
    """Its prompt is read twice and counted once; what it generates counts as without the kill, but for a few tokens that
    died with the engine."""
    tokens = 60

    def counted(*, with_kill: bool) -> tuple[float, float, float]:
        before = _counts(shared)
        with shared.stream(tokens) as stream:
            stream.wait_for_tokens(10)
            if with_kill:
                kill_engine(shared)
            stream.wait(60)
        eventually(lambda: _counts(shared)[0], lambda ended: ended > before[0], within_s=5, what="request_success")
        ended, prompt, generated = (now - then for now, then in zip(_counts(shared), before, strict=True))
        return ended, prompt, generated

    undisturbed, killed = counted(with_kill=False), counted(with_kill=True)

    assert (1.0, tokens) == (undisturbed[0], undisturbed[2])
    assert undisturbed[:2] == killed[:2]
    assert tokens <= killed[2] <= tokens + 5


def _counts(daemon: Daemon) -> tuple[float, ...]:
    """vLLM's own: requests that ended with "length", prompt tokens, generated tokens."""
    model = f'{{engine="0",model_name="{MODEL_NAME}"}}'
    ended = f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{MODEL_NAME}"}}'
    names = (ended, f"vllm:prompt_tokens_total{model}", f"vllm:generation_tokens_total{model}")
    return tuple(daemon.metric(name) for name in names)


def test_a_stop_lets_a_stream_finish(daemon: MakeDaemon) -> None:
    """SIGTERM: what runs is finished, what comes is refused with a time to come back, and nothing is left."""
    serving = daemon().wait_ready()
    with serving.stream(150) as stream:
        stream.wait_for_tokens(3)

        serving.signal(signal.SIGTERM)
        draining = serving.wait_until(lambda seen: seen.status_code == 503, within_s=5)
        refused = serving.chat()

        assert "draining" == draining.json()["state"]
        assert_unavailable(refused, "stopping")
        stream.wait()
        assert [] == stream.errors
        assert ["length"] == stream.finish_reasons
        assert "[DONE]" == stream.end
    assert 0 == serving.wait_for_exit()
    assert_nothing_left(serving)


def test_a_second_stop_cuts_streams_with_an_error(daemon: MakeDaemon) -> None:
    """SIGTERM twice: the stream ends at once, with an error and not as if it were complete."""
    serving = daemon().wait_ready()
    with serving.stream(1900) as stream:
        stream.wait_for_tokens(3)
        serving.signal(signal.SIGTERM)
        serving.wait_until(lambda seen: seen.status_code == 503, within_s=5)
        serving.signal(signal.SIGTERM)

        stream.wait(10)

        assert 1 == len(stream.errors), stream.events[-2:]
        assert [] == stream.finish_reasons
    assert 0 == serving.wait_for_exit(20)
    assert_nothing_left(serving)


def test_a_drain_ends_with_its_timeout(daemon: MakeDaemon) -> None:
    """After drain_timeout_s a stream that is not done is cut with an error."""
    serving = daemon({"server": {"drain_timeout_s": 2}}).wait_ready()
    with serving.stream(1900) as stream:
        stream.wait_for_tokens(3)
        began = time.monotonic()
        serving.signal(signal.SIGTERM)

        stream.wait(15)

        assert 2 <= time.monotonic() - began < patient(12)
        assert 1 == len(stream.errors), stream.events[-2:]
    assert 0 == serving.wait_for_exit(20)
    assert "drain deadline passed" in serving.log()


def test_no_process_survives_a_killed_daemon(daemon: MakeDaemon) -> None:
    """SIGKILL of the daemon takes its engine with it within two seconds, and its successor starts in the same place."""
    killed = daemon().wait_ready()
    assert 3 <= len(killed.processes())

    killed.signal(signal.SIGKILL)

    assert -signal.SIGKILL == killed.wait_for_exit(2)
    eventually(killed.processes, lambda left: left == [], within_s=2, what="processes left")
    assert [] == killed.new_shared_memory()
    killed.start().wait_for_answers().stop()
    assert_nothing_left(killed)


def test_it_serves_as_the_first_process_of_a_container(daemon: MakeDaemon) -> None:
    """There its pid is 1, and so is the parent's of its fork server: no sign that a parent has gone."""
    if os.geteuid():
        pytest.skip("only root may make a namespace for processes")
    inside = daemon(wrapped_in=("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")).wait_ready()

    assert 200 == inside.chat().status_code
    assert (1, 1) == (inside.status()["pid"], inside.status()["engine_starts"])
    (first,) = psutil.Process(inside.pid).children()
    first.terminate()
    assert 0 == inside.wait_for_exit()
    assert_nothing_left(inside)
