"""The kernel kills an engine for memory. Needs root, to make a control group of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.control_group import Group, memory_group
from tests.daemon import Daemon, eventually
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

MakeDaemon = Callable[..., Daemon]
_HOG = "import time\nblocks = []\nwhile True:\n    blocks.append(b'x' * (16 << 20)); time.sleep(0.005)\n"


@pytest.fixture
def group() -> Iterator[Group]:
    """A control group, gone afterwards."""
    with memory_group() as made:
        yield made


@pytest.mark.row("10", "kernel OOM kill of EngineCore")
def test_the_kernel_kills_the_engine_for_memory(daemon: MakeDaemon, group: Group, watch: Watch) -> None:
    """It is named, told apart from somebody's kill -9, and answered with a smaller plan."""
    serving = daemon()
    group.add(serving.pid)
    serving.wait_ready()
    core = psutil.Process(min(serving.status()["engine_pids"]))
    Path(f"/proc/{core.pid}/oom_score_adj").write_text("1000")
    group.limit(group.used() + (256 << 20))
    hog = subprocess.Popen([sys.executable, "-c", f"import os\nos.kill(os.getpid(), 19)\n{_HOG}"])
    eventually(psutil.Process(hog.pid).status, lambda seen: seen == psutil.STATUS_STOPPED, within_s=5, what="a hog")
    group.add(hog.pid)

    watch.begin()
    hog.send_signal(18)
    eventually(group.kills, lambda kills: kills >= 1, within_s=60, what="the kernel's kill")
    hog.kill()
    hog.wait()
    group.limit(16 << 30)

    watch.detected(serving, within_s=5) if core.is_running() else None
    watch.serving(serving)
    status = serving.status()
    assert "host_out_of_memory" in status["last_failure"], status["last_failure"]
    assert 1 == status["rung"]
    assert time.time() - status["failures"][0]["time"] < 120
    assert status["failures"][0]["evidence"]["oom_kills"] >= 1
