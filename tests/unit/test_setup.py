"""packaging/setup, which is `llm-serve setup`: which environment it builds, and what its links point to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main

from llm_serve.cli.main import app
from tests.daemon import eventually
from tests.unit.test_install import load_script

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "packaging" / "setup"

setup: Any = load_script("setup")
install: Any = setup.install


@pytest.fixture
def store(tmp_path: Path) -> Any:
    (tmp_path / "venvs").mkdir()
    return setup.Store(tmp_path)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose wheel is version 0.2.0."""
    file = tmp_path / "llm_serve-0.2.0-py3-none-any.whl"
    file.write_bytes(b"wheel")
    monkeypatch.setattr(setup, "the_wheel", lambda: file)
    return file


def made(store: Any, name: str, backend: str = "cpu", *, finished: bool = True) -> Path:
    """An environment as a run leaves it, without what is in it."""
    venv: Path = store.venvs / name
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").write_text("version = {}.{}.1\n".format(*sys.version_info))
    if finished:
        (venv / setup.FINISHED).write_text(json.dumps({"version": name, "backend": backend}))
    return venv


def built(store: Any, name: str, wheel: Path, backend: str = "cpu") -> Path:
    """One that has been through every step for this wheel."""
    venv = made(store, name, backend)
    environment = install.Environment(venv, backend, "auto", wheel)
    environment.take_over()
    stamp = {"backend": backend, "python": list(environment.version), "revision": install.REVISION}
    stamp["done"] = {step: key for step, key, _ in environment.steps(dev=False)}
    (venv / install.STAMP).write_text(json.dumps(stamp))
    return venv


def place(store: Any, backend: str = "cpu") -> tuple[str, bool]:
    environment, is_finished = setup.place_for(store, "0.2.0", backend, "auto", None)
    return environment.venv.name, is_finished


def test_first_environment_has_the_version_s_name(store: Any, wheel: Path) -> None:
    assert ("0.2.0", False) == place(store)


def test_finished_environment_is_found_again(store: Any, wheel: Path) -> None:
    built(store, "0.2.0", wheel)

    assert ("0.2.0", True) == place(store)


def test_unfinished_environment_is_gone_on_with(store: Any, wheel: Path) -> None:
    (built(store, "0.2.0", wheel) / setup.FINISHED).unlink()

    assert ("0.2.0", False) == place(store)


def test_another_backend_never_touches_what_instances_may_run_in(store: Any, wheel: Path) -> None:
    built(store, "0.2.0", wheel)

    assert ("0.2.0.2", False) == place(store, "cuda")
    built(store, "0.2.0.2", wheel, "cuda")
    assert ("0.2.0.2", True) == place(store, "cuda")
    assert ("0.2.0", True) == place(store, "cpu")


def test_another_wheel_of_the_same_version_gets_a_folder_of_its_own(store: Any, wheel: Path) -> None:
    built(store, "0.2.0", wheel)
    wheel.write_bytes(b"another")

    assert ("0.2.0.2", False) == place(store)


def test_environment_whose_python_is_gone_is_left_alone(store: Any, wheel: Path) -> None:
    """As after an upgrade of Debian, which takes its Python 3.11 away."""
    venv = built(store, "0.2.0", wheel)
    (venv / "bin" / "python").unlink()

    assert ("0.2.0.2", False) == place(store)


def test_links_follow_each_activation_and_the_rollback(store: Any) -> None:
    one, two = made(store, "1"), made(store, "2")
    seen = []
    for act in (lambda: store.activate(one), lambda: store.activate(two), lambda: store.activate(two), store.roll_back):
        act()
        seen.append((store.at("current"), store.at("previous")))

    assert [(one, None), (two, one), (two, one), (one, two)] == seen


