"""`llm-serve top` in a real pseudo-terminal, asking the real operations application over a real control socket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import llm_serve
from tests.daemon import eventually
from tests.operated import operated
from tests.terminal import ENTERED, ENTRY, LEFT, Terminal


@pytest.fixture
def home() -> Iterator[Path]:
    """Where a user's instances are; short, because a socket's path is."""
    folder = Path(tempfile.mkdtemp(prefix="lls-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """Of a user with this XDG_RUNTIME_DIR, and a shell that says little."""
    own = {"XDG_RUNTIME_DIR": str(home), "PYTHONPATH": str(Path(llm_serve.__file__).parents[1]), "PS1": "$ "}
    return os.environ | own | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Those that are closed at the end."""
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


def _top(terminals: list[Terminal], environment: dict[str, str], *words: str, interval: str = "0.1") -> Terminal:
    terminals.append(Terminal([sys.executable, "-c", ENTRY, "top", *words, "--interval", interval], environment))
    return terminals[-1]


def test_it_draws_follows_the_window_and_leaves_with_q(
    home: Path, environment: dict[str, str], terminals: list[Terminal]
) -> None:
    """The one instance that runs needs no name; what it does is drawn, in the window as it is."""
    with operated(home / "llm-serve", "qwen", requests_held=1) as told:
        told.running, told.kv = 3.0, 0.5
        top = _top(terminals, environment)
        rows = top.wait_for("running       3 of 8")
        assert 24 == len(rows)
        assert rows[0].startswith("qwen: serving for 1 h 1 min: the engine answers")
        eventually(top.frame, lambda seen: "█" in seen[9], within_s=10, what="a sparkline of tokens/s")

        told.running = 8.0
        top.wait_for("running       8 of 8")
        top.resize(120, 10)
        rows = eventually(top.frame, lambda seen: len(seen) == 10, within_s=10, what="ten lines")
        assert 120 == len(rows[0])
        assert re.search(r"(?<!;1H)\x1b\[[KJ]", top.read()) is None  # nothing is erased behind what was drawn

        top.type("q")
        assert 0 == top.wait_for_exit()
    assert top.is_as_before()


