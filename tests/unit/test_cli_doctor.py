"""`llm-serve doctor` as a script and a person see it. Nothing is loaded here but by the trials, which are left out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.cli import doctor as command
from llm_serve.core.doctor.attention import AttentionFacts, Outcome, Shape, Trial
from llm_serve.core.doctor.findings import Finding, good, not_known, note, problem
from llm_serve.core.doctor.instance import GpuRoom
from llm_serve.engine import attention
from llm_serve.host.doctor import checks, instance
from llm_serve.host.doctor.checks import Check

DAEMON = Path(command.__file__).parents[2]


@pytest.fixture
def _empty_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is looked at, so that findings are this test's own."""
    monkeypatch.setattr(checks, "of_machine", lambda environ: ())
    monkeypatch.setattr(command, "_ports", list)
    monkeypatch.setattr(command, "_not_tried", list)


def ask(capsys: pytest.CaptureFixture[str], target: str | None = None, *, json_output: bool = True) -> tuple[int, str]:
    """The exit status and what is printed."""
    status = command.doctor(target, trials=False, timeout_s=1, json_output=json_output)
    return status, capsys.readouterr().out


@pytest.mark.usefixtures("_empty_machine")
@pytest.mark.parametrize(
    ("finding", "expected"),
    [(good("a", "b"), 0), (note("a", "b", "c"), 0), (not_known("a", "b"), 0), (problem("a", "b", "c", "d"), 75)],
)
def test_only_a_problem_is_in_the_exit_status(
    finding: Finding, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in the JSON, with the finding whole."""
    monkeypatch.setattr(checks, "of_machine", lambda environ: (Check("a", "A", lambda: [finding]),))

    status, text = ask(capsys)

    printed = json.loads(text)
    assert (expected, expected) == (status, printed["exit_status"])
    assert [finding.to_json()] == printed["findings"]
    assert 1 == printed["counts"][finding.state.value] == sum(printed["counts"].values())


@pytest.mark.usefixtures("_empty_machine")
def test_people_get_titles_and_remedies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A remedy stays on one line, however long, so that it can be copied; a check without findings has no title."""
    cure = "command " + "word " * 40 + "end"
    found = [good("a.b", "fine"), problem("a.c", "broken " * 20, "trouble", cure)]
    monkeypatch.setattr(
        checks, "of_machine", lambda environ: (Check("a", "Title", lambda: found), Check("b", "None", list))
    )

    _, text = ask(capsys, json_output=False)

    lines = text.splitlines()
    assert "Title" == lines[0]
    assert "None" not in lines
    assert "  good       a.b: fine" == lines[1]
    assert lines[2].startswith("  PROBLEM    a.c: broken broken")
    assert f"{'':13}means: trouble" in lines
    assert f"{'':13}cure:  {cure}" in lines
    assert "1 good, 0 note, 1 problem, 0 not known" == lines[-1]


@pytest.mark.usefixtures("_empty_machine")
def test_a_file_that_is_wrong_is_78_and_the_machine_is_looked_at_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every mistake is a finding."""
    monkeypatch.setattr(checks, "of_machine", lambda environ: (Check("a", "A", lambda: [good("a", "b")]),))
    (tmp_path / "a.toml").write_text('modle = "x"\n[server]\nlisten = "nowhere"\n')

    status, text = ask(capsys, str(tmp_path / "a.toml"))

    findings = json.loads(text)["findings"]
    assert 78 == status
    assert any("a.toml:1: modle" in each["found"] for each in findings)
    assert {"check": "a", "state": "good"}.items() <= findings[-1].items()


@pytest.mark.usefixtures("_empty_machine")
def test_a_gpu_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless trials are asked for. The GPU is hand-made, and so is the answer of the child."""
    facts = AttentionFacts("GPU 0", Shape(), (Trial("A", Outcome.ran),))
    monkeypatch.setattr(attention, "ask", lambda question: facts)
    monkeypatch.setattr(instance, "gpu_rooms", lambda: {0: GpuRoom("L4", 24 << 30, 2 << 30)})

    command.doctor(None, trials=None, timeout_s=1, json_output=True)
    left_alone = json.loads(capsys.readouterr().out)["findings"]
    command.doctor(None, trials=True, timeout_s=1, json_output=True)
    tried = json.loads(capsys.readouterr().out)["findings"]

    assert [("attention", "not known")] == [(each["check"], each["state"]) for each in left_alone]
    assert "2.0 GiB of 24.0 GiB are free on GPU 0" in left_alone[0]["found"]
    assert ["attention.A", "attention"] == [each["check"] for each in tried]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that this test listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


@pytest.mark.usefixtures("_empty_machine")
def test_an_instance_is_looked_at(capsys: pytest.CaptureFixture[str], tmp_path: Path, taken_port: int) -> None:
    """Its port is this test's, its model is cut short."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"\0" * 4)
    (tmp_path / "a.toml").write_text(f'model = "{tmp_path}/model"\n[server]\nlisten = "127.0.0.1:{taken_port}"\n')

    status, text = ask(capsys, str(tmp_path / "a.toml"))

    found: dict[str, list[Any]] = {}
    for each in json.loads(text)["findings"]:
        found.setdefault(each["check"], []).append(each)
    assert 75 == status
    assert f"pid {os.getpid()}" in found["instance.port"][0]["found"]
    assert ["no valid safetensors header" in each["found"] for each in found["instance.model"]] == [True, False]
    assert "good" == found["disk.TMPDIR"][0]["state"]


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    code = "from llm_serve.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(DAEMON), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments], env=environment, capture_output=True, text=True, check=False, **more
    )  # fmt: skip


def test_the_command_answers_here() -> None:
    """Without trials it takes a second or two, on any machine; vLLM is not loaded."""
    done = run("--no-trials", "--json", timeout=40)

    printed = json.loads(done.stdout)
    assert printed["exit_status"] == done.returncode
    assert {"build", "driver", "limits.files", "shm", "clock", "systemd", "attention"} <= {
        each["check"] for each in printed["findings"]
    }
    assert "" == done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="this is an ordinary user, and the test before is his")
def test_an_ordinary_user_gets_an_answer_too() -> None:
    """And is told what root would see. Files may be read, since the interpreter may lie in root's home."""
    code = "from llm_serve.cli.main import main; main()"
    drop = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    drop += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    environment = {**os.environ, "PYTHONPATH": str(DAEMON)}

    done = subprocess.run(
        [*drop, sys.executable, "-c", code, "doctor", "--no-trials"],
        env=environment, cwd="/", timeout=40, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert 75 == done.returncode, done.stderr
    assert "Asked as nobody: root also sees" in done.stdout
    assert "nobody cannot write to /root/.cache" in done.stdout
    assert "" == done.stderr


def test_help_tells_the_exit_statuses() -> None:
    """For those who write scripts."""
    done = run("--help")

    assert "75 when there is a problem" in done.stdout
    assert "llm-serve doctor qwen7b" in done.stdout
