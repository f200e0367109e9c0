"""The kernel's log, where it may be read: kills for memory, crashes and GPU errors of one engine's life.

/dev/kmsg gives one record a read. It needs CAP_SYSLOG where `kernel.dmesg_restrict` is set.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections import deque
from collections.abc import Collection
from pathlib import Path

_TELLING = re.compile(
    r"Killed process \d|oom-kill:|Memory cgroup out of memory"
    r"|NVRM: (?:Xid|API mismatch)|fallen off the bus"
    r"|segfault at|general protection|traps: "
    r"|Machine check|\[Hardware Error\]|hardware memory|EDAC \S+: \d+ UE|uncorrect(?:ed|able) (?:ECC|error)",
    re.IGNORECASE,
)
_XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")
_ADDRESS = r"\b([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\b"
_BUS = re.compile(_ADDRESS, re.IGNORECASE)
_GPU = re.compile(f"NVRM: .*?{_ADDRESS}", re.IGNORECASE)
_MOST_LINES = 100
_RECORD_BYTES = 16384
"""The kernel's own buffer for one is 8192."""


class KernelLog:
    """Reads from its making on, or what there is `from_boot`. Errors of GPUs other than those named are left out."""

    def __init__(
        self, device: Path = Path("/dev/kmsg"), *, pci_bus_ids: Collection[str] = (), from_boot: bool = False
    ) -> None:
        self.reason = ""
        """Why it cannot be read; empty when it can."""
        self._ours = {_numbers(found) for each in pci_bus_ids if (found := _BUS.match(each))}
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._fd: int | None = None
        try:
            self._fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.reason = f"{device}: {error.strerror}"
            return
        self._release = weakref.finalize(self, os.close, self._fd)
        with contextlib.suppress(OSError):  # a pipe has no past to skip
            os.lseek(self._fd, 0, os.SEEK_SET if from_boot else os.SEEK_END)

    def lines_since_start(self) -> tuple[str, ...]:
        """The lines that tell of something, the last hundred of them."""
        while record := self._read():
            # A continuation line, as " SUBSYSTEM=pci", names the record's device.
            texts = (_text(line) for line in record.splitlines() if not line.startswith(" "))
            self._lines.extend(text for text in texts if _TELLING.search(text) and self._is_ours(text))
        return tuple(self._lines)

    def xids(self) -> tuple[int, ...]:
        """The error numbers of NVIDIA's driver, oldest first."""
        return tuple(int(found[1]) for line in self.lines_since_start() if (found := _XID.search(line)))

    def close(self) -> None:
        """Stop reading; what was read stays. One that is forgotten closes itself."""
        if self._fd is not None:
            self._release()
            self._fd = None

    def _read(self) -> str:
        """The next record; empty when there is none for now."""
        while self._fd is not None:
            try:
                return os.read(self._fd, _RECORD_BYTES).decode(errors="replace")
            except BrokenPipeError:  # overwritten before it was read; the next read goes on with what is there
                continue
            except OSError:
                break
        return ""

    def _is_ours(self, text: str) -> bool:
        found = _GPU.search(text)
        return found is None or not self._ours or _numbers(found) in self._ours


def _text(line: str) -> str:
    """The message in "6,1234,5678901,-;message"."""
    prefix, semicolon, message = line.partition(";")
    return (message if semicolon and prefix[:1].isdigit() else line).strip()


def _numbers(address: re.Match[str]) -> tuple[int, ...]:
    """(domain, bus, device): the kernel writes 0000:3b:00, NVML 00000000:3B:00.0."""
    return tuple(int(number, 16) for number in address.groups())