@pytest.mark.parametrize(
    ("end", "status"),
    [("\x03", 0), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
    ids=["ctrl-c", "SIGTERM", "SIGHUP"],
)
def test_the_terminal_is_put_right_whatever_ends_it(
    end: str | signal.Signals, status: int, home: Path, environment: dict[str, str], terminals: list[Terminal]
) -> None:
    """And a signal ends it as who sent it expects; also while a daemon that hangs is waited for."""
    with operated(home / "llm-serve", "qwen"):
        top = _top(terminals, environment, "qwen")
        top.wait_for("running")
        top.type(end) if isinstance(end, str) else top.process.send_signal(end)

        assert status == top.wait_for_exit(3)
    assert top.is_as_before()


def test_an_error_is_shown_on_a_terminal_that_is_put_right(
    home: Path, environment: dict[str, str], terminals: list[Terminal]
) -> None:
    """Here a daemon's answer that makes no sense: the traceback can be read."""
    with operated(home / "llm-serve", "qwen") as told:
        top = _top(terminals, environment, "qwen")
        top.wait_for("running")
        told.tell(failures=({"time": "yesterday"},))

        assert 1 == top.wait_for_exit()
    assert top.is_as_before()
    assert "KeyError: 'failure'" in top.read().rpartition(LEFT)[2]


def test_a_daemon_that_comes_back_is_shown_again(
    home: Path, environment: dict[str, str], terminals: list[Terminal]
) -> None:
    """Its end is said, what was known stays, and the keys are heard meanwhile."""
    with operated(home / "llm-serve", "qwen"):
        top = _top(terminals, environment, "qwen")
        top.wait_for("running       0 of 8")
    rows = top.wait_for("qwen: not running for")
    assert "this goes on when it is back" in rows[0]
    assert rows[1].startswith("Qwen/Qwen2.5-7B on")
    with operated(home / "llm-serve", "qwen", pid=8, state="starting", phase="weights", progress=0.5):
        rows = top.wait_for("qwen: starting for")
        assert rows[2].endswith("; weights, 50%")
    top.type("q")
    assert 0 == top.wait_for_exit()


def test_several_are_a_table(home: Path, environment: dict[str, str], terminals: list[Terminal]) -> None:
    """Those that come are added; one that hangs is named, delays no key, and keeps nobody from the others."""
    with operated(home / "llm-serve", "qwen"), operated(home / "llm-serve", "other"):
        top = _top(terminals, environment)
        rows = top.wait_for("qwen")
        assert rows[0].startswith("2 instance(s)")
        with operated(home / "llm-serve", "third", state="recovering"):
            top.wait_for("third     recovering")
        top.wait_for("third     not running")
        top.type("Q")
        assert 0 == top.wait_for_exit()
    assert top.is_as_before()


def test_a_stop_and_its_end_are_as_any_program_s(
    home: Path, environment: dict[str, str], terminals: list[Terminal]
) -> None:
    """^Z in a real shell gives the terminal back to it, `fg` goes on, and `kill` ends it while it is stopped."""
    command = f'{sys.executable} -c "{ENTRY}" top qwen --interval 0.1'
    with operated(home / "llm-serve", "qwen"):
        terminals.append(shell := Terminal(["bash", "--norc", "--noediting", "-i"], environment))
        shell.type(f"{command}\n")
        shell.wait_for("running")

        shell.type("\x1a")
        eventually(shell.read, lambda seen: "Stopped" in seen.rpartition(LEFT)[2], within_s=10, what="the shell")
        assert shell.is_as_before()
        shell.type("fg\n")
        eventually(
            shell.read, lambda seen: seen.rfind(ENTERED) > seen.rfind(LEFT), within_s=10, what="the screen again"
        )
        shell.wait_for("running")
        shell.type("\x1a")
        eventually(shell.read, lambda seen: seen.count("Stopped") == 2, within_s=10, what="the shell again")
        eventually(shell.read, lambda seen: seen.endswith("$ "), within_s=10, what="a prompt")
        (stopped,) = psutil.Process(shell.process.pid).children()
        stopped.send_signal(signal.SIGCONT)
        time.sleep(0.5)  # for what it may do wrong: touch the terminal, and be stopped for that
        assert psutil.STATUS_STOPPED != stopped.status()
        shell.type("kill %1\n")
        eventually(stopped.is_running, lambda runs: not runs, within_s=10, what="its end")
        shell.type("true\n")
        eventually(shell.read, lambda seen: "Terminated" in seen, within_s=10, what="the shell's word of it")
        shell.type("exit\n")
        assert 0 == shell.wait_for_exit()
    assert shell.is_as_before()


def test_without_a_terminal_it_prints(home: Path, environment: dict[str, str]) -> None:
    """One frame, a line of JSON, or why not; a reader that has had enough ends it without a word."""

    def run(*words: str, shell: bool = False) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ENTRY, "top", *words]
        if shell:
            command = ["bash", "-o", "pipefail", "-c", '"$@" | head -n 2', "-", *command]
        return subprocess.run(
            command, env=environment | {"COLUMNS": "100"}, capture_output=True, text=True, check=False, timeout=30
        )

    with operated(home / "llm-serve", "qwen") as told:
        told.running = 2.0
        frame, line = run("qwen", "--once", "--interval", "0.1"), run("--json", "--once", "--interval", "0.1")
        endless, refused = run("qwen", "--json", "--interval", "0.1", shell=True), run("qwen")
    nobody = run("qwen", "--once")

    assert 0 == frame.returncode, frame.stderr
    assert any(row.startswith("running       2 of 8") for row in frame.stdout.splitlines())
    assert "q quits" not in frame.stdout
    assert all(len(row) <= 100 for row in frame.stdout.splitlines())
    told_line = json.loads(line.stdout)
    assert ("qwen", 2.0, 7) == (told_line["instance"], told_line["load"]["running"], told_line["pid"])
    assert abs(told_line["at"] - time.time()) < 60
    assert told_line["load"]["generated_per_s"] > 0
    assert (2, 0, "") == (len(endless.stdout.splitlines()), endless.returncode, endless.stderr)
    assert 2 == refused.returncode
    assert "llm-serve: top draws on a terminal, and this is none: use --once or --json.\n" == refused.stderr
    assert (75, "llm-serve: qwen does not run here, or not for this user.\n") == (nobody.returncode, nobody.stderr)
