"""A file that changes under a daemon that serves, and admission that is stopped by hand, with the real model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.daemon import MODEL_NAME, Daemon, eventually, http_client
from tests.e2e.conftest import Stage

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(500)]

MakeDaemon = Callable[..., Daemon]
TABLES = {
    "server": {"drain_timeout_s": 1},
    "engine": {"max_model_len": 4096},
    "recovery": {"floor_max_model_len": 2048, "stall_timeout_s": 99},
}
_ENDED_WITHIN_S = 10
_PAUSE_S = 1.5
"""Between two questions. An engine that never pauses can keep both of two cores from everybody else for minutes."""


class Loop:
    """Clients that ask one short question after another, a breath between them, and what they were told."""

    def __init__(self, daemon: Daemon, clients: int = 4) -> None:
        self._url, self._stop = daemon.url, threading.Event()
        self.answers: list[object] = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"model": MODEL_NAME, "prompt": "One", "max_tokens": 4, "temperature": 0}
        with http_client(self._url) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(client.post("/v1/completions", json=body).status_code)
                except httpx.TransportError as error:
                    self.answers.append(repr(error))
                self._stop.wait(_PAUSE_S)

    def end(self) -> list[object]:
        """Let everybody have his answer, and return all of them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        return self.answers


@pytest.fixture
def ready(stage: Stage) -> Daemon:
    """A ready daemon whose file is changed by one test after the other: leave it to say what is served."""
    return stage.reuse(TABLES)


def text_of(events: list[dict[str, list[dict[str, str]]]]) -> str:
    """What a stream's client has read."""
    return "".join(choice["text"] for event in events for choice in event.get("choices", ()))


def test_a_changed_plan_drops_no_request(ready: Daemon) -> None:
    """A stream that outlives the drain time moves to the new engine unbroken, and who asks meanwhile is answered."""
    before, starts = ready.status(), 'llm_serve_engine_starts_total{reason="reload"}'
    ended = [f'llm_serve_requests_total{{outcome="{outcome}"}}' for outcome in _BADLY]
    reloads, badly = ready.metric(starts), [*map(ready.metric, ended)]
    with ready.stream(300) as alone:
        whole = text_of(alone.wait().events)
    others = Loop(ready)
    with ready.stream(300) as stream:
        stream.wait_for_tokens(5)
        ready.rewrite("max_num_seqs = 16", "max_num_seqs = 8")

        done = ready.command("reload")
        stream.wait()

    answers = others.end()
    assert 0 == done.returncode, done.stderr
    assert "applied engine.max_num_seqs with a new engine" in done.stdout
    assert {200} == set(answers)
    assert (["length"], [], "[DONE]") == (stream.finish_reasons, stream.errors, stream.end)
    assert whole == text_of(stream.events)
    status = ready.status()
    assert ("serving", 8, before["engine_starts"] + 1, None) == tuple(
        status[name] for name in ("state", "max_num_seqs", "engine_starts", "reload_failed")
    )
    assert reloads + 1 == ready.metric(starts)
    assert badly == [*map(ready.metric, ended)]


_BADLY = ("interrupted", "rejected", "poisoned", "aborted")


def test_a_plan_that_does_not_start_is_left_for_the_one_that_served(ready: Daemon) -> None:
    """Exit status 70 with the reason, the old plan again in the same process, and requests that only waited."""
    pid, starts, others = ready.pid, ready.status()["engine_starts"], Loop(ready)
    good = ready.rewrite("kv_cache_memory_bytes = 268435456", "kv_cache_memory_bytes = 33554432")

    done = ready.command("reload")
    ready.file.write_text(good)

    assert 70 == done.returncode, done
    assert "does not start" in done.stderr
    assert "kv_cache_too_small" in done.stderr
    assert "serves again" in done.stderr
    assert {200} == set(others.end())
    status = ready.status()
    assert ("serving", pid, starts + 2, 0) == tuple(status[name] for name in ("state", "pid", "engine_starts", "rung"))
    assert 268435456 == status["engine_arguments"]["arguments"]["kv_cache_memory_bytes"]
    assert "kv_cache_too_small" in status["reload_failed"]


