"""Closes the network to a process but for this machine's loopback, without any privilege.

The process gives up, for itself and all that it starts, the right to make internet sockets (seccomp). Where it asks for
one, the kernel asks our broker, a thread of the daemon, which makes it, binds it to the loopback device and puts it
into the process in place of its own. Only CAP_NET_RAW could take that binding off again. So a connection to elsewhere
has no way out, nobody elsewhere reaches a listener, and nothing has to be judged by addresses, which a process could
change after they were looked at. TCP is all there is: a datagram can name another device in passing (IP_PKTINFO).

What lost: network namespaces (they need user namespaces, which Ubuntu does not give to everybody, and which cost more
exposure than they win), Landlock (it knows ports, not addresses), IPAddressDeny= (it is the whole unit's, and the
daemon has clients), PrivateNetwork= (the same).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.network import why_open
from llm_serve.core.settings import Settings
from llm_serve.host.logs import get_logger

VARIABLE = "LLM_SERVE_NETWORK"
"""In the environment of a process that is to close its network: the broker's socket."""
ENVIRONMENT = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
"""What makes processes of one machine meet on the loopback device, the only one that they have."""
_FILE = "network.sock"
_LOOPBACK = b"lo\0"
_SYN_TRIES = 2
"""To elsewhere there is no answer: a connection fails after 7 s, and not after the usual two minutes."""

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _SPEC_ALLOW, _NEW_LISTENER = 1, 1 << 2, 1 << 3
_RECEIVE, _ANSWER, _ADD_SOCKET = 0xC0502100, 0xC0182101, 0x40182103
_ADD_AND_ANSWER = 1 << 1
_REQUEST = struct.Struct("=QIIiIQ6Q")
"""struct seccomp_notif: id, pid, flags, then struct seccomp_data: number, architecture, address, arguments."""


@dataclass(frozen=True, slots=True)
class _Machine:
    architecture: int
    seccomp: int
    socket: int


_MACHINES = {"x86_64": _Machine(0xC000003E, 317, 41), "aarch64": _Machine(0xC00000B7, 277, 198)}
_IO_URING_SETUP = 425
_X32 = 0x40000000
_ALLOW, _ASK, _REFUSE = 0x7FFF0000, 0x7FC00000, 0x00050000


@dataclass(frozen=True, slots=True)
class Network:
    """What an instance's engines have of the network. `why_open` is empty where it is closed to them."""

    why_open: str
    broker: Broker | None = None

    @property
    def env(self) -> dict[str, str]:
        """What an engine's processes are told."""
        return {VARIABLE: str(self.broker.path), **ENVIRONMENT} if self.broker else {}

    def __str__(self) -> str:
        return f"open: {self.why_open}" if self.why_open else "closed but for this machine's loopback"


OPEN = Network("nothing has closed it")


def prepare(settings: Settings, runtime: Path, is_here: Callable[[str], bool]) -> Network:
    """Decide for the life of this daemon, and try it out. Raises ConfigError where it must be closed and cannot be."""
    if why := why_open(settings, is_here):
        network = Network(why)
    else:
        broker = Broker(runtime / _FILE)
        try:
            broker.try_out()
        except OSError as error:
            broker.close()
            network = Network(f"this machine cannot close it: {error.strerror or error}")
            if settings.network.engine == "closed":
                hint = 'Linux 5.14 or newer is needed, with seccomp; else set network.engine = "open"'
                raise ConfigError([Problem(settings.source, None, "network.engine", network.why_open, hint)]) from error
            get_logger().warning(f"the network of the engine's processes is {network}")
            return network
        network = Network("", broker)
    get_logger().info(f"the network of the engine's processes is {network}")
    return network


