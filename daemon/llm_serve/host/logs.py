"""Where events go: journald with priority and fields under systemd, readable lines in a terminal, else JSON.

Every event is a short sentence with named values. Prompts, answers and keys are never among them.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import structlog

from llm_serve.host.journal import EXPLAINING, Journal

_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
Event = MutableMapping[str, Any]
_RECENT, _LONGEST = 200, 600

recent: deque[Mapping[str, Any]] = deque(maxlen=_RECENT)
"""The daemon's own last events, for who shows them: without those of requests, and without vLLM's and libraries' words.

Each has a Unix time, a level, a sentence, and what explains it.
"""


def set_up(instance: str, *, level: str, output_format: str = "auto") -> None:
    """Send structlog's events, and the standard library's records, to the place that fits this process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    chosen = _choose() if output_format == "auto" else output_format
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _exception_as_text,
        _keep,
    ]
    factory: Any = structlog.WriteLoggerFactory(file=sys.stderr)
    if chosen == "journal":
        last: list[Any] = [_to_journal]
        journal = Journal(instance, _as_json)
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
    atexit.register(close)
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def send_to(sink: Callable[[Event], object], *, level: str) -> None:
    """Give structlog's events, and the standard library's records, to somebody who logs them elsewhere."""

    def give(_logger: Any, _method: str, event: Event) -> Event:
        sink(event)
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            _exception_as_text,
            give,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def close() -> None:
    """Let what was logged be written, before the process ends."""
    if (journal := _journal()) is not None:
        journal.close()


def is_to_journal() -> bool:
    """True when events go to the journal, which takes them from any process."""
    return _journal() is not None


def _journal() -> Journal | None:
    journal = structlog.get_config()["logger_factory"]()
    return journal if isinstance(journal, Journal) else None


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


def _keep(_logger: Any, _method: str, event: Event) -> Event:
    is_own = event["event"] != "request" and not event.keys() & {"vllm_process", "logger"}
    if is_own and event["level"] != "debug":
        said = {name: str(event[name])[:_LONGEST] for name in (*EXPLAINING, "front_end") if event.get(name) is not None}
        entry = {"time": round(time.time(), 3), "level": event["level"], "event": str(event["event"])[:_LONGEST]}
        recent.append(entry | {"said": said})
    return event


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
