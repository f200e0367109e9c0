"""`targets`: lists the instances of this machine for Prometheus's file discovery."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_serve.core.errors import ConfigError
from llm_serve.core.settings import parse_listen
from llm_serve.core.targets import Group, NotScrapable, address_of, by_instance, group
from llm_serve.host.instances import read_instance
from llm_serve.host.names import instance_names

_WRONG_USAGE, _TRY_AGAIN = 2, 75


def targets(output: Path | None, host: str | None, folder: Path) -> int:
    """Print the list, or put it in the place of `output`. Returns 0, also when an instance was left out with a word.

    2 for a host that is none; 75 when the folder cannot be looked into or the file not be written: the old list stays.
    """
    try:
        if host is not None:
            parse_listen(f"[{host}]:1" if ":" in host else f"{host}:1")
    except ValueError as error:
        return _failed(f"--host {error}", _WRONG_USAGE)
    try:
        os.listdir(folder)  # noqa: PTH208 - glob() takes a folder that may not be read for an empty one
    except OSError as error:
        return _failed(f"{folder} cannot be looked into: {error.strerror}", _TRY_AGAIN)
    text = json.dumps(list(_groups(folder, host, _before(output))), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return 0
    try:
        _replace(output, text)
    except OSError as error:
        return _failed(f"{output} cannot be written: {error.strerror}", _TRY_AGAIN)
    return 0


def _failed(message: str, status: int) -> int:
    print(f"llm-serve: targets: {message}.", file=sys.stderr)
    return status


def _groups(folder: Path, host: str | None, before: Mapping[str, Group]) -> Iterator[Group]:
    """A file that is broken leaves its instance where it was: the daemon may serve on, and must stay watched."""
    machine = host or socket.gethostname()
    for name in instance_names(folder):
        try:
            settings, _ = read_instance(name, folder)
            yield group(name, machine, address_of(settings.server.listen_on, host))
        except NotScrapable as reason:
            print(f"llm-serve: targets: {name} is left out: {reason}.", file=sys.stderr)
        except ConfigError as error:
            known = before.get(name)
            became = f"stays at {known['targets'][0]}" if known else "is left out"
            print(f"{error}\nllm-serve: targets: {name} {became}, because its file is refused.", file=sys.stderr)
            if known:
                yield known


def _before(output: Path | None) -> Mapping[str, Group]:
    """What the last list said; nothing where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return by_instance(json.loads(output.read_bytes())) if output else {}
    return {}


def _replace(output: Path, text: str) -> None:
    """Put a new file in the old one's place: Prometheus reads one of the two, never half of one."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:  # noqa: PTH123 - Path.open() takes no descriptor
            os.fchmod(fd, 0o644)  # Prometheus is another user, and the unit's umask hides files from others
            file.write(text)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, output)  # noqa: PTH105 - os, as all around it
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
