"""`systemctl reload` on a booted systemd, with the real model."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(400)]
UNIT = "llm-serve@demo"
_FILE = "/etc/llm-serve/demo.toml"
_SHORT = "/etc/systemd/system/llm-serve@.service.d/short-reload.conf"
_LIMIT_S = 240
_HURRY_S, _DRAIN_S = 30, 32
"""Enough for the check, which nobody extends; not for the drain after it."""


@pytest.fixture
def hurried(box: Machine) -> Iterator[Machine]:
    """The machine with the service up and long answers, which a reload waits for, for longer than systemd gives it."""
    box.write(_SHORT, f"[Service]\nTimeoutStartSec={_HURRY_S}\n")
    box.run("systemctl", "daemon-reload")
    long = ("[server]", f"[server]\ndrain_timeout_s = {_DRAIN_S}"), ("max_model_len = 2048", "max_model_len = 8192")
    with _up(box, *long):
        yield box
    (box.root / _SHORT.lstrip("/")).unlink()
    box.run("systemctl", "daemon-reload")


@pytest.fixture(scope="module")
def served(box: Machine) -> Iterator[Machine]:
    """The machine with the service up: leave its file to be what is served."""
    with _up(box):
        yield box


@contextlib.contextmanager
def _up(box: Machine, *changes: tuple[str, str]) -> Iterator[None]:
    good = (box.root / _FILE.lstrip("/")).read_text()
    for old, new in changes:
        _rewrite(box, old, new)
    box.run("systemctl", "reset-failed", UNIT, check=False)
    box.run("systemctl", "start", UNIT, timeout=_LIMIT_S)
    yield
    box.write(_FILE, good)
    box.run("systemctl", "stop", UNIT, timeout=100)


def _rewrite(box: Machine, old: str, new: str) -> None:
    text = (box.root / _FILE.lstrip("/")).read_text()
    assert old in text
    box.write(_FILE, text.replace(old, new))


def _status(box: Machine) -> dict[str, object]:
    answer: dict[str, object] = json.loads(box.run("llm-serve", "status", "demo", "--json").stdout)
    return answer


@contextlib.contextmanager
def _spoiled(box: Machine, old: str, new: str) -> Iterator[None]:
    good = (box.root / _FILE.lstrip("/")).read_text()
    _rewrite(box, old, new)
    try:
        yield
    finally:
        box.write(_FILE, good)


def _starts(box: Machine) -> int:
    return int(str(_status(box)["engine_starts"]))


def _states(box: Machine, stop: threading.Event, seen: list[str]) -> None:
    """Write down the state until told to stop, and then once more."""
    is_last = False
    while not is_last:
        is_last = stop.is_set()
        seen.append(box.show(UNIT, "ActiveState"))
        time.sleep(0.2)


def test_a_reload_that_gets_on_has_the_time_that_it_needs(hurried: Machine) -> None:
    """With less time than it takes, a reload succeeds, because the daemon says that it is getting on."""
    body = {"model": "smollm2-135m-instruct", "prompt": "One", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    url, form = "http://127.0.0.1:8000/v1/completions", "content-type: application/json"
    with hurried.popen("curl", "-sSN", url, "-H", form, "-d", json.dumps(body)) as stream:
        assert stream.stdout is not None
        assert stream.stdout.readline().startswith("data: ")
        _rewrite(hurried, "max_num_seqs = 16", "max_num_seqs = 8")
        began = time.monotonic()

        hurried.run("systemctl", "reload", UNIT, timeout=_LIMIT_S)

        took_s = time.monotonic() - began
        status = _status(hurried)
        stream.terminate()
        text = stream.stdout.read()
    assert _HURRY_S < took_s
    assert ("serving", 8, 1) == tuple(status[name] for name in ("state", "max_num_seqs", "requests_in_flight"))
    assert '"error"' not in text


def test_reload_returns_when_the_changed_file_is_served(served: Machine, tmp_path: Path) -> None:
    """Nobody who connects meanwhile is refused, the unit is `reloading` for as long and `active` after, with one pid."""
    end, stop, seen = tmp_path / "end", threading.Event(), list[str]()
    loop = served.popen(sys.executable, str(Path(__file__).parent / "connect_loop.py"), "127.0.0.1", "8000", str(end))
    watch = threading.Thread(target=_states, args=(served, stop, seen), daemon=True)
    watch.start()
    served.wait_until(lambda: seen, 60, "the state before")
    before, starts = served.show(UNIT, "MainPID"), _starts(served)
    _rewrite(served, "max_num_seqs = 16", "max_num_seqs = 8")

    served.run("systemctl", "reload", UNIT, timeout=_LIMIT_S)

    after = _status(served)
    stop.set()
    watch.join()
    end.touch()
    answers = json.loads(loop.communicate(timeout=90)[0])["answers"]
    assert ("serving", 8, starts + 1) == (after["state"], after["max_num_seqs"], after["engine_starts"])
    assert {"200"} == set(answers)
    assert ["active", "reloading", "active"] == [each for n, each in enumerate(seen) if n == 0 or seen[n - 1] != each]
    assert (before, "active") == (served.show(UNIT, "MainPID"), served.show(UNIT, "ActiveState"))


def test_reload_of_a_wrong_file_fails_with_the_reason(served: Machine) -> None:
    """`systemctl reload` says that it failed, the journal why, and the unit is active with the engine it had."""
    starts = _starts(served)
    with _spoiled(served, "max_num_seqs", "max_num_sequences"):
        done = served.run("systemctl", "reload", UNIT, check=False, timeout=_LIMIT_S)

    assert 0 != done.returncode
    assert "active" == served.show(UNIT, "ActiveState")
    assert ("serving", starts) == (_status(served)["state"], _starts(served))
    assert any("Did you mean max_num_seqs" in str(entry.get("MESSAGE")) for entry in served.journal(UNIT))


def test_reload_to_a_plan_that_does_not_start_ends_active(served: Machine) -> None:
    """The failure is the reload's: the unit is active, the old plan serves in the same process, STATUS says why."""
    before = served.show(UNIT, "MainPID")
    with _spoiled(served, "kv_cache_memory_bytes = 536870912", "kv_cache_memory_bytes = 4194304"):
        done = served.run("systemctl", "reload", UNIT, check=False, timeout=_LIMIT_S)

    assert 0 != done.returncode
    assert (before, "active") == (served.show(UNIT, "MainPID"), served.show(UNIT, "ActiveState"))
    assert "serving" == _status(served)["state"]
    served.wait_until(lambda: "the last reload failed" in served.show(UNIT, "StatusText"), 10, "the reason in STATUS")


def test_a_signal_reloads_too_and_never_leaves_the_unit_reloading(served: Machine) -> None:
    """SIGHUP to the daemon: RELOADING=1 and READY=1 belong together, for a good file as for a bad one."""
    now = f"max_num_seqs = {_status(served)['max_num_seqs']}"
    for old, new in ((now, "max_num_seqs = 4"), ("max_num_seqs = 4", "max_num_sequences = 4")):
        _rewrite(served, old, new)
        before = _outcomes(served)
        served.run("systemctl", "kill", "--kill-whom=main", "--signal=HUP", UNIT)
        served.wait_until(partial(_is_more, served, before), 90, "an outcome")
        served.wait_until(lambda: served.show(UNIT, "ActiveState") == "active", 60, "active")
    _rewrite(served, "max_num_sequences = 4", "max_num_seqs = 4")
    assert ("serving", 4) == (_status(served)["state"], _status(served)["max_num_seqs"])


def _outcomes(box: Machine) -> int:
    """How many reloads have ended since boot, by the journal."""
    return sum("reload: " in str(entry.get("MESSAGE")) for entry in box.journal(UNIT))


def _is_more(box: Machine, before: int) -> bool:
    return _outcomes(box) > before