def test_what_no_longer_fits_a_smaller_plan_ends_with_the_reason(ready: Daemon) -> None:
    """A stream that is already as long as the new limit ends with "length"; a prompt that is longer gets a 400."""
    body = {"model": MODEL_NAME, "prompt": [100] * 300, "max_tokens": 3700, "ignore_eos": True}
    with ready.stream(4000) as stream:
        stream.wait_for_tokens(130)
        asked = ready.later(lambda: ready.http.post("/v1/completions", json=body))
        eventually(lambda: ready.status()["requests_in_flight"], lambda now: now == 2, within_s=10, what="in flight")
        ready.rewrite("floor_max_model_len = 2048", "floor_max_model_len = 128")
        ready.rewrite("max_model_len = 4096", "max_model_len = 128")

        done = ready.command("reload")
        stream.wait()

    assert 0 == done.returncode, done.stderr
    assert (["length"], [], "[DONE]") == (stream.finish_reasons, stream.errors, stream.end)
    refused = asked.result(30)
    assert 400 == refused.status_code, refused.text
    assert "maximum context length is 128 tokens" in refused.text
    assert "before: 4096" in refused.text


REFUSED = {
    "broken TOML": ("[engine]", "[engine", "tiny.toml:"),
    "an unknown key": ("max_num_seqs", "max_num_sequences", "Did you mean max_num_seqs"),
    "a wrong unit": ("anthropic_messages = true", 'hold_timeout_s = "5m"', "server.hold_timeout_s"),
    "a value that vLLM refuses": ('dtype = "float32"', 'dtype = "float33"', "engine.dtype"),
    "an option of the process": (
        "anthropic_messages = true",
        "anthropic_messages = false",
        "server.anthropic_messages",
    ),
}


