"""`llm-serve reset`, on real folders."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_serve.cli import reset as command
from llm_serve.cli.main import app
from llm_serve.host import boot
from llm_serve.host.state_file import FAILURES, LEARNED, StateFile


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's folders below tmp_path, and a shell outside of any unit."""
    monkeypatch.setattr(command, "_SYSTEM_STATE", tmp_path / "var")
    monkeypatch.setattr(command, "_SYSTEM_RUNTIME", tmp_path / "run")
    monkeypatch.setattr(command, "_shared_base", lambda: tmp_path / "tmp")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def learned(folder: Path) -> Path:
    """A state folder in which something was learned, beside a file that is none of reset's business."""
    folder.mkdir(parents=True, exist_ok=True)
    StateFile(folder, LEARNED).write({"format": 1})
    StateFile(folder, FAILURES).write({"format": 1, "failures": []})
    (folder / "shared-memory.txt").write_text("psm_1")
    return folder


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[None]:
    """Something that listens on the control socket of the unit's instance."""
    path = tmp_path / "run/qwen/control.sock"
    path.parent.mkdir(parents=True)
    with socketserver.UnixStreamServer(str(path), socketserver.BaseRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def left_in(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_a_unit_s_memory_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both files are gone, nothing else is, and it is said where they were."""
    folder = learned(tmp_path / "var/qwen")

    assert 0 == command.reset("qwen", json_output=False)

    assert ["shared-memory.txt"] == left_in(folder)
    assert [
        f"removed {folder}/learned.json",
        f"removed {folder}/failures.json",
        "qwen begins with what its file asks for at its next start.",
    ] == capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("target", ["qwen", "qwen.toml", "/elsewhere/qwen.toml", "./qwen.toml"])
def test_outside_of_a_unit_the_memory_is_where_the_daemon_keeps_it(target: str, tmp_path: Path) -> None:
    """The same folder as the daemon's, for a name as for a file, which need not be there."""
    runtime = boot.runtime_folder("qwen", os.environ)
    folder = learned(boot.state_folder(runtime, os.environ))

    assert 0 == command.reset(target, json_output=False)

    assert tmp_path / "user/llm-serve/qwen" == folder
    assert ["shared-memory.txt"] == left_in(folder)


@pytest.mark.parametrize("variables", [("STATE_DIRECTORY",), ("RUNTIME_DIRECTORY",), ("STATE_DIRECTORY", "RUNTIME_DIRECTORY")])  # fmt: skip
def test_the_environment_of_a_daemon_leads_to_its_memory(
    variables: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, or a unit with other folders: what the daemon goes by, `reset` goes by."""
    for name in variables:
        monkeypatch.setenv(name, f"{tmp_path}/{name}:{tmp_path}/other")
    runtime = boot.runtime_folder("qwen", os.environ)
    folder = learned(boot.state_folder(runtime, os.environ))

    assert 0 == command.reset("qwen", json_output=False)

    assert tmp_path / variables[0] == folder
    assert ["shared-memory.txt"] == left_in(folder)


def test_another_instance_keeps_its_memory(tmp_path: Path) -> None:
    """One name, one memory."""
    other = learned(tmp_path / "var/qwen2")
    learned(tmp_path / "var/qwen")

    assert 0 == command.reset("qwen", json_output=False)

    assert ["failures.json", "learned.json", "shared-memory.txt"] == left_in(other)


@pytest.mark.usefixtures("daemon")
def test_a_running_daemon_is_taken_into_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps its plan until an engine starts; a person should know that nothing changes before."""
    learned(tmp_path / "var/qwen")

    assert 0 == command.reset("qwen", json_output=False)

    last = capsys.readouterr().out.splitlines()[-1]
    assert "qwen runs, and its engine stays as it is: the file counts again from the next engine start." == last


def test_a_socket_that_a_killed_daemon_left_is_not_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers on it."""
    (tmp_path / "run/qwen").mkdir(parents=True)
    socketserver.UnixStreamServer(
        str(tmp_path / "run/qwen/control.sock"), socketserver.BaseRequestHandler
    ).server_close()
    learned(tmp_path / "var/qwen")

    assert 0 == command.reset("qwen", json_output=False)
    assert "at its next start" in capsys.readouterr().out


def test_nothing_to_forget_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence says where it was looked for; nothing is made there."""
    assert 0 == command.reset("qwen", json_output=False)

    places = f"{tmp_path}/user/llm-serve/qwen or {tmp_path}/var/qwen"
    assert f"qwen: nothing is remembered in {places}.\n" == capsys.readouterr().out
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "Run it with sudo, or as the user that the instance runs as."),
        (OSError(30, "Read-only file system"), "Make the disk writable, and try again."),
    ],
    ids=["not allowed", "read-only"],
)
def test_what_cannot_be_removed_is_75(
    error: OSError,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What to do about it is on stderr, and what could be removed is removed nevertheless."""
    folder, mine = learned(tmp_path / "var/qwen"), learned(tmp_path / "user/llm-serve/qwen")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(folder):
            raise error
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)

    assert 75 == command.reset("qwen", json_output=False)

    captured = capsys.readouterr()
    assert [
        f"llm-serve: cannot remove {folder}/{name}: {error.strerror}. {remedy}" for name in (LEARNED, FAILURES)
    ] == captured.err.splitlines()
    assert ["shared-memory.txt"] == left_in(mine)
    assert f"removed {mine}/learned.json" in captured.out


@pytest.mark.parametrize(("has_own", "status"), [(True, 0), (False, 75)], ids=["own instance", "no own instance"])
def test_a_folder_that_cannot_be_seen_into(
    has_own: bool,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The service's state is closed to others: who has an instance of that name himself means his own."""
    if has_own:
        learned(tmp_path / "user/llm-serve/qwen")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(tmp_path / "var"):
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)

    assert status == command.reset("qwen", json_output=False)
    assert has_own == ("removed" in capsys.readouterr().out)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /tmp another user can be there first, with links to files that only root may remove."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    folder = learned(tmp_path / "tmp/llm-serve/qwen")
    uid = os.getuid()
    monkeypatch.setattr("llm_serve.cli.reset.os.getuid", lambda: uid + 1)

    assert 0 == command.reset("qwen", json_output=False)
    assert ["failures.json", "learned.json", "shared-memory.txt"] == left_in(folder)

    monkeypatch.setattr("llm_serve.cli.reset.os.getuid", lambda: uid)
    assert 0 == command.reset("qwen", json_output=False)
    assert ["shared-memory.txt"] == left_in(folder)


