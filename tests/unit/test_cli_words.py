"""What the command line says of itself: help with examples that parse, completion in real shells, manual pages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from llm_serve.cli.main import app
from llm_serve.core.settings import GpuSettings, LogSettings, RecoverySettings, ServerSettings
from tests.daemon import eventually
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
ENTRY = "from llm_serve.cli.main import main; import sys; sys.argv[0] = 'llm-serve'; main()"


def _group() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


COMMANDS = sorted(_group().commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    """By the command's own parser: no option that was renamed, no argument that is missing."""
    command = _group().commands[name]
    assert command.epilog is not None
    found = re.fullmatch(r"Example: (?:\. <\()?llm-serve (.*?)\)?", command.epilog)
    assert found is not None
    first, *words = shlex.split(found[1])

    assert name == first
    command.make_context(name, words)
    assert command.help


# ---- completion -------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a user with a program called llm-serve, and two instances that run."""
    folder = Path(tempfile.mkdtemp(prefix="lls-"))
    (folder / "bin").mkdir()
    program = folder / "bin/llm-serve"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{ENTRY}" "$@"\n')
    program.chmod(0o755)
    listening = []
    for name in ("qwen7b", "qwen32b"):
        path = folder / "llm-serve" / name / "control.sock"
        path.parent.mkdir(parents=True)
        listening.append(socket.socket(socket.AF_UNIX))
        listening[-1].bind(str(path))
    own = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "daemon"), "HOME": str(folder)}
    yield os.environ | own | {"XDG_RUNTIME_DIR": str(folder), "ZDOTDIR": str(folder), "XDG_CONFIG_HOME": str(folder)}
    for each in listening:
        each.close()
    shutil.rmtree(folder)


def _run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=50)


BASH = """
. <(llm-serve completion bash)
complete -p llm-serve >&2
for words in "llm-serve st" "llm-serve status qwen" "llm-serve top --i" "llm-serve top qwen3"; do
    COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _llm_serve_completion llm-serve
    echo "$words: ${COMPREPLY[*]}"
done
"""
FISH = """
llm-serve completion fish | source
for words in "llm-serve st" "llm-serve status qwen" "llm-serve top --i" "llm-serve top qwen3"
    echo "$words: "(complete -C $words | string replace -r '\\t.*' '' | string join ' ')
end
"""
COMPLETED = {
    "st": {"status", "stress"},
    "status qwen": {"qwen32b", "qwen7b"},
    "top --i": {"--interval"},
    "top qwen3": {"qwen32b"},
}


@pytest.mark.parametrize(("shell", "script"), [("bash", BASH), ("fish", FISH)])
def test_a_shell_completes_commands_options_and_instances(shell: str, script: str, environment: dict[str, str]) -> None:
    """A real one, asked for what it would offer."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")

    done = _run(environment, shell, "-c", script)

    told = dict(line.removeprefix("llm-serve ").split(":", 1) for line in done.stdout.splitlines())
    assert COMPLETED == {words: set(found.split()) for words, found in told.items()}, done.stderr


def test_zsh_completes_commands_options_and_instances(environment: dict[str, str]) -> None:
    """It offers nothing outside a terminal: here it has one, in which a tab is typed."""
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    lines = (
        "autoload -U compinit; compinit -u; . <(llm-serve completion zsh)",
        "PS1='ready> '; LISTMAX=0; unsetopt beep",
    )
    (Path(environment["ZDOTDIR"]) / ".zshrc").write_text("\n".join(lines) + "\n")
    zsh = Terminal(["zsh", "-i"], environment | {"TERM": "dumb"})
    try:
        eventually(zsh.read, lambda seen: "ready> " in seen, within_s=20, what="a prompt")
        for words, offered in {
            "st": ["status"],
            "status qwen": ["qwen32b", "qwen7b"],
            "top --i": ["--interval"],
        }.items():
            before = len(zsh.read())
            zsh.type(f"llm-serve {words}\t")
            for word in offered:
                eventually(
                    lambda word=word, before=before: zsh.read()[before:],  # type: ignore[misc]
                    lambda seen, word=word: word in seen,  # type: ignore[misc]
                    within_s=15,
                    what=f"{words}: {word}",
                )
            zsh.type("\x15")
    finally:
        zsh.close()


def test_another_shell_is_refused_in_a_line(environment: dict[str, str]) -> None:
    """Wrong usage."""
    done = _run(environment, "llm-serve", "completion", "csh")

    assert (2, "") == (done.returncode, done.stdout)
    assert "llm-serve: completion is there for bash, zsh, fish, not for 'csh'.\n" == done.stderr


# ---- manual pages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written as a package does it."""
    folder = tmp_path_factory.mktemp("man")
    environment = os.environ | {"SOURCE_DATE_EPOCH": "86400"}
    subprocess.run([sys.executable, str(ROOT / "packaging/man"), str(folder)], env=environment, check=True)
    return folder


def _shown(page: Path) -> str:
    """As a reader sees it, without hyphens at the ends of lines; and nothing may be said against the page."""
    environment = os.environ | {"MANWIDTH": "200", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": "", "PAGER": "cat"}
    done = subprocess.run(
        ["man", "--warnings", "-l", str(page)], env=environment, capture_output=True, text=True, check=True
    )
    assert "" == done.stderr
    return re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)


@pytest.mark.skipif(shutil.which("man") is None, reason="no man here")
def test_the_manual_has_every_command_and_option(pages: Path) -> None:
    """With its help and its example, word for word."""
    shown = _shown(pages / "llm-serve.8")

    for name, command in _group().commands.items():
        assert f"llm-serve {name} " in shown
        assert f" {(command.epilog or '').removeprefix('Example: ')}\n" in shown
        for param in command.params:
            assert all(option in shown for option in param.opts if option.startswith("-"))
    assert all(f" {status} " in shown for status in (0, 2, 70, 75, 78))
    assert "1970-01-02" in shown


@pytest.mark.skipif(shutil.which("man") is None, reason="no man here")
def test_the_manual_has_every_key_of_the_file_with_its_default(pages: Path) -> None:
    """And its explanation, as the settings have it."""
    shown = _shown(pages / "llm-serve.toml.5")
    words = " ".join(shown.split())

    tables: dict[str, type[BaseModel]] = {
        "server": ServerSettings,
        "recovery": RecoverySettings,
        "gpu": GpuSettings,
        "log": LogSettings,
    }
    for table, model in tables.items():
        assert f"[{table}]" in shown
        for name, field in model.model_fields.items():
            assert f"{name} (" in shown
            assert " ".join((field.description or "no description").replace("`", "").split()) in words
    assert 'level (default "info"; one of "debug", "info", "warning", "error")' in shown
    assert "hold_timeout_s (default 300; at least 0; at most 2592000)" in shown
    assert "model (must be given)" in shown


@pytest.mark.parametrize(
    "command",
    [("groff", "-man", "-Tutf8", "-ww", "-z"), ("mandoc", "-T", "lint", "-W", "warning")],
    ids=["groff", "mandoc"],
)
def test_nothing_is_said_against_the_pages(command: tuple[str, ...], pages: Path) -> None:
    """By what formats them."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")

    done = subprocess.run([*command, *map(str, sorted(pages.iterdir()))], capture_output=True, text=True, check=False)

    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_units_name_the_manual() -> None:
    """What `systemctl help` opens."""
    units = [*ROOT.glob("systemd/*.service"), *ROOT.glob("systemd/*.target")]

    assert units
    assert all("Documentation=man:llm-serve(8)" in unit.read_text() for unit in units)
