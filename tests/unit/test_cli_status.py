"""`llm-serve status`, asking real control sockets, with the real operations application behind them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_serve.cli import control, reports
from llm_serve.cli import status as command
from llm_serve.core.evidence import Holder
from llm_serve.core.telemetry import Reading
from llm_serve.host import listening
from llm_serve.host.units import Unit, read
from tests.operated import Told, operated
from tests.patience import patient

GPUS = (
    Reading(
        index=0, uuid="GPU-a", name="NVIDIA H200", temperature_celsius=61.0, power_watts=699.6, power_limit_watts=700.0,
        memory_used_bytes=100 << 30, memory_total_bytes=140 << 30, utilization_ratio=0.97,
        throttle_reasons=("gpu_idle", "sw_power_cap"), xids={"13": 2}, processes=(Holder(0, 9, "VLLM::Worker", 99 << 30),),
    ),
    Reading(index=1, uuid="GPU-b", name="NVIDIA L4"),
)  # fmt: skip
FAILURE = {"time": time.time() - 200, "failure": {"kind": "gpu_out_of_memory", "detail": "tried\n2 GiB", "advice": ""}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's instances are; nobody has a file, and no systemd is asked."""
    monkeypatch.setattr(control, "places", lambda: [tmp_path / "run", tmp_path / "user"])
    monkeypatch.setattr(reports, "instance_names", lambda: ())
    monkeypatch.setattr(reports, "units", lambda names: {})
    monkeypatch.setattr(command, "RATES_FROM_S", 0.05)
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


@pytest.fixture
def qwen(place: Path) -> Iterator[Told]:
    """An instance that runs, and a socket that a killed daemon left."""
    listening.open_control(_folder(place, "dead") / "control.sock").close()
    with operated(
        place, "qwen", requests_in_flight=3, requests_held=1, engine_pids=(8, 9), memory_bytes=200 << 20, gpus=GPUS
    ) as told:
        yield told