class Broker:
    """Makes the sockets of closed processes, in a thread of its own: none of them may wait for the daemon's loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._watched = select.poll()
        self._watched.register(self._listener, select.POLLIN)
        self._arriving: dict[int, socket.socket] = {}
        threading.Thread(target=self._serve, name="network-broker", daemon=True).start()

    def close(self) -> None:
        """Take no more processes. Those that there are keep what they have, and get no new socket without a daemon."""
        self.path.unlink(missing_ok=True)

    def try_out(self) -> None:
        """Close a thread's network and look at its socket. Raises OSError with what this machine lacks."""
        seen: list[bytes | OSError] = []

        def live() -> None:
            try:
                confine(self.path)
                with socket.socket() as made:
                    seen.append(made.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16))
            except OSError as error:
                seen.append(error)

        thread = threading.Thread(target=live, name="network-trial")
        thread.start()
        thread.join()
        if isinstance(seen[0], OSError):
            raise seen[0]
        if seen[0] != _LOOPBACK:
            raise OSError(errno.EPROTO, "a socket is not bound to the loopback device")

    def _serve(self) -> None:
        while True:
            for descriptor, event in self._watched.poll():
                # Whatever a process does to its own connection is nobody else's trouble.
                with contextlib.suppress(OSError):
                    self._attend(descriptor, event)

    def _attend(self, descriptor: int, event: int) -> None:
        if descriptor == self._listener.fileno():
            arriving, _ = self._listener.accept()
            self._arriving[arriving.fileno()] = arriving
            self._watched.register(arriving, select.POLLIN)
        elif (arriving_now := self._arriving.pop(descriptor, None)) is not None:
            self._watched.unregister(descriptor)
            with arriving_now:
                for handed in socket.recv_fds(arriving_now, 1, 1, socket.MSG_DONTWAIT)[1]:
                    os.set_inheritable(handed, False)  # noqa: FBT003 - the library's signature
                    self._watched.register(handed, select.POLLIN)
        elif event & select.POLLIN:
            _answer(descriptor)
        else:  # all of its processes are gone
            self._watched.unregister(descriptor)
            os.close(descriptor)


def _answer(notifications: int) -> None:
    """Make the socket that a process has asked for, or say why there is none."""
    request = bytearray(_REQUEST.size)
    ioctl(notifications, _RECEIVE, request)
    number, *_, family, kind, protocol, _, _, _ = _REQUEST.unpack(request)
    try:
        with _loopback_socket(family & 0xFFFFFFFF, kind & 0xFFFFFFFF, protocol & 0xFFFFFFFF) as made:
            flags = kind & socket.SOCK_CLOEXEC
            ioctl(notifications, _ADD_SOCKET, struct.pack("=QIIII", number, _ADD_AND_ANSWER, made.fileno(), 0, flags))
    except OSError as error:
        ioctl(notifications, _ANSWER, struct.pack("=QqiI", number, 0, -(error.errno or errno.EACCES), 0))


def _loopback_socket(family: int, kind: int, protocol: int) -> socket.socket:
    flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    if kind & ~flags != socket.SOCK_STREAM or protocol not in (0, socket.IPPROTO_TCP):
        raise PermissionError(errno.EACCES, "only TCP is open")
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_TRIES)
    except OSError:
        made.close()
        raise
    return made


def confine(broker: Path) -> None:
    """Close the network to the calling thread and all that it starts, for ever. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(broker))
        notifications = _install_filter()
        try:
            socket.send_fds(channel, [b"\0"], [notifications])
        finally:
            os.close(notifications)


def _install_filter() -> int:
    """Returns the descriptor on which the kernel asks."""
    if (machine := _MACHINES.get(os.uname().machine)) is None:
        raise OSError(errno.ENOSYS, f"not known on {os.uname().machine}")
    code = b"".join(_filter(machine))
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    flags = _NEW_LISTENER | _SPEC_ALLOW
    if (found := libc.syscall(machine.seccomp, _SECCOMP_SET_MODE_FILTER, flags, program)) < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return int(found)


def _filter(machine: _Machine) -> Sequence[bytes]:
    """The rules, in the kernel's words. A call of another architecture would go by other numbers."""
    return (
        _load(4),
        _unless(machine.architecture, _REFUSE | errno.ENOSYS),
        _load(0),
        _instruction(0x35, 0, 1, _X32),
        _return(_REFUSE | errno.ENOSYS),
        _if(_IO_URING_SETUP, _REFUSE | errno.EPERM),  # it makes sockets without the call that is watched
        _unless(machine.socket, _ALLOW),
        _load(16),
        _if(socket.AF_UNIX, _ALLOW),
        _if(socket.AF_NETLINK, _ALLOW),
        _if(socket.AF_INET, _ASK),
        _if(socket.AF_INET6, _ASK),
        _return(_REFUSE | errno.EAFNOSUPPORT),
    )


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(offset: int) -> bytes:
    """Of struct seccomp_data: 0 the call's number, 4 the architecture, 16 the lower half of the first argument."""
    return _instruction(0x20, 0, 0, offset)


def _return(action: int) -> bytes:
    return _instruction(0x06, 0, 0, action)


def _if(value: int, action: int) -> bytes:
    return _instruction(0x15, 0, 1, value) + _return(action)


def _unless(value: int, action: int) -> bytes:
    return _instruction(0x15, 1, 0, value) + _return(action)
