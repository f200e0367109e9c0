"""`llm-serve status`, asking a real control socket."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from llm_serve.cli import control
from llm_serve.cli import status as command
from llm_serve.core.evidence import Holder
from llm_serve.core.status import Snapshot
from llm_serve.core.telemetry import Reading

START = time.time()
NOW = Snapshot(
    instance="qwen",
    model="Qwen/Qwen2.5-7B",
    state="serving",
    why="the engine answers",
    since=START - 3690,
    started=START - 90061,
    uptime_s=90061.0,
    phase="serving",
    progress=1.0,
    version="1",
    vllm_version="0.32.0",
    pid=7,
    listen="127.0.0.1:8000",
    source="/etc/llm-serve/qwen.toml",
    max_model_len=2048,
    max_num_seqs=8,
    engine_starts=2,
    requests_held=1,
    requests_in_flight=3,
    engine_pids=(8, 9),
    memory_bytes=200 << 20,
    gpus=(
        Reading(
            index=0, uuid="GPU-a", name="NVIDIA H200", temperature_celsius=61.0, power_watts=699.6, power_limit_watts=700.0,
            memory_used_bytes=100 << 30, memory_total_bytes=140 << 30, utilization_ratio=0.97,
            throttle_reasons=("gpu_idle", "sw_power_cap"), xids={"13": 2}, processes=(Holder(0, 9, "VLLM::Worker", 99 << 30),),
        ),
        Reading(index=1, uuid="GPU-b", name="NVIDIA L4"),
    ),
)  # fmt: skip


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A daemon's control socket among this user's, and one that a killed daemon left."""
    monkeypatch.setattr(control, "places", lambda: [tmp_path / "run", tmp_path / "user"])
    path = tmp_path / "user/qwen/control.sock"
    path.parent.mkdir(parents=True)
    # The tests before this one may have taken a while.
    monkeypatch.setattr(time, "time", lambda: START)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(NOW.to_json()).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    with socketserver.UnixStreamServer(str(path), Answer) as server:
        dead = tmp_path / "user/dead/control.sock"
        dead.parent.mkdir()
        socketserver.UnixStreamServer(str(dead), Answer).server_close()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield path
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("instance")
def test_one_instance_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """State, plan, requests and where it comes from, in words."""
    assert 0 == command.status("qwen", json_output=False)

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


@pytest.mark.usefixtures("instance")
def test_all_instances_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each that answers, in columns; a socket that nobody answers on is passed over."""
    assert 0 == command.status(None, json_output=False)

    header, *rows = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    assert "instance" == header[0]
    assert 1 == len(rows)
    assert ["qwen", "serving", "1 h 1 min", "2", "3", "1", "Qwen/Qwen2.5-7B"] == [
        cell.strip() for cell in rows[0] if cell.strip()
    ]


@pytest.mark.usefixtures("instance")
@pytest.mark.parametrize("name", ["qwen", None])
def test_json_is_the_whole_snapshot(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """One object for a name, a list for all."""
    assert 0 == command.status(name, json_output=True)

    printed = json.loads(capsys.readouterr().out)
    whole = json.loads(json.dumps(NOW.to_json()))
    assert (whole if name else [whole]) == printed


@pytest.mark.usefixtures("instance")
@pytest.mark.parametrize("name", ["dead", "none", "../qwen"])
def test_nobody_to_ask_is_75(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script can tell that the instance does not run; the reason is on stderr."""
    assert 75 == command.status(name, json_output=True)

    captured = capsys.readouterr()
    assert ("", f"llm-serve: {name} does not run here, or not for this user.\n") == (captured.out, captured.err)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h"), (-5, "0 s")],
)
def test_an_age_is_told_in_two_units(seconds: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two that matter; a clock that was set back does not make it negative."""
    monkeypatch.setattr("llm_serve.cli.status.time.time", lambda: 1_000_000.0)

    assert text == command._age(1_000_000.0 - seconds)
