"""A program in a pseudo-terminal, for what only shows in one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Mapping

import psutil

from tests.daemon import eventually

ENTRY = "from llm_serve.cli.main import main; import sys; sys.argv[0] = 'llm-serve'; main()"
ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"
_ROW = re.compile(r"\x1b\[(\d+);1H\x1b\[K([^\x1b]*(?:\x1b\[\d*m[^\x1b]*)*)")


class Terminal:
    """A program in a terminal of its own, and what it has written there."""

    def __init__(self, command: list[str], environment: Mapping[str, str], columns: int = 80, lines: int = 24) -> None:
        self._ours, self._its = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self._its)
        self.written = ""
        # setsid -c: the terminal is its controlling one, so that ^C in it is a signal.
        self.process = subprocess.Popen(
            ["setsid", "-c", *command], stdin=self._its, stdout=self._its, stderr=self._its, env=environment
        )

    def resize(self, columns: int, lines: int) -> None:
        """As a window is dragged; the kernel tells the program."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        """On its keyboard."""
        os.write(self._ours, keys.encode())

    def read(self) -> str:
        """All that it has written so far."""
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self.written += os.read(self._ours, 1 << 16).decode(errors="replace")
            except OSError:
                break
        return self.written

    def frame(self) -> list[str]:
        """The last whole frame."""
        frames = self.read().split("\x1b[1;1H")
        rows = _ROW.findall("\x1b[1;1H" + frames[-2]) if len(frames) > 2 else []
        return [re.sub(r"\x1b\[[0-9]*m", "", row) for _, row in rows]

    def wait_for(self, words: str, within_s: float = 15) -> list[str]:
        """A frame with these words in it."""
        return eventually(self.frame, lambda rows: any(words in row for row in rows), within_s=within_s, what=words)

    def wait_for_exit(self, within_s: float = 10) -> int:
        """Its exit status."""
        status = eventually(
            lambda: (self.read(), self.process.poll())[1], lambda seen: seen is not None, within_s=within_s, what="exit"
        )
        assert status is not None
        return status

    def is_as_before(self) -> bool:
        """The alternate screen has been left, and the keyboard is as it was."""
        shown = self.read()
        return shown.rfind(LEFT) > shown.rfind(ENTERED) >= 0 and self.before == termios.tcgetattr(self._its)

    def close(self) -> None:
        """End whatever runs in it."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._its)
