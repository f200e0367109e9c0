"""What many rebuilds leave in the daemon: nothing that grows."""

from __future__ import annotations

import os
import signal
import statistics
from collections.abc import Callable

import pytest

from tests.daemon import Daemon, eventually
from tests.faults.conftest import engine_core
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

_REBUILDS, _WARM = 15, 3
_MOST_MB_PER_REBUILD = 4.0


@pytest.mark.row("R", "memory of the daemon over 15 rebuilds")
def test_memory_does_not_grow_with_rebuilds(daemon: Callable[..., Daemon], watch: Watch) -> None:
    """From the third on, a rebuild adds next to nothing: an engine that is gone is freed."""
    serving = daemon({"recovery": {"restart_limit": 40}}).wait_ready()
    megabytes, descriptors = [], []
    for starts in range(2, _REBUILDS + 2):
        os.kill(engine_core(serving), signal.SIGKILL)
        eventually(lambda: _is_serving(serving), lambda seen, starts=starts: seen == starts, within_s=60, what="start")  # type: ignore[misc]
        assert 200 == serving.chat(max_tokens=4).status_code
        megabytes.append(serving.status()["memory_bytes"] / 1e6)
        descriptors.append(len(os.listdir(f"/proc/{serving.pid}/fd")))  # noqa: PTH208 - names of links, not of files

    slope = statistics.linear_regression(range(_WARM, _REBUILDS), megabytes[_WARM:]).slope
    watch.figure(**{"MB": [round(each) for each in megabytes], "MB a rebuild": round(slope, 2)})
    watch.note(serving)
    assert slope < _MOST_MB_PER_REBUILD
    assert max(descriptors[_WARM:]) <= descriptors[_WARM] + 2


def _is_serving(daemon: Daemon) -> int:
    """The number of the engine start that serves, or 0."""
    status = daemon.status()
    return int(status["engine_starts"]) if status["state"] == "serving" else 0
