"""Carries log records of every vLLM process to the daemon as structured values, exceptions included.

The parent of a failed engine sees only "Engine core initialization failed": the cause is in a child's log.
The handler is named in the logging configuration that vLLM hands to all its processes, so it must stay light
(standard library only), survive a fork, and never block or break an engine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_TEXT_LIMIT, _TRACEBACK_LIMIT = 6000, 12000
Record = dict[str, Any]


class RelayHandler(logging.Handler):
    """Sends each record as one datagram.

    When the buffer is full, a record below ERROR is dropped, and any other waits for 0.5 s.
    """

    def __init__(self, path: str, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self._path = path
        self._owner: int | None = None
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record, or lose it: logging must not end an engine."""
        with contextlib.suppress(Exception):
            sink = self._connected()
            sink.settimeout(0.5 if record.levelno >= logging.ERROR else 0.0)
            sink.send(json.dumps(to_value(record)).encode())

    def _connected(self) -> socket.socket:
        if self._socket is None or self._owner != os.getpid():
            sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                sink.connect(self._path)
            except OSError:
                sink.close()
                raise
            self._socket, self._owner = sink, os.getpid()
        return self._socket


def to_value(record: logging.LogRecord) -> Record:
    """A record as plain JSON: who said it, what, and the exception with its chain and frames.

    `ended` is (pid, exit code) where the record is about the end of a process.
    """
    return {
        "time": record.created,
        "pid": record.process,
        "process": getattr(record, "vllm_process_name", record.processName),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage()[:_TEXT_LIMIT],
        "exception": _exception_value(record.exc_info[1]) if record.exc_info and record.exc_info[1] else None,
        "ended": getattr(record, "ended", None),
    }


def _exception_value(error: BaseException) -> Record:
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": _shortened(str(error)),
        "frames": [frame.name for frame in traceback.extract_tb(error.__traceback__)],
        "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:],
    }


def _shortened(text: str) -> str:
    """The beginning and the end, which of a quoted traceback is the error itself."""
    half = _TEXT_LIMIT // 2
    return text if len(text) <= _TEXT_LIMIT else f"{text[:half]} [...] {text[-half:]}"


def write_logging_config(path: Path, records_socket: Path, level: str = "INFO") -> None:
    """Write the file that VLLM_LOGGING_CONFIG_PATH names: vLLM's records go to the relay and nowhere else."""
    handler = {"class": "llm_serve.engine.relay.RelayHandler", "path": str(records_socket), "level": level}
    logger = {"handlers": ["relay"], "level": level, "propagate": False}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"relay": handler},
        "loggers": {"vllm": logger},
    }
    path.write_text(json.dumps(config))


class Receiver:
    """Listens for records and for raw output of the engine's processes, each in a thread of its own.

    `on_record` gets one value per log record, `on_output` one line of text; both are called in those threads.
    """

    def __init__(self, folder: Path, on_record: Callable[[Record], None], on_output: Callable[[str], None]) -> None:
        self.records_socket = folder / "records.sock"
        self.output_socket = folder / "output.sock"
        self._on_record, self._on_output = on_record, on_output
        self._records = self._bind(self.records_socket, socket.SOCK_DGRAM)
        self._records.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._output = self._bind(self.output_socket, socket.SOCK_STREAM)
        self._output.listen(8)
        for name, loop in (("engine-records", self._receive_records), ("engine-output", self._accept_output)):
            threading.Thread(target=loop, name=name, daemon=True).start()

    @staticmethod
    def _bind(path: Path, kind: socket.SocketKind) -> socket.socket:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        path.chmod(0o600)
        return listener

    def _receive_records(self) -> None:
        while True:
            try:
                value = json.loads(self._records.recv(1 << 20))
            except OSError:
                return
            except ValueError:
                continue
            _tell(self._on_record, value)

    def _accept_output(self) -> None:
        while True:
            try:
                connection, _ = self._output.accept()
            except OSError:
                return
            threading.Thread(target=self._read_output, args=(connection,), name="engine-output", daemon=True).start()

    def _read_output(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if text := line.rstrip():
                    _tell(self._on_output, text)

    def close(self) -> None:
        """Stop listening and remove the sockets."""
        for listener, path in ((self._records, self.records_socket), (self._output, self.output_socket)):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            path.unlink(missing_ok=True)


def _tell(callback: Callable[[T], None], value: T) -> None:
    """Hand one value on. What the callback cannot take is lost, but not the thread that listens."""
    with contextlib.suppress(Exception):
        callback(value)
