"""The snapshot: one line for people in every state, and all of it as JSON for machines."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llm_serve.core.states import State
from llm_serve.core.status import Snapshot

NOW = Snapshot(
    instance="a",
    model="qwen",
    state="serving",
    why="the engine answers",
    since=100.0,
    started=90.0,
    uptime_s=10.0,
    phase="loading weights",
    progress=0.4,
    version="1",
    vllm_version="0.32.0",
    pid=1,
    listen="127.0.0.1:8000",
    source="/etc/llm-serve/a.toml",
    engine_starts=2,
    requests_in_flight=3,
)

LINES = {
    State.waiting_for_host: "waiting_for_host: the engine answers",
    State.starting: "starting: loading weights, 40% (the engine answers)",
    State.serving: "serving qwen on 127.0.0.1:8000: 3 in flight, 2 start(s)",
    State.recovering: "recovering: loading weights, 40% (the engine answers)",
    State.drained: "drained: the engine answers",
    State.reloading: "reloading: loading weights, 40% (the engine answers)",
    State.draining: "draining: the engine answers",
    State.stopped: "stopped: the engine answers",
    State.failed: "failed: the engine answers",
}


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_its_line(state: State) -> None:
    """What systemd and people read says the state and what explains it."""
    assert LINES[state] == dataclasses.replace(NOW, state=state.value).line


def test_a_reload_that_failed_is_in_the_line() -> None:
    """Who looks at `systemctl status` sees that the file is not what is served."""
    line = dataclasses.replace(NOW, state=State.serving.value, reload_failed="engine.dtype is wrong").line

    assert (
        "serving qwen on 127.0.0.1:8000: 3 in flight, 2 start(s); the last reload failed: engine.dtype is wrong" == line
    )


def test_status_has_every_value_by_its_name() -> None:
    """The body of /status is plain JSON with one member for each field."""
    body = json.loads(json.dumps(NOW.to_json()))

    assert {field.name for field in dataclasses.fields(Snapshot)} == set(body)
    assert (None, [], 3) == (body["max_model_len"], body["engine_pids"], body["requests_in_flight"])