@pytest.mark.parametrize(("old", "new", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_refused_changes_nothing(shared: Daemon, old: str, new: str, reason: str) -> None:
    """Exit status 78 with the reason, while the same engine serves on."""
    before, others = shared.status(), Loop(shared, clients=1)
    file = shared.rewrite(old, new)
    try:
        done = shared.command("reload")
    finally:
        shared.file.write_text(file)

    assert 78 == done.returncode
    assert reason in done.stderr
    assert {200} == set(others.end())
    after = shared.status()
    for name in _KEPT:
        assert before[name] == after[name]


_KEPT = ("state", "pid", "epoch", "engine_pids", "engine_arguments")


def test_a_signal_reloads_a_file_too(shared: Daemon) -> None:
    """SIGHUP: a file that is refused is said in the status and changes nothing, until there is a good one."""
    before, failed = shared.status(), lambda: shared.status()["reload_failed"]
    file = shared.rewrite("max_num_seqs", "max_num_sequences")
    try:
        shared.signal(signal.SIGHUP)
        eventually(failed, lambda why: "Did you mean max_num_seqs" in (why or ""), within_s=30, what="reload_failed")
    finally:
        shared.file.write_text(file)
    shared.signal(signal.SIGHUP)
    eventually(failed, lambda why: why is None, within_s=30, what="a good file that counts")

    after = shared.status()
    assert [before[name] for name in _KEPT] == [after[name] for name in _KEPT]


def test_limits_keys_and_recovery_need_no_engine(ready: Daemon) -> None:
    """What is not the engine's counts at once, with the engine as it is; what is no change does nothing."""
    starts = ready.status()["engine_starts"]
    keys = ready.folder / "keys"
    keys.write_text("a-key-of-this-test\n")
    keys.chmod(0o600)
    ready.rewrite("[server]\n", f'[server]\napi_keys = "{keys}"\nmax_queued = 1\n')
    ready.rewrite("stall_timeout_s = 99", "stall_timeout_s = 77")
    text = ready.file.read_text()
    listen = next(line for line in text.splitlines() if line.startswith("listen"))
    ready.file.write_text(text.replace(listen, "").replace("[server]\n", f"[server]\n{listen}\n"))

    done, again = ready.command("reload"), ready.command("reload")

    assert "applied recovery.stall_timeout_s, server.api_keys, server.max_queued without a new engine" in done.stdout
    assert "no option has changed" in again.stdout
    assert (0, 0) == (done.returncode, again.returncode)
    assert 401 == ready.chat().status_code
    assert 200 == ready.chat(headers={"authorization": "Bearer a-key-of-this-test"}).status_code
    ready.http.headers["authorization"] = "Bearer a-key-of-this-test"
    assert starts == ready.status()["engine_starts"]


def test_drain_lets_requests_wait_and_resume_lets_them_in(shared: Daemon) -> None:
    """What is in flight ends, what comes waits, both are said, and both commands may be given twice."""
    ready, starts = shared, shared.status()["engine_starts"]
    with ready.stream(200) as stream:
        stream.wait_for_tokens(3)
        first, second = ready.command("drain"), ready.command("drain", "--wait")
        stream.wait(within_s=5)
    waiting = ready.later(ready.chat)
    eventually(lambda: ready.status()["requests_held"], lambda held: held == 1, within_s=10, what="requests_held")
    unready, is_done, status = ready.http.get("/readyz"), waiting.is_done, ready.status()
    opened, again = ready.command("resume"), ready.command("resume")

    assert (["length"], []) == (stream.finish_reasons, stream.errors)
    assert (0, 0, 0, 0) == tuple(done.returncode for done in (first, second, opened, again))
    assert "stopped: new requests wait." in first.stdout
    assert "already stopped: new requests wait. Nothing is in flight" in second.stdout
    assert (503, "drained") == (unready.status_code, unready.json()["state"])
    assert (False, True, starts) == (is_done, status["is_drained"], status["engine_starts"])
    assert ("open.", "already open.") == (opened.stdout.split("is ")[1].strip(), again.stdout.split("is ")[1].strip())
    assert 200 == waiting.result(within_s=30).status_code
    assert 200 == ready.http.get("/readyz").status_code


def test_a_stop_of_a_drained_instance_lets_its_stream_finish(daemon: MakeDaemon) -> None:
    """SIGTERM after `drain` is a stop like any other: the stream has its end, who waits is refused, status 0."""
    ready = daemon({"server": {"drain_timeout_s": 60}}).wait_ready()
    with ready.stream(100) as stream:
        stream.wait_for_tokens(3)
        assert 0 == ready.command("drain").returncode
        waiting = ready.later(ready.chat)
        eventually(lambda: ready.status()["requests_held"], lambda held: held == 1, within_s=10, what="requests_held")
        ready.stop()
        stream.wait()
    assert ["length"] == stream.finish_reasons
    assert 503 == waiting.result(within_s=1).status_code


MOMENTS = {"requests finish": "finishing requests", "the engine starts": "engine start 2"}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_stop_in_the_middle_of_a_reload_ends_in_time(daemon: MakeDaemon, moment: str) -> None:
    """SIGTERM is obeyed at any point of a reload: status 0 within the drain time and 10 s, and nothing is left."""
    drain_s = 8 if moment.startswith("finishing") else 1
    ready = daemon({"server": {"drain_timeout_s": drain_s}}).wait_ready()
    with ready.stream(500) as stream:
        stream.wait_for_tokens(3)
        ready.rewrite("max_num_seqs = 16", "max_num_seqs = 8")
        ready.signal(signal.SIGHUP)
        eventually(
            lambda: "{phase} {why}".format(**ready.status()),
            lambda seen: moment in seen,
            within_s=60,
            what="the moment",
        )
        began = time.monotonic()
        ready.signal(signal.SIGTERM)
        status = ready.wait_for_exit(drain_s + _ENDED_WITHIN_S)
        took_s = time.monotonic() - began
        stream.wait()

    assert 0 == status, ready.log()[-3000:]
    assert took_s < drain_s + _ENDED_WITHIN_S
    assert stream.finish_reasons == ["length"] or stream.errors
    eventually(ready.processes, lambda left: left == [], within_s=3, what="no process left")
    assert [] == ready.new_shared_memory()
    assert [] == ready.temporary_files()