def test_current_is_there_at_every_moment_of_a_change(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before any of its steps, a change leaves a current environment, and the next run completes it."""
    one, two = made(store, "1"), made(store, "2")
    store.activate(one)
    for steps in range(4):
        left = iter([None] * steps)
        real = Path.replace

        def replace(path: Path, to: Path, left: Iterator[None] = left, real: Any = real) -> Path:
            next(left)  # StopIteration stands for the power cut
            return Path(real(path, to))

        with monkeypatch.context() as patched, contextlib.suppress(StopIteration):
            patched.setattr(setup.Path, "replace", replace)
            store.activate(two)
        assert store.at("current") in {one, two}
        store.activate(two)
        assert (two, one) == (store.at("current"), store.at("previous"))
        store.roll_back()


@pytest.mark.parametrize("before", [None, "unfinished"])
def test_rollback_without_a_sound_environment_changes_nothing(store: Any, before: str | None) -> None:
    if before:
        store.activate(made(store, before, finished=False))
    store.activate(made(store, "2"))

    with pytest.raises(setup.SetupError) as caught:
        store.roll_back()

    assert 70 == caught.value.status
    assert store.at("current").name == "2"


def test_prune_keeps_both_links_and_what_runs(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, idle, used = (made(store, name) for name in ("1", "2", "idle", "used"))
    store.activate(one)
    store.activate(two)
    # A file of it is mapped into a process, as its libraries are into an instance.
    (used / "library.so").write_bytes(b"x" * 4096)
    code = (
        f"import mmap; f = open('{used}/library.so', 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        setup.prune(store)
        user.communicate(b"\n")

    said = capsys.readouterr().out
    assert [one, two, used] == store.all()
    assert f"removed {idle}" in said
    assert f"{used} stays: 1 processes" in said


def test_one_run_excludes_another(store: Any) -> None:
    with setup.alone(store.prefix):
        done = run("--prune", "--prefix", str(store.prefix))

    assert (75, "") == (done.returncode, done.stdout)
    assert "another llm-serve setup is running" in done.stderr


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--json"], 2, "--json goes with --list"),
        (["--rollback", "--prune"], 2, "not allowed with"),
        (["--backend", "rocm"], 2, "invalid choice"),
        (["--find-links", "/nowhere"], 2, "/nowhere is no folder"),
        (["--rollback"], 70, "no environment to go back to"),
        ([], 75, "no wheel of llm-serve"),
    ],
)
def test_wrong_use_is_said_in_a_line(tmp_path: Path, words: list[str], status: int, said: str) -> None:
    done = run(*words, "--prefix", str(tmp_path))

    assert status == done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_run_whose_terminal_is_closed_leaves_no_program_and_can_be_run_again(tmp_path: Path) -> None:
    package, prefix, wheels = tmp_path / "package", tmp_path / "opt", tmp_path / "wheels"
    shutil.copytree(install.LOCKS, package / "locks", ignore=shutil.ignore_patterns("dev.txt", "cuda.txt"))
    for name in ("setup", "install"):
        shutil.copy(ROOT / "packaging" / name, package)
    (package / "llm_serve-0.2.0-py3-none-any.whl").touch()
    wheels.mkdir()
    words = [sys.executable, str(package / "setup"), "--prefix", str(prefix), "--backend", "cpu"]
    words += ["--find-links", str(wheels)]

    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        # `python -m venv`, and the pip that it starts.
        descendants = partial(psutil.Process(started.pid).children, recursive=True)
        children = eventually(descendants, lambda found: len(found) > 1, within_s=20, what="pip")
        started.send_signal(signal.SIGHUP)
        said = started.communicate(timeout=20)[1]
    again = subprocess.run(words, capture_output=True, text=True, check=False)

    assert (130, True) == (started.returncode, "run it again" in said)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "virtual environment" in again.stdout
    assert (70, True) == (again.returncode, "No matching distribution" in again.stderr)
    assert not (prefix / "current").exists()


def test_list_says_which_is_which(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store.activate(made(store, "1"))
    store.activate(made(store, "2", "cuda"))
    made(store, "3", finished=False)

    setup.show(store, as_json=False)
    shown = capsys.readouterr().out.splitlines()
    setup.show(store, as_json=True)
    rows = json.loads(capsys.readouterr().out)

    assert [
        ["1", "cpu", "0.0", "GB", "previous"],
        ["2", "cuda", "0.0", "GB", "current"],
        ["3", "unfinished", "0.0", "GB"],
    ] == [line.split() for line in shown]
    assert [("1", ["previous"]), ("2", ["current"]), ("3", [])] == [(row["name"], row["links"]) for row in rows]


def test_environment_s_own_help_names_the_same_options() -> None:
    """`llm-serve setup --help` is answered by the program where the package is, and by the environment in completion."""
    program = {word for action in setup.parser()._actions for word in action.option_strings}
    command: Any = typer.main.get_command(app).commands["setup"]  # type: ignore[attr-defined]
    ours = {word for option in command.params for word in option.opts}

    assert program - {"--prefix", "--help", "-h"} == ours


def launcher_without_environment(**variables: str) -> subprocess.CompletedProcess[str]:
    text = (ROOT / "packaging/debian/launcher").read_text()
    assert "/opt/llm-serve/current" in text
    words = ["sh", "-c", text.replace("/opt/llm-serve/current", "/nowhere/current"), "llm-serve", "run", "x"]
    return subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_launcher_without_an_environment_says_what_comes_first() -> None:
    done = launcher_without_environment()

    assert (78, "") == (done.returncode, done.stdout)
    assert re.fullmatch(r"llm-serve: .*llm-serve setup\n", done.stderr)


def test_launcher_is_silent_when_a_shell_completes() -> None:
    done = launcher_without_environment(_LLM_SERVE_COMPLETE="complete_bash")

    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)
