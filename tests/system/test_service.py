"""The unit on a booted systemd, with the real model. A killed daemon: test_recovery.py; boots: test_reboot.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(300)]
UNIT = "llm-serve@demo"
_MARKER = "Zanzibarquux"
_START_LIMIT_S = 240


@pytest.fixture
def served(box: Machine) -> Machine:
    """The machine with the service up."""
    box.run("systemctl", "reset-failed", UNIT, check=False)
    box.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    return box


def _ask(box: Machine, prompt: str, tokens: int = 12) -> str:
    body = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": tokens}
    body["messages"] = [{"role": "user", "content": prompt}]
    url = "http://127.0.0.1:8000/v1/chat/completions"
    done = box.run(
        "curl", "-sS", "--max-time", "100", url, "-H", "content-type: application/json", "-d", json.dumps(body)
    )
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def _pids(box: Machine) -> set[str]:
    """Every process of the service's user."""
    return set(box.run("ps", "-u", "llm-serve", "-o", "pid=", check=False).stdout.split())


def test_start_returns_when_the_model_answers(served: Machine) -> None:
    """`systemctl start` has waited for the first real token, so the very next request is served."""
    assert "Paris" in _ask(served, "What is the capital of France?")


def test_status_says_what_the_service_does(served: Machine) -> None:
    """`systemctl status` shows the state, the model and the requests."""
    served.wait_until(lambda: "serving" in served.show(UNIT, "StatusText"), 10, "a STATUS line")
    shown = served.run("systemctl", "status", "--no-pager", UNIT).stdout
    assert 'Status: "serving' in shown


def test_status_command_reaches_the_service(served: Machine) -> None:
    """`llm-serve status` works for root without a key."""
    answer = json.loads(served.run("llm-serve", "status", "demo", "--json").stdout)
    assert ("serving", "demo") == (answer["state"], answer["instance"])


def test_another_user_is_told_that_the_service_is_not_his(served: Machine) -> None:
    """Not asked is he either: the socket is root's and the service user's."""
    as_nobody = ("runuser", "-u", "nobody", "--", "llm-serve", "status")
    one, everyone = served.run(*as_nobody, "demo", check=False), served.run(*as_nobody, check=False)
    as_service = served.run("runuser", "-u", "llm-serve", "--", "llm-serve", "status", "demo")

    assert 75 == one.returncode
    assert "llm-serve: demo is another user's: ask as root (sudo), or as the user that it runs as.\n" == one.stderr
    assert "demo      not shown" in everyone.stdout
    assert "demo: serving" in as_service.stdout


def test_journal_has_fields_and_no_prompt(served: Machine) -> None:
    """Events carry INSTANCE, STATE and a priority, vLLM's children are named, and prompts are not there."""
    _ask(served, f"Say {_MARKER}", tokens=4)
    entries = served.wait_until(
        lambda: [e for e in served.journal(UNIT) if e.get("REQUEST_ID")] and served.journal(UNIT),
        10,
        "a request's entry",
    )
    ours = [entry for entry in entries if entry.get("INSTANCE") == "demo"]
    assert {"serving"} <= {entry.get("STATE") for entry in ours}
    assert {"llm-serve"} == {entry["SYSLOG_IDENTIFIER"] for entry in ours}
    assert {"6", "4"} <= {entry["PRIORITY"] for entry in ours}
    processes = {entry.get("VLLM_PROCESS") for entry in ours}
    assert "EngineCore" in processes
    assert any(str(name).startswith("Worker") for name in processes)
    assert _MARKER not in json.dumps(entries)


