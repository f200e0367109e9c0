"""The listening sockets: free, taken, stale, handed over."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.settings import ServerSettings, Settings
from llm_serve.host import listening
from llm_serve.host.systemd import Silence


class Store(Silence):
    """The service manager's descriptor store, as a list of what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def keep(self, listener: socket.socket) -> None:
        """Note that a socket was stored."""
        self.told.append("keep")

    def forget(self) -> None:
        """Note that the stored sockets were given up."""
        self.told.append("forget")


@pytest.fixture
def store() -> Store:
    """An empty store."""
    return Store()


def listen_on(address: str) -> Settings:
    """Settings that name this address."""
    return Settings(name="a", source="/etc/llm-serve/a.toml", model="m", server=ServerSettings(listen=address))


Pass = Callable[[str], socket.socket]


@pytest.fixture
def hand_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pass]:
    """Bind an address and let it be found among the sockets that systemd hands over."""
    passed: list[socket.socket] = []
    monkeypatch.setattr(listening, "passed_sockets", lambda _: list(passed))

    def bind(address: str) -> socket.socket:
        family = socket.AF_UNIX if address.startswith("/") else socket.AF_INET
        passed.append(socket.socket(family))
        passed[-1].bind(address if family == socket.AF_UNIX else (address, 0))
        return passed[-1]

    yield bind
    for each in passed:
        each.close()


def test_a_free_port_is_bound_and_stored(store: Store) -> None:
    """Connections are taken at once, the loop is not blocked, and the socket goes to the store."""
    with listening.open_listener(listen_on("127.0.0.1:0"), store) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=5):
            accepted, _ = listener.accept()
            accepted.close()

        assert "127.0.0.1" == address[0]
        assert not listener.getblocking()
        assert not listener.get_inheritable()
        assert 0 == listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        assert ["keep"] == store.told


def test_ipv6_is_bound(store: Store) -> None:
    """An address in brackets is an IPv6 address."""
    with listening.open_listener(listen_on("[::1]:0"), store) as listener:
        assert socket.AF_INET6 is listener.family
        assert "::1" == listener.getsockname()[0]


def test_a_port_in_use_names_its_holder(store: Store) -> None:
    """The message says which process listens there, and the status means: try again."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"

        with pytest.raises(HostError) as refused:
            listening.open_listener(listen_on(address), store)

    assert f"(pid {os.getpid()})" in str(refused.value)
    assert address in str(refused.value)
    assert "/etc/llm-serve/a.toml" in str(refused.value)
    assert (75, []) == (refused.value.exit_status, store.told)


def test_a_port_that_is_not_ours_to_bind_is_a_configuration_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to a low port no restart helps."""

    def refuse(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listening, "_bind_tcp", refuse)

    with pytest.raises(ConfigError) as refused:
        listening.open_listener(listen_on("127.0.0.1:80"), store)

    assert "server.listen: cannot listen on 127.0.0.1:80: Permission denied." in str(refused.value)


def test_an_address_that_is_not_there_yet_may_come(store: Store) -> None:
    """At boot the network may come up after the daemon: the unit should try again."""
    with pytest.raises(HostError) as refused:
        listening.open_listener(listen_on("192.0.2.1:0"), store)

    assert "cannot listen on 192.0.2.1:0" in str(refused.value)


def test_a_resolver_that_is_not_there_yet_may_come(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that cannot be looked up just now is not a wrong one."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr("llm_serve.host.listening.socket.getaddrinfo", fail)

    with pytest.raises(HostError, match="Temporary failure"):
        listening.open_listener(listen_on("gpu1.example:0"), store)


# Unix sockets.
def test_a_stale_unix_socket_is_replaced(store: Store, tmp_path: Path) -> None:
    """A socket file that a killed process has left is in nobody's way, and the group may connect."""
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    with listening.open_listener(listen_on(f"unix:{path}"), store), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))

        assert 0o660 == stat.S_IMODE(path.stat().st_mode)


