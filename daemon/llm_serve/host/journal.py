"""Events as entries of journald, in its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/."""

from __future__ import annotations

import queue
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

SOCKET = "/run/systemd/journal/socket"
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_FIELD = re.compile(r"[^A-Z0-9_]")
EXPLAINING = ("why", "reason", "failure", "kind", "seconds", "status", "path", "method")
_MOST_LATE = 10_000
_PATIENCE_S = 1.0

Event = Mapping[str, Any]


class Journal:
    """A logger whose entries are written by a thread: a journald that does not read keeps nobody waiting.

    Its socket takes a few hundred entries on top of those that wait here. What finds no room at all is counted, and
    the count is written as soon as there is room again.
    """

    def __init__(self, instance: str, as_line: Callable[[Event], str]) -> None:
        self._base = {"SYSLOG_IDENTIFIER": "llm-serve", "INSTANCE": instance}
        self._as_line = as_line
        self._entries: queue.Queue[tuple[bytes, Event] | None] = queue.Queue(_MOST_LATE)
        self._lost = 0
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    def msg(self, event: Event) -> None:
        """Have one event written, after those before it. One that is too large for journald goes to stderr."""
        try:
            if self._lost:
                self._put({"event": f"{self._lost} entries are lost: the journal did not read", "level": "warning"})
                self._lost = 0
            self._put(event)
        except queue.Full:
            self._lost += 1

    debug = info = warning = error = critical = fatal = exception = log = msg

    def close(self) -> None:
        """Wait a moment for the entries to be written. The last thing that the process does."""
        try:
            self._entries.put(None, timeout=_PATIENCE_S)
        except queue.Full:
            return
        self._writer.join(_PATIENCE_S)

    def _put(self, event: Event) -> None:
        self._entries.put_nowait((encode_entry(self._base | journal_fields(event)), event))

    def _write(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
            while (entry := self._entries.get()) is not None:
                payload, event = entry
                try:
                    journald.sendto(payload, SOCKET)
                except OSError:  # too large for a datagram, or nobody there
                    print(self._as_line(event), file=sys.stderr)


def journal_fields(event: Event) -> dict[str, str]:
    """An event as journal fields: MESSAGE, PRIORITY and one upper-case field for each value."""
    named = {key: value for key, value in event.items() if key not in {"event", "level"} and value is not None}
    fields = {_field_name(key): str(value) for key, value in named.items()}
    fields["PRIORITY"] = str(_PRIORITIES.get(str(event.get("level", "info")), 6))
    # Values that explain belong into the line that people read; identifiers stay fields.
    said = [f"{key}={value}" for key, value in named.items() if key in EXPLAINING]
    fields["MESSAGE"] = " ".join([str(event.get("event", "")), *said])
    return fields


def _field_name(key: str) -> str:
    """The name as journald takes it: at most 64 of A-Z, 0-9 and _, and a letter first."""
    return _FIELD.sub("_", key.upper()).lstrip("_0123456789")[:64] or "UNNAMED"


def encode_entry(fields: Mapping[str, str]) -> bytes:
    """The wire form: NAME=value; values with a newline go with their length in front."""
    lines = []
    for name, value in fields.items():
        raw = value.encode("utf-8", "replace")
        if b"\n" in raw:
            lines.append(name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n")
        else:
            lines.append(name.encode() + b"=" + raw + b"\n")
    return b"".join(lines)