def _folder(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize("target", ["qwen", "/etc/llm-serve/qwen.toml"])
def test_one_instance_is_told_whole(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """State, plan, requests and where it comes from, in words; its file names it as well."""
    assert 0 == command.status(target, json_output=False)

    lines = capsys.readouterr().out.splitlines()
    assert "qwen: serving for 1 h 1 min: the engine answers" == lines[0]
    assert "  plan          max_model_len 2048, max_num_seqs 8" in lines
    assert "  requests      3 in flight, 1 held" in lines
    assert "  daemon        pid 7, 200 MiB, up 1 d 1 h" in lines
    assert "  last failure  none" in lines
    gpu = "NVIDIA H200, 61 °C, 700 W of 700, 100.0 of 140.0 GiB, 97% busy, slowed down by: power limit, Xids: 13 (2x)"
    assert f"  GPU 0         {gpu}" in lines
    assert "                VLLM::Worker (pid 9): 99.0 GiB" in lines
    assert "  GPU 1         NVIDIA L4" in lines


def test_the_load_and_what_binds_are_told(qwen: Told, capsys: pytest.CaptureFixture[str]) -> None:
    """From two looks at the metrics: the rate between them, and why it is not more."""
    qwen.running, qwen.waiting, qwen.kv = 8.0, 5.0, 0.34

    assert 0 == command.status("qwen", json_output=False)

    lines = {line[2:15].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert "8 running, 5 waiting in the engine" == lines["batch"]
    assert "34% full, 3 preemptions, prefix cache: 25% of prompt tokens found" == lines["KV cache"]
    generated, _, prompt, _ = (word for word in lines["speed"].replace("and ", "").split(" ", 3))
    assert 2 == qwen.looks
    assert 0 < float(generated) <= 100 / 0.05
    assert float(prompt.split()[0]) == pytest.approx(2 * float(generated), rel=0.01)
    assert lines["limit"].startswith(
        "max_num_seqs: 8 ran of 8 (max_num_seqs), 5 waited in the engine; KV cache 34% full"
    )
    assert "Try max_num_seqs = 16" in lines["limit"]


def test_what_stops_admission_is_no_limit(qwen: Told, capsys: pytest.CaptureFixture[str]) -> None:
    """Those who wait because an operator wants it say nothing of the engine."""
    qwen.running, qwen.waiting = 8.0, 5.0
    qwen.tell(state="drained", is_drained=True)

    assert 0 == command.status("qwen", json_output=False)
    assert 0 == command.status(None, json_output=False)

    shown = capsys.readouterr().out
    assert "  limit " not in shown
    assert "qwen      drained" in shown


def test_an_idle_instance_is_looked_at_once(qwen: Told) -> None:
    """There is no rate to wait for."""
    assert 0 == command.status("qwen", json_output=False)
    assert 1 == qwen.looks


def test_all_instances_are_a_table(qwen: Told, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each: those that answer, and of those that do not, why."""
    qwen.tell(failures=(FAILURE,), rung=1)
    with operated(place, "other", state="starting", max_model_len=None, max_num_seqs=None):
        assert 0 == command.status(None, json_output=False)

    header, *rows = (
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in capsys.readouterr().out.splitlines()
    )
    assert [
        "instance",
        "state",
        "for",
        "model",
        "plan",
        "rung",
        "run",
        "wait",
        "held",
        "KV",
        "tokens/s",
        "GPU",
        "last failure",
    ] == header
    assert ["dead", "not running", *["-"] * 10, control.NOBODY] == rows[0]
    assert [
        "other",
        "starting",
        "1 h 1 min",
        "Qwen/Qwen2.5-7B",
        "-",
        "0",
        "0",
        "0",
        "0",
        "0%",
        "-",
        "-",
        "none",
    ] == rows[1]
    gpus, failure = "2 x 61 °C 700 W 100.0 of 140.0 GiB", "3 min 20 s ago: gpu_out_of_memory: tried 2 GiB"
    assert ["qwen", "serving", "1 h 1 min", "Qwen/Qwen2.5-7B", "2048 x 8", "1", "0", "0", "1", "0%", "-", gpus] == rows[
        2
    ][:12]
    assert failure[8:] in rows[2][12]


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize("name", ["qwen", None])
def test_json_is_the_whole_snapshot(name: str | None, qwen: Told, capsys: pytest.CaptureFixture[str]) -> None:
    """One object for a name, a list for all; with the load, and for those that do not answer the reason."""
    assert 0 == command.status(name, json_output=True)

    printed = json.loads(capsys.readouterr().out)
    one = printed if name else printed[1]
    load = one.pop("load")
    assert json.loads(json.dumps(qwen.now.to_json())) == one
    assert (0.0, 8.0, 0.25, 3.0, None) == tuple(
        load[name] for name in ("running", "max_num_seqs", "prefix_cache_hits", "preemptions", "generated_per_s")
    )
    if name is None:
        assert {"instance": "dead", "state": "not running", "why": control.NOBODY, "since": None} == printed[0]


def test_one_that_hangs_does_not_delay_the_others(
    qwen: Told, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three that listen and never answer cost one time-out together, and are named."""
    monkeypatch.setattr(command, "OF_ALL_TIMEOUT_S", 0.5)
    listeners = [listening.open_control(_folder(place, name) / "control.sock") for name in ("a", "b", "c")]
    for listener in listeners:
        listener.listen(5)
    began = time.monotonic()
    try:
        assert 0 == command.status(None, json_output=False)
    finally:
        for listener in listeners:
            listener.close()

    assert time.monotonic() - began < patient(1.2)
    shown = capsys.readouterr().out
    assert 3 == shown.count("no answer")
    assert "qwen      serving" in shown
    assert qwen.looks


def test_one_that_hangs_is_said_in_a_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is asked alone, and when it is given an order; also when nobody more is let in."""
    monkeypatch.setattr(control, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(command, "Watch", lambda name: reports.Watch(name, 0.2))
    with listening.open_control(_folder(place, "hung") / "control.sock") as listener:
        listener.listen(0)
        assert 75 == command.status("hung", json_output=False)
        filling = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for each in filling:
            each.setblocking(False)
            each.connect_ex(str(place / "hung/control.sock"))
        assert 75 == control.order("hung", "drain", timeout_s=0.2)["exit_status"]
        for each in filling:
            each.close()
    assert "llm-serve: hung runs and does not answer: its journal may say why.\n" == capsys.readouterr().err


def test_instances_that_do_not_run_are_told_by_systemd(
    qwen: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those with a file, those that failed, and not those that were stopped and have no file any more."""
    known = {
        "dead": Unit("restarting", "systemd starts it again: GPU 0 is lost", time.time() - 61),
        "idle": Unit("stopped", "systemd does not run it", None),
        "gone": Unit("failed", "exit-code, exit status 70", time.time() - 5),
        "past": Unit("stopped", "systemd does not run it", None),
        "qwen": Unit("active", "systemd says active (running)", None),
    }
    monkeypatch.setattr(reports, "instance_names", lambda: ("idle", "new"))
    monkeypatch.setattr(reports, "units", lambda names: known)

    assert 0 == command.status(None, json_output=True)
    rows = {row["instance"]: (row["state"], row["why"]) for row in json.loads(capsys.readouterr().out)}
    assert 75 == command.status("gone", json_output=False)

    assert {"dead", "idle", "new", "qwen", "gone"} == rows.keys()
    assert ("restarting", "systemd starts it again: GPU 0 is lost") == rows["dead"]
    assert ("stopped", "failed") == (rows["idle"][0], rows["gone"][0])
    assert ("not running", control.NOBODY) == rows["new"]
    assert "serving" == rows["qwen"][0]
    advice = "`systemctl status llm-serve@gone` shows more."
    assert f"llm-serve: gone does not run: exit-code, exit status 70. {advice}\n" == capsys.readouterr().err


def test_what_systemctl_prints_is_read() -> None:
    """A block for each unit, as systemd 252 prints them; one without a unit file is no instance."""
    text = (
        "ExecMainStatus=78\nResult=exit-code\nStatusText=/etc/llm-serve/a.toml:3: engine.x: a = b\nId=llm-serve@a.service\n"
        "LoadState=loaded\nActiveState=failed\nSubState=failed\nStateChangeTimestampMonotonic=2000000\n\n"
        "Id=llm-serve@b.service\nLoadState=loaded\nActiveState=activating\nSubState=auto-restart\nStateChangeTimestampMonotonic=0\n\n"
        "Id=llm-serve@c.service\nLoadState=not-found\nActiveState=inactive\nSubState=dead\n\n"
        "Id=llm-serve@d-e.service\nLoadState=loaded\nActiveState=inactive\nSubState=dead\n\n"
        "Id=llm-serve@f.service\nLoadState=loaded\nActiveState=active\nSubState=running\n"
    )

    found = read(text, booted_at=1000.0)

    assert Unit("failed", "exit-code, exit status 78: /etc/llm-serve/a.toml:3: engine.x: a = b", 1002.0) == found["a"]
    assert Unit("restarting", "systemd starts it again", None) == found["b"]
    assert ["a", "b", "d-e", "f"] == list(found)
    assert ("stopped", "active") == (found["d-e"].state, found["f"].state)
    assert {} == read("", 0.0)


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize("target", ["dead", "none", "/etc/llm-serve/none.toml"])
def test_nobody_to_ask_is_75(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script can tell that the instance does not run; the reason is on stderr."""
    assert 75 == command.status(target, json_output=True)

    name = Path(target).stem
    assert ("", f"llm-serve: {name} does not run here, or not for this user.\n") == capsys.readouterr()


@pytest.mark.usefixtures("place")
def test_no_instance_at_all_is_75(capsys: pytest.CaptureFixture[str]) -> None:
    """One line."""
    assert 75 == command.status(None, json_output=False)
    assert "llm-serve: no instance runs or is configured here, or not for this user.\n" == capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_what_is_no_name_is_78(capsys: pytest.CaptureFixture[str]) -> None:
    """As every command has it."""
    assert 78 == command.status("qwen 7b", json_output=False)
    assert "qwen 7b: is not the name of an instance" in capsys.readouterr().err


_AS_SOMEBODY_ELSE = """
import os, sys
from pathlib import Path
from llm_serve.cli import control, reports, status
os.setgroups([]); os.setgid(65534); os.setuid(65534)
control.places = lambda: [Path(sys.argv[1])]
reports.instance_names = lambda: ()
reports.units = lambda names: {}
codes = [status.status(None, False), status.status("qwen", False), control.order("qwen", "drain")["exit_status"]]
try:
    control.fetch(Path(sys.argv[1]) / "qwen/control.sock", "/status")
except OSError as error:
    codes.append(type(error).__name__)
print(codes)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
@pytest.mark.parametrize(
    "folder_mode", [0o700, 0o755], ids=["the folder keeps others out", "the socket keeps others out"]
)
def test_nobody_but_root_and_its_user_may_ask(folder_mode: int) -> None:
    """Another user is refused by the kernel, whichever of the two is open, and is told what to do."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(prefix="lls-") as folder, operated(Path(folder), "qwen") as told:
        place, path = Path(folder), Path(folder, "qwen/control.sock")
        place.chmod(0o755)
        path.parent.chmod(folder_mode)
        for each in (path.parent, path):
            os.chown(each, 12345, 12345)
        assert "serving" == json.loads(control.fetch(path, "/status"))["state"]  # we are root

        done = subprocess.run(
            [sys.executable, "-c", _AS_SOMEBODY_ELSE, folder],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not told.looks

    assert "[0, 75, 75, 'PermissionError']" == done.stdout.splitlines()[-1], done.stderr
    assert "not shown" in done.stdout
    assert "llm-serve: qwen is another user's: ask as root (sudo), or as the user that it runs as.\n" == done.stderr
