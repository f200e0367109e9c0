"""Recovery on a booted systemd: what is learned outlives daemon and machine, and two levels of restarts add up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(400)]
UNIT = "llm-serve@small"
_START_LIMIT_S = 240
_FILE = "/etc/llm-serve/small.toml"
_TEXT = """
model = "/var/cache/llm-serve/models/SmolLM2-135M-Instruct"
[server]
listen = "127.0.0.1:8001"
drain_timeout_s = 5
[engine]
served_model_name = ["small"]
dtype = "float32"
max_model_len = 4096
max_num_seqs = 4
enforce_eager = true
kv_cache_memory_bytes = {kv_bytes}
[recovery]
floor_max_model_len = {floor}
restart_limit = 4
"""


@pytest.fixture
def small(box: Machine) -> Iterator[Machine]:
    """The machine with an instance whose KV cache is too small for its longest request."""
    box.run("systemctl", "stop", "llm-serve@demo", timeout=100)
    box.write(_FILE, _TEXT.format(kv_bytes=64 << 20, floor=256))
    yield box
    box.run("systemctl", "stop", UNIT, timeout=100)
    box.run("systemctl", "reset-failed", UNIT, check=False)
    box.run("rm", "-rf", _FILE, "/var/lib/llm-serve/small")


def _status(box: Machine) -> dict[str, object]:
    answer: dict[str, object] = json.loads(box.run("llm-serve", "status", "small", "--json").stdout)
    return answer


def test_what_was_learned_outlives_a_power_cut(small: Machine) -> None:
    """Two engine starts the first time, one after the power cut, on the same rung; `reset` makes it forget."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    first = _status(small)
    assert (2, 1) == (first["engine_starts"], first["rung"])

    small.power_cut()
    small.boot()
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)

    second = _status(small)
    assert (1, 1) == (second["engine_starts"], second["rung"])
    assert first["max_model_len"] == second["max_model_len"]

    small.run("llm-serve", "reset", "small")
    small.run("systemctl", "restart", UNIT, timeout=_START_LIMIT_S)
    assert 2 == _status(small)["engine_starts"]


def test_a_killed_daemon_begins_with_what_was_learned(small: Machine) -> None:
    """Whatever ends the daemon, the kernel's OOM killer for one, systemd starts it and it starts one engine."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    main = small.show(UNIT, "MainPID")

    small.run("kill", "-9", main)

    small.wait_until(lambda: small.show(UNIT, "MainPID") not in {"0", main}, 60, "a new daemon")
    small.wait_until(lambda: small.show(UNIT, "SubState") == "running", _START_LIMIT_S, "READY")
    assert (1, 1) == (_status(small)["engine_starts"], _status(small)["rung"])


def test_what_never_fits_ends_failed_after_the_stated_number_of_starts(small: Machine) -> None:
    """Exit 70 with the story, three times by systemd, and then the unit stays failed."""
    small.write(_FILE, _TEXT.format(kv_bytes=64 << 20, floor=4096))

    small.run("systemctl", "start", UNIT, check=False, timeout=_START_LIMIT_S)

    small.wait_until(lambda: small.show(UNIT, "ActiveState") == "failed", 300, "the unit to be failed")
    entries = [str(entry.get("MESSAGE")) for entry in small.journal(UNIT)]
    assert "70" == small.show(UNIT, "ExecMainStatus")
    assert 3 == sum("starting -> failed" in each or "recovering -> failed" in each for each in entries)
    assert any("systemd = 12" in each for each in entries), "the product of both limits is printed"
    last = [entry for entry in small.journal(UNIT) if str(entry.get("MESSAGE")).startswith("exit ")][-1]
    assert "kv_cache_too_small" in str(last["WHY"])
    assert "floor_max_model_len" in str(last["WHY"])


def test_a_stop_with_an_endless_stream_ends_at_the_deadline(small: Machine) -> None:
    """The stream is cut with an error event after drain_timeout_s, long before systemd would kill."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    body = {"model": "small", "prompt": "One", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    stream = small.popen(
        "curl", "-sSN", "http://127.0.0.1:8001/v1/completions", "-H", "content-type: application/json",
        "-d", json.dumps(body),
    )  # fmt: skip
    time.sleep(1)

    began = time.monotonic()
    small.run("systemctl", "stop", UNIT, timeout=100)

    text = stream.communicate(timeout=30)[0]
    assert '"error"' in text
    assert '"finish_reason":"length"' not in text
    assert 4 < time.monotonic() - began < 20
    assert "success" == small.show(UNIT, "Result")


def test_a_journal_that_does_not_read_does_not_stop_the_loop(small: Machine) -> None:
    """With journald frozen, requests are answered and the loop goes on: at most log entries are late."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    journald = small.show("systemd-journald", "MainPID")
    small.run("kill", "-STOP", journald)
    try:
        slowest = 0.0
        for _ in range(150):
            done = small.run(
                "curl", "-s", "-o", "/dev/null", "-w", "%{http_code} %{time_total}", "--max-time", "20",
                "http://127.0.0.1:8001/v1/nothing", check=False,
            )  # fmt: skip
            code, seconds = done.stdout.split()
            assert "404" == code
            slowest = max(slowest, float(seconds))
    finally:
        small.run("kill", "-CONT", journald)
    assert slowest < 1.0
