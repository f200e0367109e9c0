"""The terminal as a screen of its own, which is as it was before whatever ends the program."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType
from typing import Self

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""The alternate screen, without a cursor, and nothing wraps."""
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTED = (*_ENDS, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


class Screen:
    """A context in which lines are drawn and keys are heard. Signals are noted, and acted on in `wait`."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._fd)
        self._handlers: dict[int, object] = {}
        self._noted: list[int] = []
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._is_entered = False
        self.ended_by: int | None = None
        """The signal that has asked for the end, if one has."""

    def __enter__(self) -> Self:
        for number in _NOTED:
            self._handlers[number] = signal.signal(number, self._note)
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._ear)
        os.close(self._bell)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted.append(number)
        self.wake()

    def wake(self) -> None:
        """End a `wait`; from any thread, and from a signal's handler."""
        with contextlib.suppress(OSError):
            os.write(self._bell, b".")

    def _enter(self) -> None:
        tty.setcbreak(self._fd)
        _write(_ENTER)
        self._is_entered = True

    def _leave(self) -> None:
        if not self._is_entered:
            return
        self._is_entered = False
        # The terminal may have gone; then there is nothing to put right. In the background it is the shell's by now.
        with contextlib.suppress(OSError, termios.error):
            _write(_LEAVE)
            if self._is_in_foreground():
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _is_in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # no jobs here: nobody else has the terminal
            return True

    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns, lines = 0, 0
        return columns or 80, lines or 24

    def draw(self, lines: Sequence[str]) -> None:
        """Replace what is shown; the first line stands out. In the background nothing is."""
        if not self._is_entered:
            return
        # What was there is erased first: behind a full line, the cursor stands on its last character.
        rows = [f"\x1b[{place};1H\x1b[K{_bold(line) if place == 1 else line}" for place, line in enumerate(lines, 1)]
        with contextlib.suppress(OSError):  # a terminal that has gone: its signal is on the way
            _write("".join(rows))

    def wait(self, until: float) -> str:
        """Wait for that moment of the monotonic clock, a wake, or keys, which are returned."""
        # In the background, what is typed is the shell's: whoever reads it is stopped.
        watched = [self._fd, self._ear] if self._is_entered else [self._ear]
        heard, _, _ = select.select(watched, [], [], max(0.0, until - time.monotonic()))
        if self._ear in heard:
            os.read(self._ear, 4096)
        self._act()
        if self.ended_by is not None or self._fd not in heard:
            return ""
        try:
            typed = os.read(self._fd, 64)
        except OSError:
            typed = b""
        if not typed:
            self.ended_by = signal.SIGHUP  # whoever typed has gone
        return typed.decode(errors="replace")

    def _act(self) -> None:
        """Do what the signals want that have come; an end comes before all others."""
        while self._noted:
            self.ended_by = next((each for each in self._noted if each in _ENDS), None)
            if self.ended_by is not None:
                return
            number = self._noted.pop(0)
            if number == signal.SIGTSTP:
                self._stop()
            elif number == signal.SIGCONT and self._is_in_foreground():
                # After a stop that nobody can hear, the shell has set the terminal its own way. In the background it is
                # the shell's: whoever changes it there is stopped again, and would not hear the signal that ends it.
                self._enter()

    def _stop(self) -> None:
        """Be stopped as any program is, with the terminal as it was, and go on as after any stop."""
        self._leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self._noted.append(signal.SIGCONT)  # where there are no jobs, the kernel stops nobody


def _bold(line: str) -> str:
    return f"\x1b[1m{line}\x1b[0m"


def _write(text: str) -> None:
    """All of it, at once, in the terminal's encoding."""
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "utf-8", errors="replace"))
    sys.stdout.buffer.flush()
