"""Recovery on a booted systemd: what is learned outlives daemon and machine, and two levels of restarts add up."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control_group import memory_group
from tests.figures import Watch
from tests.patience import patient
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


@pytest.fixture(scope="module")
def small(box: Machine) -> Iterator[Machine]:
    """The machine with an instance whose KV cache is too small for its longest request; what it learns, it keeps."""
    box.run("systemctl", "stop", "llm-serve@demo", timeout=100)
    box.write(_FILE, _TEXT.format(kv_bytes=64 << 20, floor=256))
    yield box
    box.run("systemctl", "stop", UNIT, timeout=100)
    box.run("systemctl", "reset-failed", UNIT, check=False)
    box.run("rm", "-rf", _FILE, "/var/lib/llm-serve/small")


@pytest.fixture
def learned(small: Machine) -> Machine:
    """The same, serving on the rung that it has learned, with no restart on record."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    small.run("systemctl", "reset-failed", UNIT)
    assert (1, "0") == (_status(small)["rung"], small.show(UNIT, "NRestarts"))
    return small


def _status(box: Machine) -> dict[str, object]:
    answer: dict[str, object] = json.loads(box.run("llm-serve", "status", "small", "--json").stdout)
    return answer


@pytest.mark.row("26c", "power cut")
def test_what_was_learned_outlives_a_power_cut(small: Machine, watch: Watch) -> None:
    """Two engine starts the first time, one after the power cut, on the same rung; `reset` makes it forget."""
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    first = _status(small)
    assert (2, 1) == (first["engine_starts"], first["rung"])

    small.power_cut()
    watch.begin()
    small.boot()
    watch.mark("booted")
    small.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)

    watch.mark("serving")
    second = _status(small)
    watch.figure(starts=second["engine_starts"], rung=second["rung"])
    assert (1, 1) == (second["engine_starts"], second["rung"])
    assert first["max_model_len"] == second["max_model_len"]

    small.run("llm-serve", "reset", "small")
    small.run("systemctl", "restart", UNIT, timeout=_START_LIMIT_S)
    assert 2 == _status(small)["engine_starts"]


@pytest.mark.row("19", "daemon killed under load")
def test_a_killed_daemon_begins_with_what_was_learned(learned: Machine, watch: Watch) -> None:
    """systemd starts it again, nothing of the old one is left, and one engine start on the learned rung is enough."""
    main, old = learned.show(UNIT, "MainPID"), _pids(learned)
    stream = _stream(learned)

    watch.begin()
    learned.run("kill", "-9", main)

    _assert_back_with_what_was_learned(learned, main, old, watch)
    assert "[DONE]" not in stream.communicate(timeout=30)[0]


@pytest.mark.row("11", "daemon killed by the kernel for memory")
def test_the_kernel_kills_the_daemon_for_memory(learned: Machine, watch: Watch, tmp_path: Path) -> None:
    """As for any kill: systemd starts it again, nothing of the old one is left, and the learned rung is used."""
    main, old = learned.show(UNIT, "MainPID"), _pids(learned)
    with memory_group() as group:
        group.add(learned.host_pid(main))
        group.limit(1 << 16)
        large = tmp_path / "request.json"
        large.write_text(json.dumps({"model": "small", "prompt": "word " * 200_000}))

        watch.begin()
        asking = [_post(learned, f"@{large}") for _ in range(4)]  # more than it may take now

        learned.wait_until(lambda: group.kills() >= 1, 20, "the kernel's kill")
        watch.mark("killed")
        _assert_back_with_what_was_learned(learned, main, old, watch)
        for each in asking:
            each.communicate(timeout=60)


def _assert_back_with_what_was_learned(small: Machine, main: str, old: set[str], watch: Watch) -> None:
    restarts = small.wait_until(lambda: int(small.show(UNIT, "NRestarts")), 30, "systemd to notice")
    small.wait_until(lambda: small.show(UNIT, "MainPID") not in {"0", main}, 60, "a new daemon")
    watch.mark("new daemon")
    small.wait_until(lambda: small.show(UNIT, "SubState") == "running", _START_LIMIT_S, "READY")
    watch.mark("serving")
    status = _status(small)
    assert (1, 1, 1) == (restarts, status["engine_starts"], status["rung"])
    assert old
    assert not old & _pids(small)
    watch.figure(starts=status["engine_starts"], rung=status["rung"], orphans=0)