def test_the_engine_is_locked_down(served: Machine) -> None:
    """Not even root's rights would help a process of the service: no privilege, no device, no file, no network, no dump."""
    status = json.loads(served.run("llm-serve", "status", "demo", "--json").stdout)
    assert "closed but for this machine's loopback" == status["engine_network"]
    for pid in (status["pid"], *status["engine_pids"]):
        shown = dict(line.split(":", 1) for line in served.run("cat", f"/proc/{pid}/status").stdout.splitlines())
        rights = {shown[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert ({"0000000000000000"}, "1", "2") == (rights, shown["NoNewPrivs"].strip(), shown["Seccomp"].strip())
        assert "Max core file size        0 " in served.run("cat", f"/proc/{pid}/limits").stdout
    inside = ("nsenter", "-t", str(status["pid"]), "-m")
    assert "Read-only file system" in served.run(*inside, "touch", "/usr/x", "/etc/x", check=False).stderr
    # Whether the kernel keeps to it cannot be seen in here: a container of control groups v1 has no say over devices.
    assert "closed" == served.show(UNIT, "DevicePolicy")
    # The clock is ProtectClock's own exception, for reading.
    assert ["char-rtc r", "char-nvidia* rw"] == served.show(UNIT, "DeviceAllow").splitlines()


def test_a_killed_engine_comes_back_under_the_lock(served: Machine) -> None:
    """All that recovery does is allowed: the same daemon serves with its second engine."""
    before = json.loads(served.run("llm-serve", "status", "demo", "--json").stdout)
    served.run("kill", "-9", str(before["engine_pids"][-1]))
    served.wait_until(lambda: "2 start(s)" in served.show(UNIT, "StatusText"), 60, "a second engine")
    assert str(before["pid"]) == served.show(UNIT, "MainPID")
    assert "Paris" in _ask(served, "What is the capital of France?")


def test_caches_are_inside_the_cache_directory(served: Machine) -> None:
    """Nothing of vLLM, torch or the hub is written into a home folder."""
    environment = served.run("sh", "-c", f"tr '\\0' '\\n' < /proc/{served.show(UNIT, 'MainPID')}/environ").stdout
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME"):
        assert f"{name}=/var/cache/llm-serve" in environment
    assert served.run("ls", "/var/cache/llm-serve/demo/vllm").stdout


def test_restart_refuses_no_connection(served: Machine, tmp_path: Path) -> None:
    """A client that connects in a loop is always answered while the service restarts."""
    stop = tmp_path / "stop"
    loop = served.popen(sys.executable, str(Path(__file__).parent / "connect_loop.py"), "127.0.0.1", "8000", str(stop))
    time.sleep(1)
    before = served.show(UNIT, "MainPID")
    served.run("systemctl", "restart", UNIT, timeout=_START_LIMIT_S)
    time.sleep(1)
    stop.touch()
    seen = json.loads(loop.communicate(timeout=90)[0])
    assert before != served.show(UNIT, "MainPID")
    assert {"200"} == set(seen["answers"]), seen
    assert seen["answers"]["200"] > 100


def test_stop_lets_a_stream_finish_and_exits_0(served: Machine) -> None:
    """A stream that is open at SIGTERM ends with its last token; nothing is left of the service afterwards."""
    body = json.dumps(
        {"model": "smollm2-135m-instruct", "prompt": "One", "max_tokens": 60, "ignore_eos": True, "stream": True}
    )
    stream = served.popen(
        "curl", "-sSN", "http://127.0.0.1:8000/v1/completions", "-H", "content-type: application/json", "-d", body
    )
    time.sleep(1)
    served.run("systemctl", "stop", UNIT, timeout=100)
    text = stream.communicate(timeout=30)[0]
    assert '"finish_reason":"length"' in text
    assert "[DONE]" in text
    assert ("success", "0") == (served.show(UNIT, "Result"), served.show(UNIT, "ExecMainStatus"))
    assert not served.run("sh", "-c", "ls /dev/shm | grep -E 'psm_|sem.mp' || true").stdout.strip()
    assert not Path(served.root, "run/llm-serve/demo").exists()


def test_second_sigterm_cuts_a_stream_with_an_error(served: Machine) -> None:
    """Who asks twice is not made to wait: the stream ends at once, with an error event and no finish_reason."""
    body = json.dumps(
        {"model": "smollm2-135m-instruct", "prompt": "One", "max_tokens": 1800, "ignore_eos": True, "stream": True}
    )
    stream = served.popen(
        "curl", "-sSN", "http://127.0.0.1:8000/v1/completions", "-H", "content-type: application/json", "-d", body
    )
    time.sleep(1)
    main = served.show(UNIT, "MainPID")
    served.run("systemctl", "stop", "--no-block", UNIT)
    # Two signals of one kind that arrive together are one.
    served.wait_until(lambda: "draining" in served.show(UNIT, "StatusText"), 20, "the drain")
    served.run("kill", "-TERM", main)
    text = stream.communicate(timeout=30)[0]
    assert '"error"' in text
    assert '"finish_reason":"length"' not in text
    served.wait_until(lambda: served.show(UNIT, "ActiveState") == "inactive", 20, "the end")


@pytest.fixture
def short_start(box: Machine) -> Iterator[Machine]:
    """The unit with far less start time than a model needs."""
    box.run("systemctl", "stop", UNIT, timeout=100)
    box.write(_SHORT, "[Service]\nTimeoutStartSec=6\n")
    box.run("systemctl", "daemon-reload")
    yield box
    (box.root / _SHORT.lstrip("/")).unlink()
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "stop", UNIT, timeout=100)


_SHORT = "/etc/systemd/system/llm-serve@.service.d/short.conf"


def test_a_start_that_makes_progress_gets_the_time_it_needs(short_start: Machine) -> None:
    """With 6 s allowed, a start of some 12 s succeeds, because it says that it is getting on."""
    began = time.monotonic()
    short_start.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
    assert 6 < time.monotonic() - began
    assert "0" == short_start.show(UNIT, "NRestarts")


def test_a_start_that_stands_still_gets_no_more_time(short_start: Machine) -> None:
    """An engine that is frozen while it starts does nothing, so systemd's patience ends."""
    short_start.run("systemctl", "start", "--no-block", UNIT)
    main = short_start.wait_until(lambda: short_start.show(UNIT, "MainPID").removeprefix("0"), 20, "a daemon")
    short_start.wait_until(lambda: "engine's processes" in short_start.show(UNIT, "StatusText"), 60, "an engine start")
    short_start.wait_until(lambda: len(_pids(short_start)) >= 4, 30, "EngineCore")
    frozen = _pids(short_start) - {main}
    short_start.run("kill", "-STOP", *frozen, check=False)  # one that only asked something may have ended
    short_start.wait_until(lambda: short_start.show(UNIT, "MainPID") != main, 90, "systemd to end it")
    said = [str(entry.get("MESSAGE")) for entry in short_start.journal(UNIT)]
    assert any("start operation timed out" in each for each in said), said[-20:]


def test_keys_come_from_a_credential(box: Machine) -> None:
    """A file in the credential store is all that it takes: without its key nobody comes in, and root still asks."""
    box.run("systemctl", "stop", UNIT, timeout=100)
    box.write("/etc/credstore/llm-serve.demo.api-keys", "a-key-for-this-test\n", 0o600)
    try:
        box.run("systemctl", "start", UNIT, timeout=_START_LIMIT_S)
        code = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8000/v1/models")
        assert "401" == box.run(*code).stdout
        assert "200" == box.run(*code, "-H", "Authorization: Bearer a-key-for-this-test").stdout
        assert "serving" in box.run("llm-serve", "status", "demo").stdout
        assert "a-key-for-this-test" not in json.dumps(box.journal(UNIT))
    finally:
        (box.root / "etc/credstore/llm-serve.demo.api-keys").unlink()
        box.run("systemctl", "stop", UNIT, timeout=100)


def test_broken_file_fails_once_with_78_and_the_reason(box: Machine) -> None:
    """A wrong file is not retried, and `systemctl status` says what is wrong with it."""
    box.run("systemctl", "stop", UNIT, timeout=100)
    good = (box.root / "etc/llm-serve/demo.toml").read_text()
    box.write("/etc/llm-serve/demo.toml", good.replace("max_num_seqs", "max_num_sequences"))
    try:
        assert box.run("systemctl", "start", UNIT, check=False, timeout=_START_LIMIT_S).returncode != 0
        box.wait_until(lambda: box.show(UNIT, "ActiveState") == "failed", 30, "failed")
        assert ("78", "0") == (box.show(UNIT, "ExecMainStatus"), box.show(UNIT, "NRestarts"))
        (row,) = json.loads(box.run("llm-serve", "status", "--json").stdout)
        assert ("demo", "failed") == (row["instance"], row["state"])
        assert row["why"].startswith("exit-code, exit status 78: configuration: /etc/llm-serve/demo.toml:")
        assert abs(time.time() - row["since"]) < 60
        shown = box.run("systemctl", "status", "--no-pager", "--lines=50", UNIT, check=False).stdout
        assert "Did you mean max_num_seqs" in shown
    finally:
        box.write("/etc/llm-serve/demo.toml", good)
        box.run("systemctl", "reset-failed", UNIT)
