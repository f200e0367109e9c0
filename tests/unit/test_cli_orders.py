"""`llm-serve drain`, `resume` and `reload`, asking a real control socket."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from llm_serve.cli import control
from llm_serve.cli.drain import drain, resume
from llm_serve.cli.reload import reload

DONE = {"exit_status": 0, "message": "admission is stopped: new requests wait."}
LATE = {"exit_status": 75, "message": "the instance is starting."}


class Daemon:
    """Takes orders, and tells its statuses one after the other; the last one stays."""

    def __init__(self) -> None:
        self.reply: dict[str, Any] = DONE
        self.statuses: list[dict[str, Any]] = []
        self.heard: list[str] = []

    def answer(self, method: str, path: str) -> dict[str, Any]:
        """The body of one answer."""
        self.heard.append(f"{method} {path}")
        if method == "POST":
            return self.reply
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon of this user, called qwen."""
    monkeypatch.setattr(control, "places", lambda: [tmp_path])
    path = tmp_path / "qwen/control.sock"
    path.parent.mkdir()
    known = Daemon()

    class Answer(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.dumps(known.answer(self.command, self.path)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    with socketserver.UnixStreamServer(str(path), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield known
        server.shutdown()
        thread.join()


def now(in_flight: int, held: int, *, is_drained: bool = True) -> dict[str, Any]:
    """What /status says of requests."""
    return {"requests_in_flight": in_flight, "requests_held": held, "is_drained": is_drained}


def test_drain_says_what_it_did(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """One order, and the daemon's own sentence."""
    assert 0 == drain("qwen", wait=False, json_output=False)

    assert ["POST /drain"] == daemon.heard
    assert ("qwen: admission is stopped: new requests wait.\n", "") == capsys.readouterr()


def test_resume_says_what_it_did(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The same the other way, as JSON."""
    assert 0 == resume("qwen", json_output=True)

    assert ["POST /resume"] == daemon.heard
    assert {"instance": "qwen", **DONE} == json.loads(capsys.readouterr().out)


def test_wait_returns_when_what_is_in_flight_only_waits(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests that are held are no reason to wait: they are what draining leaves."""
    daemon.statuses = [now(3, 1), now(2, 1), now(2, 2)]

    assert 0 == drain("qwen", wait=True, json_output=False)

    assert ["POST /drain", *["GET /status"] * 3] == daemon.heard
    assert "Nothing is in flight; 2 wait." in capsys.readouterr().out


def test_wait_ends_when_somebody_resumes(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What would never come is not waited for, and the status says so."""
    daemon.statuses = [now(3, 1), now(3, 0, is_drained=False)]

    assert 75 == drain("qwen", wait=True, json_output=False)
    assert "resumed meanwhile" in capsys.readouterr().err


def test_an_order_that_is_not_obeyed_is_an_error(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon's status is the command's, and its sentence goes to stderr."""
    daemon.reply = LATE

    assert (75, 75) == (drain("qwen", wait=True, json_output=False), resume("qwen", json_output=False))
    assert 2 == capsys.readouterr().err.count("llm-serve: qwen: the instance is starting.")


@pytest.mark.usefixtures("daemon")
def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 75 for an instance that does not run, whatever is ordered, and no check of its file."""
    statuses = [drain("gone", wait=True, json_output=False), resume("gone", json_output=False), reload("gone", False)]

    assert [75, 75, 75] == statuses
    assert 3 == capsys.readouterr().err.count("llm-serve: gone: does not run here")


@pytest.mark.usefixtures("daemon")
def test_what_names_no_instance_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 78, as for every other command."""
    statuses = [drain("a b", wait=False, json_output=False), resume("a b", json_output=False), reload("a b", False)]

    assert [78, 78, 78] == statuses
    assert 3 == capsys.readouterr().err.count("is not the name of an instance")


def test_a_wrong_file_is_not_offered(daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 78 with the reason and the place; the daemon has heard of no reload."""
    file = tmp_path / "qwen.toml"
    file.write_text('model = "m"\n[server]\nmax_queue = 1\n')
    daemon.statuses = [{"source": str(file)}]

    assert 78 == reload("qwen", False)

    error = capsys.readouterr().err
    assert "qwen.toml:3: server.max_queue" in error
    assert "serves on" in error
    assert ["GET /status"] == daemon.heard