@pytest.mark.row("17", "daemon's loop frozen (SIGSTOP)")
def test_a_frozen_daemon_is_replaced_by_the_watchdog(learned: Machine, watch: Watch) -> None:
    """systemd ends it within WatchdogSec and a little, and the next one begins with what was learned."""
    main, old = learned.show(UNIT, "MainPID"), _pids(learned)
    limit_s = int(learned.show(UNIT, "WatchdogUSec").removesuffix("s"))

    watch.begin()
    learned.run("kill", "-STOP", main)
    learned.wait_until(lambda: _noticed_by_watchdog(learned), 2 * limit_s, "the watchdog")

    watch.mark("detected")
    assert watch.passed_s < limit_s + 5
    _assert_back_with_what_was_learned(learned, main, old, watch)


def _noticed_by_watchdog(small: Machine) -> bool:
    return any("Watchdog timeout" in str(entry.get("MESSAGE")) for entry in small.journal(UNIT))


def _pids(box: Machine) -> set[str]:
    """Every process of the service's user."""
    return set(box.run("ps", "-u", "llm-serve", "-o", "pid=", check=False).stdout.split())


def _stream(small: Machine) -> subprocess.Popen[str]:
    """A client with an answer of a thousand tokens."""
    body = {"model": "small", "prompt": "One", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    stream = _post(small, json.dumps(body))
    time.sleep(1)
    return stream


def _post(small: Machine, body: str) -> subprocess.Popen[str]:
    url = "http://127.0.0.1:8001/v1/completions"
    return small.popen("curl", "-sSN", url, "-H", "content-type: application/json", "-d", body)


@pytest.mark.row("27", "journald frozen, 700 requests")
def test_a_journal_that_does_not_read_does_not_stop_the_loop(learned: Machine, watch: Watch) -> None:
    """With journald frozen, requests are answered and the loop goes on: their log entries are late, and none is lost."""
    logged, journald = _requests_logged(learned), learned.show("systemd-journald", "MainPID")
    learned.run("kill", "-STOP", journald)
    try:
        slowest = _ask_for_another_model(learned, _MORE_THAN_A_SOCKET_TAKES)
    finally:
        learned.run("kill", "-CONT", journald)
    watch.figure(**{"longest answer ms": round(slowest * 1000)})
    assert slowest < patient(1.0)
    learned.wait_until(lambda: _requests_logged(learned) == logged + _MORE_THAN_A_SOCKET_TAKES, 20, "the log entries")


_MORE_THAN_A_SOCKET_TAKES = 700
"""The kernel queues net.unix.max_dgram_qlen entries, 512 on most machines, before a write has to wait."""
_ASK = """curl -s -o /dev/null -w '%{http_code} %{time_total}\\n' --max-time 20 http://127.0.0.1:8001/v1/completions \\
-H 'content-type: application/json' -d '{"model": "another", "prompt": "One"}'"""


def _ask_for_another_model(small: Machine, times: int) -> float:
    """Have requests refused, which are logged as any other. The seconds that the slowest took."""
    done = small.run("sh", "-c", f"for i in $(seq {times}); do {_ASK}; done", check=False, timeout=300)
    answers = [line.split() for line in done.stdout.splitlines()]
    assert ["404"] * times == [code for code, _ in answers]
    return max(float(seconds) for _, seconds in answers)


def _requests_logged(small: Machine) -> int:
    return sum(str(entry.get("MESSAGE")).startswith("request ") for entry in small.journal(UNIT))


@pytest.mark.row("21", "stop with an endless stream, drain 5 s")
def test_a_stop_with_an_endless_stream_ends_at_the_deadline(learned: Machine, watch: Watch) -> None:
    """The stream is cut with an error event after drain_timeout_s, long before systemd would kill."""
    stream = _stream(learned)

    watch.begin()
    learned.run("systemctl", "stop", UNIT, timeout=100)
    stopped_s = watch.passed_s
    watch.mark("stopped")

    text = stream.communicate(timeout=30)[0]
    assert '"error"' in text
    assert '"finish_reason":"length"' not in text
    assert 4 < stopped_s < patient(20)
    assert "success" == learned.show(UNIT, "Result")


def test_what_never_fits_ends_failed_after_the_stated_number_of_starts(small: Machine) -> None:
    """Exit 70 with the story, three times by systemd, and then the unit stays failed."""
    small.run("systemctl", "stop", UNIT, timeout=100)
    small.run("systemctl", "reset-failed", UNIT, check=False)
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
