"""The kernel's log, where it may be read: kills for memory, crashes and GPU errors of one engine's life."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_TELLING = re.compile(
    r"Out of memory: Killed process|Memory cgroup out of memory|oom-kill:|NVRM: Xid|segfault at|general protection"
    r"|traps: |Machine check|uncorrect(?:ed|able) (?:ECC|error)",
    re.IGNORECASE,
)
_XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")
_MOST_LINES = 100


class KernelLog:
    """Reads from its making on."""

    def __init__(self, device: Path = Path("/dev/kmsg")) -> None:
        self.reason = ""
        """Why it cannot be read; empty when it can."""
        self._fd: int | None = None
        self._lines: list[str] = []
        try:
            self._fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.reason = f"{device}: {error.strerror}"

    def lines_since_start(self) -> tuple[str, ...]:
        """The lines that tell of something, the last hundred of them."""
        while self._fd is not None:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:  # overwritten before we read it; the next read goes on with what is there
                continue
            except OSError:
                break
            if not record:
                break
            self._lines += [text for line in record.decode(errors="replace").splitlines() if (text := _message(line))]
        self._lines = self._lines[-_MOST_LINES:]
        return tuple(self._lines)

    def xids(self) -> tuple[int, ...]:
        """The error numbers of NVIDIA's driver, in order."""
        return tuple(int(found[1]) for line in self.lines_since_start() if (found := _XID.search(line)))

    def close(self) -> None:
        """Stop reading."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _message(record: str) -> str | None:
    """The text of "6,1234,5678901,-;text", if it tells of something."""
    text = record.partition(";")[2] or record
    return text.strip() if _TELLING.search(text) else None
