"""The closed network, with the real kernel: what a process that gave it up can reach, and what it cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_serve.core.errors import ConfigError
from llm_serve.core.settings import NetworkSettings, Settings
from llm_serve.host import closed_network
from llm_serve.host.closed_network import VARIABLE, Broker, prepare

_PROBE = """
import json, socket, subprocess, sys
from pathlib import Path
from llm_serve.host.closed_network import confine

confine(Path(sys.argv[1]))
said = {}

def attempt(name, act):
    try:
        said[name] = act()
    except OSError as error:
        said[name] = error.strerror or type(error).__name__

def reach(host, port):
    with socket.create_connection((host, port), timeout=0.5):
        return "connected"

def bind_to(device):
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        return "bound"

def device_of_a_child():
    ask = "import socket; print(socket.socket().getsockopt(1, 25, 16))"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip()

attempt("inside", lambda: reach("127.0.0.1", int(sys.argv[2])))
attempt("outside", lambda: reach(sys.argv[3], int(sys.argv[4])))
attempt("datagram", lambda: socket.socket(type=socket.SOCK_DGRAM).family)
attempt("another protocol", lambda: socket.socket(proto=262).family)
attempt("another family", lambda: socket.socket(socket.AF_VSOCK).family)
attempt("unbound", lambda: bind_to(b""))
attempt("pair", lambda: len(socket.socketpair()))
attempt("child", device_of_a_child)
attempt("blocking", lambda: socket.socket().getblocking())
attempt("inheritable", lambda: socket.socket().get_inheritable())
print(json.dumps(said), flush=True)
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
while True:
    listener.accept()[0].close()
"""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path / "network.sock")
    try:
        made.try_out()
    except OSError as error:
        pytest.skip(f"this kernel cannot close a network: {error}")
    yield made
    made.close()


@pytest.fixture
def address() -> str:
    """An address of this machine by which others reach it."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if (
                each.family == socket.AF_INET
                and not each.address.startswith("127.")
                and psutil.net_if_stats()[name].isup
            ):
                return str(each.address)
    pytest.skip("this machine has no address but loopback")


@pytest.fixture
def probe(broker: Broker, address: str) -> Iterator[tuple[dict[str, Any], int]]:
    """What a closed process says, and the port on which it listens everywhere."""
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server((address, 0)) as outside:
        socket.create_connection(outside.getsockname(), timeout=2).close()  # it can be reached: by this process
        ports = [str(listener.getsockname()[1]) for listener in (inside, outside)]
        command = [sys.executable, "-c", _PROBE, str(broker.path), ports[0], address, ports[1]]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline()), int(process.stdout.readline())
            process.kill()


def test_a_closed_process_reaches_this_machine_and_nothing_else(
    probe: tuple[dict[str, Any], int], address: str
) -> None:
    """Loopback is there, both ways; elsewhere is not, nor is a way around it, for it and for its children."""
    said, port = probe
    privileged = os.geteuid() == 0  # who has CAP_NET_RAW may take the binding off, as no service of ours can
    assert "connected" == said["inside"]
    assert "timed out" == said["outside"] or "timeout" in said["outside"].lower()
    assert "Permission denied" == said["datagram"] == said["another protocol"]
    assert "Address family not supported by protocol" == said["another family"]
    assert privileged or "Operation not permitted" == said["unbound"]
    assert 2 == said["pair"]
    assert "b'lo\\x00'" == said["child"]
    assert (True, False) == (said["blocking"], said["inheritable"])

    socket.create_connection(("127.0.0.1", port), timeout=2).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, port), timeout=2)


def test_a_broker_forgets_processes_that_are_gone(broker: Broker) -> None:
    """Nothing of them stays open in the daemon."""
    code = f"from pathlib import Path; from llm_serve.host.closed_network import confine; confine(Path({str(broker.path)!r}))"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a listing of links

    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], env=environ, check=True)

    deadline = threading.Event()
    while len(os.listdir("/proc/self/fd")) > before and not deadline.wait(0.05):  # noqa: PTH208
        pass


def _settings(choice: str) -> Settings:
    network = NetworkSettings.model_validate({"engine": choice})
    return Settings(name="a", source="a.toml", model="model", network=network)


def _cannot(path: Path) -> None:
    raise OSError(38, "seccomp: Function not implemented")


def test_a_kernel_that_cannot_close_it_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody insists, the engine starts with an open network, and status says why; else it is refused."""
    monkeypatch.setattr(closed_network, "confine", _cannot)

    assert "open: this machine cannot close it: seccomp" in str(prepare(_settings("auto"), tmp_path, lambda _: True))
    with pytest.raises(ConfigError, match=r"Linux 5\.14"):
        prepare(_settings("closed"), tmp_path, lambda _: True)
    assert [] == list(tmp_path.iterdir())


def test_an_open_network_needs_no_broker(tmp_path: Path) -> None:
    """Nothing is made, and the engine's processes are told nothing."""
    network = prepare(_settings("open"), tmp_path, lambda _: True)

    assert ({}, []) == (network.env, list(tmp_path.iterdir()))


def test_a_closed_network_is_told_to_the_processes(broker: Broker, tmp_path: Path) -> None:
    """Where to ask, and on which device to meet."""
    network = prepare(_settings("auto"), tmp_path / "..", lambda _: True)

    assert network.broker is not None
    assert str(network.broker.path) == network.env[VARIABLE]
    assert "lo" == network.env["NCCL_SOCKET_IFNAME"]
    network.broker.close()
