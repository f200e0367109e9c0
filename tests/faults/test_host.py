"""The machine around the engine fails: shared memory, disks, the clock. Needs root, for mounts of its own."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.daemon import Daemon, eventually
from tests.faults.conftest import engine_core
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

MakeDaemon = Callable[..., Daemon]
_TOO_SMALL = {"engine": {"max_model_len": 8192, "kv_cache_memory_bytes": 128 << 20}}
_DAY_S = 86_400
_WALL_CLOCK = Path(__file__).parent / "inject" / "wall_clock.c"
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


class WallClock:
    """The wall clock of a daemon's processes, which can be set while they run; monotonic clocks stay."""

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "offset", folder / "wall_clock.so"
        self._file.write_bytes(struct.pack("@l", 0))
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, _WALL_CLOCK], check=True)
        self.environ = {"LD_PRELOAD": str(library), "WALL_CLOCK_FILE": str(self._file)}

    def move(self, seconds: int) -> None:
        """From now on it is so far from the true one."""
        with self._file.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("@l", seconds))


@pytest.mark.skipif(not shutil.which("gcc"), reason="setting the clock of a process needs gcc")
@pytest.mark.row("28", "wall clock jumps by a day, both ways")
def test_the_wall_clock_jumps(daemon: MakeDaemon, watch: Watch, tmp_path: Path) -> None:
    """A stream goes on over the jump, no time-out fires, and an engine that dies then is replaced as ever."""
    clock = WallClock(tmp_path)
    serving = daemon(environ=clock.environ).wait_ready()
    started, core = serving.status()["started"], psutil.Process(engine_core(serving))

    for seconds in (_DAY_S, -_DAY_S):
        with serving.stream(200) as stream:
            stream.wait_for_tokens(5)
            core.suspend()  # a pause between two steps, which for a wall clock is a day
            clock.move(seconds)
            time.sleep(2)
            core.resume()
            assert abs(serving.status()["started"] - started - seconds) < 60, "the daemon's clock was to jump"
            assert stream.end is None, "the stream was to be under way at the jump"
            assert ["length"] == stream.wait(60).finish_reasons
        assert (1, "serving") == (serving.status()["engine_starts"], serving.status()["state"])
    watch.figure(**{"restarts": 0, "time-outs": 0})

    watch.begin()
    os.kill(engine_core(serving), signal.SIGKILL)
    asked = serving.later(lambda: serving.chat(max_tokens=1))
    clock.move(_DAY_S)
    answer = asked.result(60)
    assert 200 == answer.status_code, f"{answer.text}\n{serving.log()[-6000:]}"
    watch.serving(serving)
    assert (2, 0) == (serving.status()["engine_starts"], serving.status()["rung"])