@pytest.mark.usefixtures("daemon")
def test_json_tells_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object for a script."""
    folder = learned(tmp_path / "var/qwen")

    assert 0 == command.reset("qwen", json_output=True)

    assert {
        "instance": "qwen",
        "folders": [f"{tmp_path}/user/llm-serve/qwen", str(folder)],
        "removed": [f"{folder}/learned.json", f"{folder}/failures.json"],
        "failed": [],
        "is_running": True,
    } == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("target", ["a b", "-", "/", "..", "../..", ""])
def test_what_names_no_instance_is_refused(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 78, and nothing above the instances' folders is touched."""
    learned(tmp_path / "var")
    learned(tmp_path)

    assert 78 == command.reset(target, json_output=True)

    captured = capsys.readouterr()
    assert "" == captured.out
    assert "name" in captured.err
    assert "learned.json" in left_in(tmp_path / "var")
    assert "learned.json" in left_in(tmp_path)


def test_the_command_is_there() -> None:
    """Its help has an example, and its status is the process's."""
    helped = CliRunner().invoke(app, ["reset", "--help"])
    done = CliRunner().invoke(app, ["reset", "qwen"])

    assert "Example: llm-serve reset qwen7b" in helped.stdout
    assert (0, True) == (done.exit_code, "nothing is remembered" in done.stdout)
