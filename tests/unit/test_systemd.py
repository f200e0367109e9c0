"""What systemd hears and hands over, over real sockets in its place."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_serve.host.systemd import Notifier, Silence, Systemd, notifier, passed_sockets


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A datagram socket in systemd's place."""
    path = str(tmp_path / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield receiver


@pytest.fixture
def told(manager: socket.socket) -> Iterator[Notifier]:
    """The notifier that talks to `manager`."""
    found = notifier(os.environ)
    assert isinstance(found, Systemd)
    yield found
    found._socket.close()


def test_status_arrives_in_utf_8(told: Notifier, manager: socket.socket) -> None:
    """Characters beyond latin-1 reach `systemctl status` as they are, and lines become one."""
    told.status("starting: 模型 é 🚀,\n 40%")

    assert "STATUS=starting: 模型 é 🚀, 40%".encode() == manager.recv(4096)


def test_status_cannot_smuggle_an_order(told: Notifier, manager: socket.socket) -> None:
    """A newline in a text, as from an error message, does not begin a new assignment."""
    told.status("x\nREADY=1\r\nWATCHDOG=trigger")

    assert b"STATUS=x READY=1 WATCHDOG=trigger" == manager.recv(4096)


def test_the_same_status_is_sent_once(told: Notifier, manager: socket.socket) -> None:
    """Repeating a line costs nothing; a new one is sent."""
    for text in ("a", "a", " a ", "b"):
        told.status(text)
    told.alive()

    assert [b"STATUS=a", b"STATUS=b", b"WATCHDOG=1"] == [manager.recv(4096) for _ in range(3)]


def test_half_a_character_does_not_raise(told: Notifier, manager: socket.socket) -> None:
    """A lone surrogate, as from a file name that is no UTF-8, is replaced."""
    told.status("no such file: \udcff")

    assert b"STATUS=no such file: ?" == manager.recv(4096)


def test_each_message_stands_alone(told: Notifier, manager: socket.socket) -> None:
    """READY=1, STOPPING=1 and WATCHDOG=1 go without anything beside them."""
    told.ready()
    told.stopping()
    told.alive()

    assert [b"READY=1", b"STOPPING=1", b"WATCHDOG=1"] == [manager.recv(4096) for _ in range(3)]


def test_a_reload_says_when_it_began(told: Notifier, manager: socket.socket) -> None:
    """RELOADING=1 carries the monotonic time in microseconds, by which its READY=1 is known."""
    before = time.monotonic_ns() // 1000
    told.reloading()
    after = time.monotonic_ns() // 1000

    first, _, second = manager.recv(4096).decode().partition("\n")
    name, _, value = second.partition("=")
    assert ("RELOADING=1", "MONOTONIC_USEC") == (first, name)
    assert before <= int(value) <= after


def test_more_time_is_asked_for_in_microseconds(told: Notifier, manager: socket.socket) -> None:
    """EXTEND_TIMEOUT_USEC is a whole number."""
    told.extend_start(90.0)
    told.extend_start(0.5)

    assert [b"EXTEND_TIMEOUT_USEC=90000000", b"EXTEND_TIMEOUT_USEC=500000"] == [manager.recv(64) for _ in range(2)]


def test_the_stored_socket_works(told: Notifier, manager: socket.socket) -> None:
    """FDSTORE=1 carries a descriptor on which connections go on being accepted after ours is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        told.keep(listener)
    message, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4))
    descriptor = array.array("i", ancillary[0][2])[0]

    with socket.socket(fileno=descriptor) as stored, socket.create_connection(address, timeout=5):
        accepted, _ = stored.accept()
        accepted.close()

    assert b"FDSTORE=1\nFDNAME=listen" == message


def test_the_stored_socket_is_forgotten_by_its_name(told: Notifier, manager: socket.socket) -> None:
    """FDSTOREREMOVE=1 names what was stored."""
    told.forget()

    assert b"FDSTOREREMOVE=1\nFDNAME=listen" == manager.recv(4096)


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NOTIFY_SOCKET that begins with @ is in the abstract namespace."""
    name = f"llm-serve-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        found = notifier(os.environ)
        found.ready()

        assert b"READY=1" == receiver.recv(4096)
        assert isinstance(found, Systemd)
        found._socket.close()


def test_a_vanished_manager_ends_nothing(told: Notifier, manager: socket.socket) -> None:
    """When systemd's socket is gone, every message is lost and none raises."""
    manager.close()

    told.ready()
    told.status("x")
    told.alive()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.keep(listener)


def test_a_full_manager_ends_nothing(told: Notifier) -> None:
    """When systemd does not read, messages are dropped instead of waited for."""
    for number in range(5000):
        told.status(f"{number} " + "x" * 1000)


# The library that opens the socket leaves it to the collector when it cannot connect.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_manager_that_is_not_there_is_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NOTIFY_SOCKET left over from another life does not keep the daemon from starting."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone.sock"))

    assert isinstance(notifier(os.environ), Silence)


def test_silence_takes_everything() -> None:
    """Without a service manager every message is possible and none is sent."""
    silent = notifier({})

    silent.ready()
    silent.status("x")
    silent.extend_start(1)
    silent.stopping()
    silent.alive()
    silent.forget()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent.keep(listener)

    assert isinstance(silent, Silence)
    assert silent.watchdog_s is None


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_is_ours_or_none(
    environment: dict[str, str], seconds: float | None, manager: socket.socket
) -> None:
    """The interval counts when it is a number and is meant for this process."""
    found = notifier(os.environ | environment)

    assert seconds == found.watchdog_s
    assert isinstance(found, Systemd)
    found._socket.close()


# Descriptors that are handed over begin at 3, which only a process of its own can have free.
CHILD = """
import os, sys
exec(os.environ.pop("PREPARE"))
from llm_serve.host.systemd import passed_sockets
found = passed_sockets(os.environ)
print([s.getsockname()[1] for s in found], [os.get_inheritable(s.fileno()) for s in found])
"""


def ask_child(passed: list[int], prepare: str) -> str:
    """What a process finds that was given these descriptors from 3 on, with systemd's variables set in it."""
    moves = "".join(f"os.dup2({fd}, {3 + index}, inheritable=True);" for index, fd in enumerate(passed))
    environment = os.environ | {"PREPARE": moves + prepare, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", CHILD], pass_fds=passed, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket, with a number that is out of the way of 3 and 4."""
    with socket.create_server(("127.0.0.1", 0)) as low:
        high = os.dup(low.fileno())
        while high < 20:
            high = os.dup(high)
        with socket.socket(fileno=high) as moved:
            yield moved


OURS = 'os.environ["LISTEN_PID"] = str(os.getpid());'


def test_a_socket_that_is_handed_over_is_found(listener: socket.socket) -> None:
    """With LISTEN_PID and LISTEN_FDS set for the process, descriptor 3 is taken, and not passed on to children."""
    port = listener.getsockname()[1]

    found = ask_child([listener.fileno()], OURS + 'os.environ["LISTEN_FDS"] = "1"')

    assert f"[{port}] [False]" == found


def test_only_sockets_are_taken(listener: socket.socket, tmp_path: Path) -> None:
    """Of what is handed over, what is no socket, or not open at all, is passed over."""
    port = listener.getsockname()[1]
    with (tmp_path / "file").open("w") as file:
        high = os.dup2(file.fileno(), 60)

    found = ask_child([high, listener.fileno()], OURS + 'os.environ["LISTEN_FDS"] = "4"')
    os.close(high)

    assert f"[{port}] [False]" == found


@pytest.mark.parametrize(
    "prepare",
    [
        'os.environ["LISTEN_PID"] = "1"; os.environ["LISTEN_FDS"] = "1"',
        'os.environ["LISTEN_FDS"] = "1"',
        OURS,
        OURS + 'os.environ["LISTEN_FDS"] = "0"',
        OURS + 'os.environ["LISTEN_FDS"] = ""',
        OURS + 'os.environ["LISTEN_FDS"] = "many"',
    ],
)
def test_what_is_meant_for_others_is_left_alone(prepare: str, listener: socket.socket) -> None:
    """Another process's variables, or none, or no number, mean that nothing was handed over."""
    assert "[] []" == ask_child([listener.fileno()], prepare)


def test_without_systemd_nothing_is_handed_over() -> None:
    """An environment without its variables is the usual one."""
    assert [] == passed_sockets({})
