"""Where events go: journald with priority and fields under systemd, readable lines in a terminal, else JSON.

Every event is a short sentence with named values. Prompts, answers and keys are never among them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

_JOURNAL = "/run/systemd/journal/socket"
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
_FIELD = re.compile(r"[^A-Z0-9_]")
Event = MutableMapping[str, Any]


def set_up(instance: str, *, level: str, output_format: str = "auto") -> None:
    """Send structlog's events, and the standard library's records, to the place that fits this process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    chosen = _choose() if output_format == "auto" else output_format
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _exception_as_text,
    ]
    factory: Any = structlog.WriteLoggerFactory(file=sys.stderr)
    if chosen == "journal":
        last: list[Any] = [_to_journal]
        journal = _Journal(instance)
        factory = lambda *_: journal  # noqa: E731 - structlog asks for a logger at each event
    elif chosen == "json":
        last = [structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer(_as_json)]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        last = [stamp, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=44)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def get_logger() -> Any:
    """The logger of the daemon."""
    return structlog.get_logger()


def _choose() -> str:
    if sys.stderr.isatty():
        return "console"
    return "journal" if _stderr_is_journal() else "console"


def _stderr_is_journal() -> bool:
    """True unless stderr was redirected: systemd names the device and inode of the stream it gave us."""
    stat = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def _exception_as_text(_logger: Any, _method: str, event: Event) -> Event:
    return structlog.processors.format_exc_info(_logger, _method, event)


def _as_json(event: Mapping[str, Any], **_: Any) -> str:
    """One line of JSON; what JSON has no form for is written as Python shows it."""
    try:
        return json.dumps(event, default=repr, allow_nan=False)
    except (TypeError, ValueError):
        plain = {key: value if isinstance(value, str | int) else repr(value) for key, value in event.items()}
        return json.dumps(plain)


def _to_journal(_logger: Any, _method: str, event: Event) -> tuple[tuple[Event], dict[str, Any]]:
    return (event,), {}


class _ToStructlog(logging.Handler):
    """Standard library records (uvicorn, asyncio, libraries) in the same stream."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = {"exc_info": record.exc_info} if record.exc_info else {}
        try:
            get_logger().log(_known_level(record.levelno), record.getMessage(), logger=record.name, **exc_info)
        except Exception:  # noqa: BLE001 - a library's malformed record must not end what it reports on
            self.handleError(record)


def _known_level(number: int) -> int:
    """The highest level that structlog knows at or below this one: libraries make up their own."""
    return max((level for level in _LEVELS if level <= number), default=logging.DEBUG)


class _Journal:
    """Writes events to journald in its native protocol: an entry for each, a field for each value."""

    def __init__(self, instance: str) -> None:
        self._base = {"SYSLOG_IDENTIFIER": "llm-serve", "INSTANCE": instance}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(1.0)

    def msg(self, event: Mapping[str, Any]) -> None:
        """Send one event; when the journal cannot take it, leave it on stderr."""
        payload = encode_entry(self._base | journal_fields(event))
        try:
            self._socket.sendto(payload, _JOURNAL)
        except OSError:
            print(_as_json(event), file=sys.stderr)

    debug = info = warning = error = critical = fatal = exception = log = msg


def journal_fields(event: Mapping[str, Any]) -> dict[str, str]:
    """An event as journal fields: MESSAGE, PRIORITY and one upper-case field for each value."""
    named = {key: value for key, value in event.items() if key not in {"event", "level"} and value is not None}
    fields = {_field_name(key): str(value) for key, value in named.items()}
    fields["PRIORITY"] = str(_PRIORITIES.get(str(event.get("level", "info")), 6))
    # Values that explain belong into the line that people read; identifiers stay fields.
    said = [f"{key}={value}" for key, value in named.items() if key in _IN_MESSAGE]
    fields["MESSAGE"] = " ".join([str(event.get("event", "")), *said])
    return fields


def _field_name(key: str) -> str:
    """The name as journald takes it: at most 64 of A-Z, 0-9 and _, and a letter first."""
    return _FIELD.sub("_", key.upper()).lstrip("_0123456789")[:64] or "UNNAMED"


_IN_MESSAGE = ("why", "reason", "failure", "kind", "seconds", "status", "path", "method")


def encode_entry(fields: Mapping[str, str]) -> bytes:
    """The wire form of journald's native protocol; values with a newline go with their length in front."""
    lines = []
    for name, value in fields.items():
        raw = value.encode("utf-8", "replace")
        if b"\n" in raw:
            lines.append(name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n")
        else:
            lines.append(name.encode() + b"=" + raw + b"\n")
    return b"".join(lines)


def relayed(value: Mapping[str, Any]) -> None:
    """Write a vLLM record, of whatever process, into our stream with its process named."""
    exception = value.get("exception")
    level = logging.getLevelNamesMapping().get(str(value["level"]), logging.INFO)
    more = {"traceback": exception["traceback"], "exception_type": exception["type"]} if exception else {}
    get_logger().log(
        level,
        value["message"],
        vllm_process=value["process"],
        vllm_pid=value["pid"],
        logger=value["logger"],
        **more,
    )