def test_a_live_unix_socket_is_left_alone(store: Store, tmp_path: Path) -> None:
    """A socket that somebody listens on is in use, and goes on working."""
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as client:
        live.bind(str(path))
        live.listen()

        with pytest.raises(HostError, match="is in use"):
            listening.open_listener(listen_on(f"unix:{path}"), store)

        client.connect(str(path))


def test_a_file_in_the_way_is_left_alone(store: Store, tmp_path: Path) -> None:
    """Only sockets are replaced: a file may be anything."""
    path = tmp_path / "a.sock"
    path.write_text("precious")

    with pytest.raises(HostError, match="is in use"):
        listening.open_listener(listen_on(f"unix:{path}"), store)

    assert "precious" == path.read_text()


def test_a_unix_socket_without_its_folder_is_a_configuration_error(store: Store, tmp_path: Path) -> None:
    """Nobody makes the folder later."""
    with pytest.raises(ConfigError, match="No such file"):
        listening.open_listener(listen_on(f"unix:{tmp_path}/none/a.sock"), store)


def test_the_control_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    """It replaces what was left, is closed to others from the first moment, and leaves the mask as it was."""
    path = tmp_path / "control.sock"
    path.write_text("left over")
    mask = os.umask(0o022)
    os.umask(mask)

    with listening.open_control(path) as control:
        assert 0o600 == stat.S_IMODE(path.stat().st_mode)
        assert not control.getblocking()
    after = os.umask(mask)

    assert mask == after


# What systemd hands over.
def test_a_socket_with_our_address_is_used(store: Store, hand_over: Pass) -> None:
    """A socket from the store goes on being used, and stays where it is."""
    passed = hand_over("127.0.0.1")
    port = passed.getsockname()[1]

    listener = listening.open_listener(listen_on(f"127.0.0.1:{port}"), store)

    assert listener is passed
    assert [] == store.told
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_unix_socket_with_our_path_is_used(store: Store, hand_over: Pass, tmp_path: Path) -> None:
    """A path is compared as it is."""
    passed = hand_over(str(tmp_path / "a.sock"))

    assert passed is listening.open_listener(listen_on(f"unix:{tmp_path}/a.sock"), store)


def test_a_host_name_matches_its_address(store: Store, hand_over: Pass) -> None:
    """The file may say localhost where the socket says 127.0.0.1."""
    passed = hand_over("127.0.0.1")

    assert passed is listening.open_listener(listen_on(f"localhost:{passed.getsockname()[1]}"), store)


def test_a_socket_with_another_address_is_given_up(store: Store, hand_over: Pass) -> None:
    """After a change of server.listen the old socket is closed and leaves the store; the new one goes in."""
    old = hand_over("127.0.0.1")

    with listening.open_listener(listen_on("127.0.0.1:0"), store) as listener:
        assert listener is not old

    assert -1 == old.fileno()
    assert ["forget", "keep"] == store.told


@pytest.mark.parametrize("is_ours_first", [True, False])
def test_ours_stays_stored_when_another_is_given_up(is_ours_first: bool, store: Store, hand_over: Pass) -> None:
    """The store is told to forget by name, which ours shares: it has to be stored again."""
    first, second = hand_over("127.0.0.1"), hand_over("127.0.0.1")
    ours, other = (first, second) if is_ours_first else (second, first)

    listener = listening.open_listener(listen_on(f"127.0.0.1:{ours.getsockname()[1]}"), store)

    assert listener is ours
    assert -1 == other.fileno()
    assert ["forget", "keep"] == store.told


def test_of_two_alike_one_is_used(store: Store, hand_over: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that was stored twice does not stay open unused, where connections would wait for ever."""
    ours = hand_over("127.0.0.1")
    twin = ours.dup()
    monkeypatch.setattr(listening, "passed_sockets", lambda _: [ours, twin])

    listener = listening.open_listener(listen_on(f"127.0.0.1:{ours.getsockname()[1]}"), store)

    assert (ours, -1) == (listener, twin.fileno())
    assert "keep" == store.told[-1]
