"""The machine around the engine fails: shared memory, disks, the clock. Needs root, for mounts of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import Daemon, Stream, eventually
from tests.faults.conftest import engine_core
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

MakeDaemon = Callable[..., Daemon]
_TOO_SMALL = {"engine": {"max_model_len": 8192, "kv_cache_memory_bytes": 128 << 20}}
_DAY_S = 86_400
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")


def with_mounts(*commands: str) -> tuple[str, ...]:
    """What a daemon is started in, to see mounts that nobody else sees."""
    return ("unshare", "--mount", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh")


@needs_root
@pytest.mark.row("12", "/dev/shm full")
def test_shared_memory_is_full(daemon: MakeDaemon, watch: Watch) -> None:
    """It is named, with what to do; and as soon as there is room, whoever waits is served."""
    small = with_mounts("mount -t tmpfs -o size=256k tmpfs /dev/shm")
    waiting = daemon(wrapped_in=small).wait_for_answers()
    watch.begin()
    asked = waiting.later(lambda: waiting.chat(max_tokens=1))

    said = eventually(lambda: waiting.status()["last_failure"], bool, within_s=60, what="a failure")

    watch.mark("detected")
    assert "host_limit" in said, said
    assert "/dev/shm" in said
    assert "--shm-size" in said
    in_there = ("nsenter", "-t", str(waiting.pid), "-m")
    subprocess.run([*in_there, "mount", "-o", "remount,size=1g", "/dev/shm"], check=True)
    watch.begin()
    assert 200 == asked.result(60).status_code
    watch.serving(waiting)
    assert 0 == waiting.status()["rung"]


_UNUSABLE = {
    "full": ("mount -t tmpfs -o size=4k tmpfs {0}", "head -c 4096 /dev/zero >{0}/filler", "No space left on device"),
    "read-only": ("mount -t tmpfs tmpfs {0}", "mount -o remount,ro {0}", "Read-only file system"),
}


@needs_root
@pytest.mark.row("26", "state folder unusable")
@pytest.mark.parametrize("how", _UNUSABLE)
def test_a_state_folder_that_takes_nothing(daemon: MakeDaemon, watch: Watch, tmp_path: Path, how: str) -> None:
    """It serves all the same, on the rung that it finds each time anew, and says what is lost."""
    *mounts, reason = (each.format(tmp_path) for each in _UNUSABLE[how])
    serving = daemon(_TOO_SMALL, wrapped_in=with_mounts(*mounts), environ={"STATE_DIRECTORY": str(tmp_path)})

    for _ in range(2):
        serving.wait_ready()
        assert (2, 1) == (serving.status()["engine_starts"], serving.status()["rung"])
        assert f"cannot be written: {reason}" in serving.log()
        assert "What was learned is lost when the daemon ends" in serving.log()
        watch.note(serving)
        serving.stop()
        serving.start()


@pytest.mark.row("26b", "state file cut in the middle")
def test_a_state_file_that_is_cut(daemon: MakeDaemon, watch: Watch, tmp_path: Path) -> None:
    """It is ignored with a word, what was in it is learned anew, and the next life begins with that."""
    serving = daemon(_TOO_SMALL, environ={"STATE_DIRECTORY": str(tmp_path)}).wait_ready()
    learned = serving.status()
    serving.stop()
    file = tmp_path / "learned.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    serving.start().wait_ready()

    assert f"{file} is ignored: it is cut off or damaged" in serving.log()
    assert (2, 1) == (serving.status()["engine_starts"], serving.status()["rung"])
    assert learned["max_model_len"] == serving.status()["max_model_len"]
    watch.note(serving)
    serving.stop()
    assert 1 == serving.start().wait_ready().status()["engine_starts"]


@pytest.mark.skipif(not _FAKETIME.exists(), reason="needs libfaketime (Debian: faketime)")
@pytest.mark.row("28", "wall clock jumps by a day, both ways")
def test_the_wall_clock_jumps(daemon: MakeDaemon, watch: Watch, tmp_path: Path) -> None:
    """A stream goes on over the jump, no time-out fires, and an engine that dies then is replaced as ever."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    serving = daemon(environ=_fake_clock(clock)).wait_ready()
    started = serving.status()["started"]

    for days in (1, -1):
        with serving.stream(200) as stream:
            _jump(serving, stream, clock, started + days * _DAY_S)
            assert ["length"] == stream.wait(60).finish_reasons
        assert (1, "serving") == (serving.status()["engine_starts"], serving.status()["state"])
    watch.figure(**{"restarts": 0, "time-outs": 0})

    clock.write_text("+0")
    watch.begin()
    os.kill(engine_core(serving), signal.SIGKILL)
    asked = serving.later(lambda: serving.chat(max_tokens=1))
    clock.write_text(f"+{_DAY_S}")
    answer = asked.result(60)
    assert 200 == answer.status_code, f"{answer.text}\n{serving.log()[-6000:]}"
    watch.serving(serving)
    assert (2, 0) == (serving.status()["engine_starts"], serving.status()["rung"])


def _fake_clock(file: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(_FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1",
    }


def _jump(daemon: Daemon, stream: Stream, clock: Path, started: float) -> None:
    """Change the daemon's wall clock in the middle of a stream, and see that it has changed."""
    stream.wait_for_tokens(5)
    clock.write_text(f"{'+' if started > daemon.status()['started'] else '-'}{_DAY_S}")
    eventually(lambda: daemon.status()["started"], lambda seen: abs(seen - started) < 60, within_s=10, what="a jump")
    assert stream.end is None, "the stream was to be under way at the jump"
