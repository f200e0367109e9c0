"""`llm-serve stress` as a process: on this machine, and on one with a stand-in for GPUs, where its tests really run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llm_serve
from llm_serve.cli import control
from llm_serve.cli import stress as command
from llm_serve.core.doctor.gpus import ProcessFacts
from llm_serve.core.errors import HostError
from tests.patience import patient
from tests.stress_machine import Sensors

_ROOT = Path(llm_serve.__file__).parents[1]
_ENVIRONMENT = os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT.parent}", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
_ENTRY = [sys.executable, "-c", "from llm_serve.cli.main import main; main()", "stress"]
_GIVEN = command.Given("", "", 60, None, beside=False, png=None, json_output=False)
_MACHINE = [sys.executable, "-m", "tests.stress_machine", "stress"]


def stress(*words: str, entry: list[str] = _ENTRY, **more: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*entry, *words], env=_ENVIRONMENT | more, capture_output=True, text=True, check=False, timeout=50
    )  # fmt: skip


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_without_a_gpu_it_says_that_it_needs_one() -> None:
    """One line, and that the caller may try again elsewhere."""
    done = stress()

    assert 75 == done.returncode
    assert done.stderr.startswith("llm-serve: stress needs an NVIDIA GPU: ")
    assert (1, "") == (len(done.stderr.splitlines()), done.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"gpus": "x"}, '--gpus x: must name each GPU by an index (0), a UUID ("GPU-...", see nvidia-smi -L)'),
        ({"gpus": "0,0"}, "--gpus 0,0: names a GPU twice"),
        (
            {"tests": "burn"},
            "--tests burn: no test is called burn: there are operations, allocation, matmul, memory, precision, load",
        ),
        ({"png": Path("/nowhere/x.png")}, "--png /nowhere/x.png: there is no folder /nowhere"),
    ],
)
def test_wrong_words_are_named(words: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line: what, where, what to do; before anything else is looked at."""
    assert 2 == command.stress(replace(_GIVEN, **words))

    printed = capsys.readouterr()
    assert (1, "") == (len(printed.err.splitlines()), printed.out)
    assert said in printed.err


def test_words_out_of_bounds_are_refused() -> None:
    """By the parser, as everywhere."""
    done = stress("--seconds", "0", "--max-celsius", "900")

    assert (2, "") == (done.returncode, done.stdout)
    assert "--seconds" in done.stderr


def test_help_has_an_example_and_the_exit_statuses() -> None:
    """The example is one that the parser takes."""
    done = stress("--help")

    assert "Example: llm-serve stress --gpus 0,1 --seconds 60 --png stress.png" in done.stdout
    assert "70 when one failed" in done.stdout


def test_a_whole_test_with_json_and_png(tmp_path: Path) -> None:
    """Six tests on two GPUs at the same time, each in a child of its own that computes on the CPU."""
    picture = tmp_path / "stress.png"

    done = stress("--seconds", "1", "--json", "--png", str(picture), entry=_MACHINE)

    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)
    names = ["operations", "allocation", "matmul", "memory", "precision", "load"]
    for gpu in told["gpus"]:
        assert names == [row["part"] for row in gpu["tests"]]
        assert {("passed", 0)} == {(row["verdict"], row["errors"]) for row in gpu["tests"]}
        assert all(row["celsius"]["least"] >= 40 <= row["watts"]["least"] for row in gpu["tests"])
        assert gpu["tests"][-1]["seconds"] >= 1
        assert {"operations", "load"} <= {sample["part"] for sample in gpu["samples"]}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert 12 == len(done.stderr.splitlines())


def test_ctrl_c_ends_it_with_a_report() -> None:
    """Within a second or so, in the middle of an hour; nothing of it is left."""
    words = ["--gpus", "0", "--tests", "matmul,load", "--seconds", "3600"]
    process = subprocess.Popen(
        [*_MACHINE, *words], env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("GPU 0 matmul in fp16    passed, fp16 ")
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)

    assert time.monotonic() - began < patient(3)  # the machine of a test may be busy
    assert 130 == process.returncode
    assert ["full", "load", "stopped"] == out.splitlines()[3].split()[:3]
    assert out.splitlines()[-1].startswith("1 passed, 1 stopped, in ")
    assert out.splitlines()[-1].endswith(" s, interrupted")


def test_heat_ends_it() -> None:
    """The stand-in gets warmer by 30 degrees a second."""
    words = ["--gpus", "0", "--tests", "load", "--seconds", "3600", "--max-celsius", "80"]

    done = stress(*words, entry=_MACHINE, LLM_SERVE_HEATING="30")

    assert 70 == done.returncode
    assert "full load failed: stopped at " in done.stdout
    assert "°C, the limit is 80" in done.stdout


# Who is in its way.
def test_it_does_not_run_beside_an_instance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The instance says which GPUs it uses; the answer is made up, and so is that of the driver."""
    monkeypatch.setattr(control, "find_all", lambda: {"qwen": tmp_path})
    monkeypatch.setattr(control, "ask", lambda path, what: {"gpus": [{"index": 1}]})
    monkeypatch.setattr(command, "process_facts", lambda: ((), {}))
    first, second = Sensors(2).devices()

    command._check_alone([first])
    with pytest.raises(HostError) as caught:
        command._check_alone([first, second])

    assert (
        "a GPU is in use: the instance qwen runs on it. Stop that, choose others (--gpus), or test --beside it"
        == str(caught.value)
    )  # fmt: skip


def test_it_does_not_run_beside_a_foreign_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 75, unless it is told to: then with half of what is free."""
    engine = ProcessFacts(7, "VLLM::EngineCore", used_bytes={0: 9 << 30})
    ran: list[Any] = []

    async def no_test(gpus: Any, used: Any, plan: Any) -> Any:
        ran.append(plan)
        raise HostError("enough")

    monkeypatch.setattr(command, "open_gpus", lambda: Sensors(1))
    monkeypatch.setattr(command, "build", _CudaBuild)
    monkeypatch.setattr(command, "process_facts", lambda: ((engine,), {}))
    monkeypatch.setattr(control, "find_all", dict)
    monkeypatch.setattr(command, "until_interrupted", no_test)

    assert 75 == command.stress(_GIVEN)
    assert "VLLM::EngineCore (pid 7) holds 9.0 GiB of GPU 0" in capsys.readouterr().err
    assert not ran
    command.stress(replace(_GIVEN, beside=True))
    assert ran[0].sizes.is_shared


class _CudaBuild:
    is_for_cpu = False


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that are; and a torch for CPUs is no use beside a GPU."""
    with pytest.raises(HostError, match="built for CPUs"):
        command._usable(Sensors(1), None)
    monkeypatch.setattr(command, "build", _CudaBuild)
    with pytest.raises(HostError, match=r"^GPU 5 is not there: the driver shows 0 Stand-in, 1 Stand-in$"):
        command._usable(Sensors(2), (0, 5))
    assert [1, 0] == [gpu.index for gpu in command._usable(Sensors(2), (1, 0))]
    assert [0, 1] == [gpu.index for gpu in command._usable(Sensors(2), None)]
