"""The listening sockets: bound before anything slow happens, and taken over from systemd where it has one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.core.settings import Listen, Settings
from llm_serve.host.processes import holder_of_port
from llm_serve.host.systemd import Notifier, passed_sockets

_BACKLOG = 2048
_NO_NETWORK_YET = frozenset({errno.EADDRNOTAVAIL, socket.EAI_AGAIN})
"""At boot an address may not be there yet, nor a resolver to ask for it."""


def open_listener(settings: Settings, notifier: Notifier) -> socket.socket:
    """The socket that clients connect to.

    A socket from systemd's store or a socket unit is used when it has the address of the file; any other is
    closed. The one that is used is in the store, so that connections wait there between two processes. Raises
    HostError when the address cannot be had now, ConfigError when it cannot be used at all.
    """
    listen = settings.server.listen_on
    chosen: socket.socket | None = None
    is_stored = True
    for passed in passed_sockets(os.environ):
        if chosen is None and _has_address(passed, listen):
            chosen = passed
        else:
            notifier.forget()  # every stored socket, the chosen one included: they share a name
            is_stored = False
            passed.close()
    listener = chosen or _bind(settings, listen)
    listener.setblocking(False)  # noqa: FBT003 - the library's signature
    listener.listen(_BACKLOG)
    if chosen is None or not is_stored:
        notifier.keep(listener)
    return listener


def open_control(path: Path) -> socket.socket:
    """The socket for `llm-serve status` and its like: only this user and root may connect."""
    path.unlink(missing_ok=True)
    control = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        control.bind(str(path))
    finally:
        os.umask(before)
    control.setblocking(False)  # noqa: FBT003 - the library's signature
    return control


def probe(listen: Listen) -> str:
    """Why this address cannot be listened on now; empty where it can. Nothing is left of the try."""
    try:
        if listen.path is None:
            _bind_tcp(listen.host or "", listen.port or 0).close()
            return ""
    except OSError as error:
        return error.strerror or str(error)
    return _probe_unix(Path(listen.path))


def _probe_unix(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)  # a live server with a full backlog would make it wait
        if path.is_socket() and client.connect_ex(str(path)) != errno.ECONNREFUSED:
            return os.strerror(errno.EADDRINUSE)
    if path.exists() and not path.is_socket():
        return os.strerror(errno.EEXIST)
    if not path.parent.is_dir():
        return f"{path.parent} does not exist"
    return "" if os.access(path.parent, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def _has_address(candidate: socket.socket, listen: Listen) -> bool:
    with contextlib.suppress(OSError):
        name = candidate.getsockname()
        if listen.path is not None:
            return bool(name == listen.path)
        return isinstance(name, tuple) and name[1] == listen.port and _same_host(name[0], listen.host or "")
    return False


def _same_host(bound: str, wanted: str) -> bool:
    if bound == wanted:
        return True
    with contextlib.suppress(OSError):
        return any(bound == info[4][0] for info in socket.getaddrinfo(wanted, None))
    return False


def _bind(settings: Settings, listen: Listen) -> socket.socket:
    try:
        return (
            _bind_unix(Path(listen.path)) if listen.path is not None else _bind_tcp(listen.host or "", listen.port or 0)
        )
    except OSError as error:
        where = settings.server.listen
        if error.errno == errno.EADDRINUSE:
            holder = holder_of_port(listen.port) if listen.port else None
            who = f" by {holder}" if holder else ""
            raise HostError(
                f"{where} is in use{who}. Stop that, or change server.listen in {settings.source}."
            ) from error
        message = f"cannot listen on {where}: {error.strerror or error}."
        if error.errno in _NO_NETWORK_YET:
            raise HostError(message) from error
        raise ConfigError((Problem(settings.source, None, "server.listen", message),)) from error


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Not SO_REUSEPORT: two servers would then share the port without either knowing.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)  # a live server with a full backlog would make it wait
        if path.is_socket() and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink()  # left by a process that was killed
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    path.chmod(0o660)
    return listener
