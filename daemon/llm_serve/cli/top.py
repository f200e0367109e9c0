"""`top`: instances live, in a terminal; or one frame, or a line of JSON at every interval, for what is no terminal."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llm_serve.cli import control
from llm_serve.cli.reports import OF_ALL_TIMEOUT_S, Watch, look_at_all
from llm_serve.cli.screen import Screen
from llm_serve.core.errors import ConfigError
from llm_serve.core.report import Report
from llm_serve.core.terminal import frame
from llm_serve.host.names import instance_path

_USAGE = 2


@dataclass
class Watched:
    """Who is looked at: one instance, or, without a name, whoever runs."""

    name: str | None
    watches: dict[str, Watch] = field(default_factory=dict)
    histories: dict[str, frame.History] = field(default_factory=dict)

    def look(self) -> list[Report]:
        """How they are now. One that has ended stays in sight, since it may come back."""
        for name in (self.name,) if self.name else sorted(control.find_all()):
            self.watches.setdefault(name, Watch(name, OF_ALL_TIMEOUT_S))
        return look_at_all(self.watches[name] for name in sorted(self.watches))

    def add(self, reports: Sequence[Report]) -> None:
        """Keep what was seen."""
        now = time.time()
        for report in reports:
            self.histories.setdefault(report.instance, frame.History()).add(report, now)

    def frame(self, reports: Sequence[Report], width: int, height: int | None, every_s: float) -> list[str]:
        """What is drawn of it, in a window of this size."""
        window = frame.Window(width, height, time.time(), time.strftime("%H:%M:%S"), every_s)
        if self.name:
            return frame.one(reports[0], self.histories[self.name], window)
        return frame.many(reports, window)

    def to_json(self, reports: Sequence[Report]) -> str:
        """One line: an object for a name, else a list."""
        told = [{"at": time.time()} | report.to_json() for report in reports]
        return json.dumps(told[0] if self.name else told)


def top(target: str | None, *, interval_s: float, once: bool, json_output: bool) -> int:
    """Show instances until that is ended.

    Returns 0, 2 where there is no terminal to draw on, 75 when there is nobody to ask, 78 for what names no instance.
    """
    try:
        name = instance_path(target).stem if target is not None else None
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if not (once or json_output or (sys.stdin.isatty() and sys.stdout.isatty())):
        print("llm-serve: top draws on a terminal, and this is none: use --once or --json.", file=sys.stderr)
        return _USAGE
    watched = Watched(name)
    reports = watched.look()
    if not any(report.status for report in reports):
        print(f"llm-serve: {_nobody(reports)}", file=sys.stderr)
        return control.TRY_AGAIN
    if name is None and len(reports) == 1:
        watched.name = reports[0].instance
    watched.add(reports)
    if once or json_output:
        return _print(watched, interval_s, once=once, json_output=json_output)
    return _live(watched, reports, interval_s)


def _nobody(reports: Sequence[Report]) -> str:
    """Why nothing can be shown."""
    if not reports:
        return "no instance runs here, or not for this user."
    return " ".join(f"{report.instance} {report.why}" for report in reports)


def _print(watched: Watched, interval_s: float, *, once: bool, json_output: bool) -> int:
    """Print what is seen, once or until it is ended; a reader that has had enough is no error."""
    try:
        while True:
            time.sleep(interval_s)
            reports = watched.look()
            watched.add(reports)
            if json_output:
                print(watched.to_json(reports), flush=True)
            else:
                columns = shutil.get_terminal_size().columns
                print(*watched.frame(reports, columns, None, interval_s), sep="\n")
            if once:
                return 0
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        return 0


def _live(watched: Watched, reports: Sequence[Report], interval_s: float) -> int:
    """Draw what is seen until a key or a signal ends it. Ends the process."""
    seen: queue.SimpleQueue[Sequence[Report] | Exception] = queue.SimpleQueue()
    with Screen() as screen:
        looking = (watched, interval_s, seen, screen.wake)
        threading.Thread(target=_keep_looking, args=looking, daemon=True).start()
        while screen.ended_by is None:
            screen.draw(watched.frame(reports, *screen.size(), interval_s))
            if "q" in screen.wait(time.monotonic() + 1).lower():
                break
            while not seen.empty():
                if isinstance(found := seen.get(), Exception):
                    raise found
                watched.add(reports := found)
    if screen.ended_by not in (None, signal.SIGINT):
        os.kill(os.getpid(), screen.ended_by)  # as whoever sent it expects
    # A look at a daemon that hangs may be under way, and nobody wants its result.
    os._exit(0)


def _keep_looking(
    watched: Watched, interval_s: float, seen: queue.SimpleQueue[Sequence[Report] | Exception], wake: Callable[[], None]
) -> None:
    """Look at every interval, apart from the drawing: a daemon that hangs must not keep keys from being heard."""
    next_at = time.monotonic()
    while True:
        now = time.monotonic()
        next_at = max(next_at + interval_s, now)
        time.sleep(next_at - now)
        try:
            seen.put(watched.look())
        except Exception as error:  # noqa: BLE001 - raised where the terminal is put right first
            seen.put(error)
        wake()
