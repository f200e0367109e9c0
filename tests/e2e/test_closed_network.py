"""The network of a real engine's processes: closed without a word in the file, while the daemon serves on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.daemon import Daemon
from tests.faults.conftest import Fault

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def _outside() -> str:
    """An address of this machine by which others reach it."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            is_outside = each.family == socket.AF_INET and not each.address.startswith("127.")
            if is_outside and psutil.net_if_stats()[name].isup:
                return str(each.address)
    pytest.skip("this machine has no address but loopback")


def test_an_engine_reaches_this_machine_and_nothing_else(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """A worker that connects in the middle of a step gets through to loopback only; both requests are answered."""
    fault = Fault(tmp_path)
    started = daemon(environ=fault.environ).wait_ready()
    assert "closed but for this machine's loopback" == started.status()["engine_network"]
    said = {}
    for host in ("127.0.0.1", _outside()):
        with socket.create_server((host, 0)) as listener:
            place = listener.getsockname()
            socket.create_connection(place, timeout=2).close()  # it is there, for this process
            fault.arm("execute_model", f"reach out to {place[0]}:{place[1]}")
            assert 200 == started.chat().status_code
            said[host] = fault.said
    assert ["connected", "TimeoutError"] == list(said.values())
    assert 1 == started.status()["engine_starts"]
