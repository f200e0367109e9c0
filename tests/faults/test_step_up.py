"""`step_up_after_s` with the real engine: one rung back up when nobody is there, and at once back when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.daemon import ENGINE, Daemon, eventually
from tests.faults.conftest import Fault
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

MakeDaemon = Callable[..., Daemon]
_STEP_UP = {"recovery": {"step_up_after_s": 5}}
_TOO_SMALL = {"engine": {"max_model_len": 8192, "kv_cache_memory_bytes": 128 << 20}}


def _wait_for_trial(daemon: Daemon, watch: Watch) -> None:
    """Wait until the engine of the learned rung has made room for one of the rung above."""
    third: Callable[[dict[str, Any]], bool] = lambda seen: seen["engine_starts"] == 3  # noqa: E731 - with its type
    assert "recovering" == eventually(daemon.status, third, within_s=60, what="a trial")["state"]
    watch.begin()


def _kv_cache_bytes(status: dict[str, Any]) -> int:
    return int(status["engine_arguments"]["arguments"]["kv_cache_memory_bytes"])


def _settled(daemon: Daemon, starts: int) -> dict[str, Any]:
    return eventually(
        daemon.status,
        lambda seen: (seen["engine_starts"], seen["state"]) == (starts, "serving"),
        within_s=60,
        what=f"engine start {starts} to serve",
    )


@pytest.mark.row("S1", "step up when the cause is gone (injected once)")
def test_a_rung_is_taken_back_when_its_cause_is_gone(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """One rung up serves again: it stays there, who asked meanwhile is answered, and the lesson is forgotten."""
    fault.arm("initialize_kv_cache", "oom", times=1)
    serving = daemon(_STEP_UP, environ=fault.environ).wait_ready()
    learned = serving.status()
    assert (2, 1, 1) == (learned["engine_starts"], learned["rung"], fault.made)

    _wait_for_trial(serving, watch)
    answer = serving.chat(max_tokens=1)

    watch.mark("answered")
    assert 200 == answer.status_code, answer.text
    status = _settled(serving, 3)
    assert (0, []) == (status["rung"], status["steps"])
    assert _kv_cache_bytes(learned) < _kv_cache_bytes(status) == ENGINE["kv_cache_memory_bytes"]
    assert 1.0 == serving.metric('llm_serve_engine_starts_total{reason="step_up"}')
    watch.note(serving)
    serving.stop()
    again = serving.start().wait_ready().status()
    assert (1, 0) == (again["engine_starts"], again["rung"])


@pytest.mark.row("S2", "step up when the cause is still there")
def test_a_step_up_that_fails_goes_back_at_once(daemon: MakeDaemon, watch: Watch) -> None:
    """The KV cache is still too small: two starts later the learned plan serves, and who asked meanwhile is answered."""
    serving = daemon(_TOO_SMALL | _STEP_UP).wait_ready()
    learned = serving.status()
    assert (2, 1) == (learned["engine_starts"], learned["rung"])

    _wait_for_trial(serving, watch)
    answer = serving.chat(max_tokens=1)

    watch.mark("answered")
    assert 200 == answer.status_code, answer.text
    status = _settled(serving, 4)
    assert (1, learned["max_model_len"]) == (status["rung"], status["max_model_len"])
    assert "still fails" in serving.log()
    watch.note(serving)
    time.sleep(6)  # longer than step_up_after_s: after a failed trial the next one waits twice as long
    assert 4 == serving.status()["engine_starts"]
