"""Talks to systemd: readiness, status, start time, watchdog, and the descriptor store that keeps our socket.

The sdnotify package encodes in latin-1, drops a message it cannot encode, swallows every error and knows no
descriptors, so messages go as UTF-8 through the socket that it opens.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Protocol

import sdnotify

_FIRST_PASSED_FD = 3
LISTEN_NAME = "listen"


class Notifier(Protocol):
    """What the daemon tells its service manager. `Silence` is the one for no service manager."""

    @property
    def watchdog_s(self) -> float | None:
        """Seconds after which silence counts as death, or None."""

    def ready(self) -> None:
        """The service answers."""

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it, whatever came of it."""

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""

    def extend_start(self, seconds: float) -> None:
        """The start, or stop, is making progress: allow this many seconds from now."""

    def stopping(self) -> None:
        """The service is on its way down."""

    def alive(self) -> None:
        """The loop turns."""

    def keep(self, listener: socket.socket) -> None:
        """Keep this socket open across processes."""

    def forget(self) -> None:
        """Do not keep the stored socket any longer."""


class Silence:
    """No service manager: nothing is told to anybody."""

    watchdog_s = None

    def ready(self) -> None:
        """Nothing."""

    def reloading(self) -> None:
        """Nothing."""

    def status(self, text: str) -> None:
        """Nothing."""

    def extend_start(self, seconds: float) -> None:
        """Nothing."""

    def stopping(self) -> None:
        """Nothing."""

    def alive(self) -> None:
        """Nothing."""

    def keep(self, listener: socket.socket) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""


class Systemd:
    """The service manager behind NOTIFY_SOCKET."""

    def __init__(self, manager: socket.socket, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        self._socket = manager
        self._socket.setblocking(False)  # noqa: FBT003 - the library's signature
        self._last_status = ""

    def ready(self) -> None:
        """The service answers."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again. The time tells the manager which `ready` belongs to it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def status(self, text: str) -> None:
        """One line, sent only when it has changed."""
        line = " ".join(text.split())
        if line != self._last_status:
            self._last_status = line
            self._send(f"STATUS={line}")

    def extend_start(self, seconds: float) -> None:
        """More time from now, for a start or a stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def stopping(self) -> None:
        """The service is on its way down."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The loop turns."""
        self._send("WATCHDOG=1")

    def keep(self, listener: socket.socket) -> None:
        """Store the socket under our name for it."""
        rights = array.array("i", [listener.fileno()])
        self._send(f"FDSTORE=1\nFDNAME={LISTEN_NAME}", [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def forget(self) -> None:
        """Remove every socket that is stored under our name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={LISTEN_NAME}")

    def _send(self, message: str, ancillary: list[tuple[int, int, array.array[int]]] | None = None) -> None:
        # A full or vanished manager socket must not end the service it manages.
        with contextlib.suppress(OSError):
            self._socket.sendmsg([message.encode(errors="replace")], ancillary or [])


def notifier(environ: Mapping[str, str]) -> Notifier:
    """The notifier for this process's environment."""
    if not environ.get("NOTIFY_SOCKET"):
        return Silence()
    manager: socket.socket | None = sdnotify.SystemdNotifier().socket
    if manager is None:  # it is named, but nobody listens there
        return Silence()
    interval = environ.get("WATCHDOG_USEC", "")
    is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return Systemd(manager, int(interval) / 1e6 if interval.isdecimal() and is_ours else None)


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """Listening sockets handed over by systemd, from its store or from a socket unit."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    number = environ.get("LISTEN_FDS", "")
    count = int(number) if number.isdecimal() else 0
    found = []
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + count):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)  # noqa: FBT003 - the library's signature
            found.append(socket.socket(fileno=fd))
    return found
