"""`llm-serve import`: what is no input is one line and status 2, before vLLM is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_serve.cli import import_ as command
from llm_serve.cli.main import app
from llm_serve.core.launch import Launch, NotImportable
from tests.catalogue import CATALOGUE


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.sh", "ls -l\n", "no command in it starts vLLM's server"),
        ("a.sh", "vllm serve a\nvllm serve b\n", "2 commands start vLLM (lines 1, 2)"),
        ("a.sh", "\nvllm serve 'a\n", "line 2: a closing ' is missing"),
        ("a.sh", "", "no command in it starts vLLM's server"),
        ("a.yaml", "services: {a: {image: nginx}}", "no service starts vLLM (services: a)"),
        ("a.yaml", "services:\n  a: {image: vllm/x, command: m}\n  b: {image: vllm/x, command: m}", "--service a or --service b"),
        ("a.yaml", "model: [1\n", "line 2: not YAML:"),
        ("a.yaml", "- a\n", "holds no options"),
        ("a.yaml", "apiVersion: v1\nkind: Pod\n", "manifest of Kubernetes"),
        ("a.yml", "a: 1\nb\n", "not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_input_is_one_line_that_names_it(
    name: str, text: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, the place and what is wrong; nothing on stdout, and no seconds spent on vLLM."""
    monkeypatch.setattr(command, "_catalogue", lambda: pytest.fail("vLLM was asked"))
    Path(name).write_text(text)

    assert 2 == command.import_([name], None, None, force=False)
    out, err = capsys.readouterr()

    assert "" == out
    assert err.startswith(f"llm-serve: import: {name}: ")
    assert message in err
    assert 1 == err.count("\n")


def test_files_that_cannot_be_read_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Absent, a folder, no text, too long."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_bytes(b"#" * 1_000_001)
    for name, words in {
        "none": "No such file",
        ".": "Is a directory",
        "binary": "UTF-8",
        "long": "longer than",
    }.items():
        assert 2 == command.import_([name], None, None, force=False)
        assert words in capsys.readouterr().err


def test_words_go_after_two_dashes() -> None:
    """Their options are not ours; without the dashes they would be, and the help shows how it is done."""
    done = CliRunner().invoke(app, ["import", "--", "ls", "-l", "--color"])

    assert 2 == done.exit_code
    assert "this is not a command that starts vLLM's server" in done.stderr
    assert "-- vllm serve" in CliRunner().invoke(app, ["import", "--help"]).stdout


def test_a_service_is_one_of_a_compose_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are no services, none was meant."""
    assert 2 == command.import_(["vllm", "serve", "m"], None, "a", force=False)
    assert "--service names one of a compose file" in capsys.readouterr().err


def test_stdin_is_read_for_a_dash_and_for_nothing() -> None:
    """A pipe needs no argument; a terminal is told what to give."""
    for arguments in (["import", "-"], ["import"]):
        done = CliRunner().invoke(app, arguments, input="ls\n")
        assert (2, True) == (done.exit_code, "import: stdin: no command" in done.stderr)


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody sits before a command that says nothing."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    assert 2 == command.import_([], None, None, force=False)
    assert "give a file" in capsys.readouterr().err


def test_a_file_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other one is kept as it was, which is said at once; what cannot be written is said too."""
    file = tmp_path / "a.toml"
    command._deliver("new", file, force=False)
    with pytest.raises(NotImportable, match="--force"):
        command._deliver("newer", file, force=False)
    assert 2 == command.import_(["vllm", "serve", "m"], file, None, force=False)
    assert "a.toml exists already" in capsys.readouterr().err
    assert "new" == file.read_text()

    command._deliver("x", file, force=True)
    assert "x" == file.read_text()
    with pytest.raises(NotImportable, match="cannot be written"):
        command._deliver("x", tmp_path / "none" / "a.toml", force=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vllm serve m --hf-overrides '{\"a\": 1}'", False),
        ("A: b c\nvllm serve m", False),
        ("model: m\nmax-model-len: 4\n", True),
        ("services:\n  a:\n    image: x\n", True),
        ("#!/bin/sh\nexport A=1\n", False),
    ],
)
def test_yaml_is_told_from_shell_by_what_it_says(text: str, expected: bool) -> None:
    """A name's ending may be anything, and stdin has none."""
    assert expected is (command._mapping(command.Source(text=text, name="stdin")) is not None)


def test_the_options_of_a_config_file_come_first(tmp_path: Path) -> None:
    """After the model, before the command's own words, which count for more."""
    (tmp_path / "c.yaml").write_text("max-num-seqs: 3\n")
    launch = Launch(("m", "--port", "1", "--config", "c.yaml", "--enforce-eager"))

    found = command._with_config(launch, tmp_path, CATALOGUE)

    assert ("m", "--max-num-seqs=3", "--port", "1", "--enforce-eager") == found.args
    for config in ("none.yaml", "."):
        other = Launch(("m", f"--config={config}"))
        assert other == command._with_config(other, tmp_path, CATALOGUE)
