"""Where the scenes of a real GPU play: each has a daemon of its own, all share their caches. And what scenes ask."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import MODEL_NAME, Daemon, instance_text

_REPOSITORY = Path(__file__).parents[2]
HOG = """
import os, sys, time, torch
torch.zeros(1, device="cuda")
while len(sys.argv) > 2 and not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
free, _ = torch.cuda.mem_get_info()
wanted = int(float(sys.argv[1]) * 2**30) if float(sys.argv[1]) > 0 else free + int(float(sys.argv[1]) * 2**30)
held = torch.empty(wanted, dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0] >> 20, flush=True)
time.sleep(600)
"""
Row = dict[str, Any]


class Stage:
    """Where the scenes play."""

    def __init__(self, model: str, folder: Path, logs: Path | None, caches: Path | None = None) -> None:
        self.model, self.folder, self._logs = model, folder, logs
        # One folder each, as in the unit.
        names = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
        self.caches = {name: str((caches or folder / "cache") / name.lower()) for name in names}

    def with_model(self, model: str) -> Stage:
        """The same place for another model."""
        other = copy(self)
        other.model = model
        return other

    @contextmanager
    def daemon(self, *, environ: dict[str, str] | None = None, **tables: dict[str, Any]) -> Iterator[Daemon]:
        """A daemon with this file, started."""
        engine: dict[str, Any] = {
            "served_model_name": [MODEL_NAME], "load_format": "dummy", "max_model_len": 8192, "max_num_seqs": 128,
            "tool_call_parser": "hermes", "enable_auto_tool_choice": True,
        }  # fmt: skip
        recovery = {"stall_timeout_s": 20, "restart_limit": 50}
        path = f"{_REPOSITORY / 'tests/faults/inject'}:{_REPOSITORY / 'daemon'}:{os.environ.get('PYTHONPATH', '')}"
        made = Daemon(self.model, text="", environ={"PYTHONPATH": path, **self.caches, **(environ or {})})
        whole = {
            "server": {"listen": f"127.0.0.1:{made.port}"} | tables.get("server", {}),
            "engine": engine | tables.get("engine", {}),
            "recovery": recovery | tables.get("recovery", {}),
            "gpu": tables.get("gpu", {}),
            "limits": tables.get("limits", {}),
            "log": {"format": "json"},
            "engine.env": tables.get("env", {"VLLM_USE_FLASHINFER_SAMPLER": "0"}),
        }
        made.file.write_text(instance_text(self.model, whole))
        try:
            yield made.start().wait_for_answers()
        finally:
            if self._logs is not None:
                with self._logs.open("a") as log:
                    log.write(made.log())
            made.destroy()


@contextmanager
def hog(gib: float) -> Iterator[int]:
    """Another process that holds so many GiB of the GPU; below zero, all but so many. Yields the MiB left free."""
    process = subprocess.Popen([sys.executable, "-c", HOG, str(gib)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def used_mib() -> int:
    """Memory in use on all GPUs together."""
    return sum(int(used) for (used,) in asked("memory.used"))


def memory_back(before: int, patience_s: float = 10) -> Row:
    """How much more of the GPU is in use than before, and after how long: a driver takes a moment to free it."""
    began = time.monotonic()
    while used_mib() > before and time.monotonic() - began < patience_s:
        time.sleep(0.1)
    return {"GPU MiB left": used_mib() - before, "GPU memory back after s": round(time.monotonic() - began, 1)}


def asked(fields: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU."""
    out = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], check=True,
                         capture_output=True, text=True).stdout  # fmt: skip
    return [line.split(", ") for line in out.splitlines()]


def engine_core(daemon: Daemon) -> int:
    """The pid of EngineCore."""
    return int(min(daemon.status()["engine_pids"]))


def until_serving(daemon: Daemon, epoch: int, within_s: float = 200) -> float:
    """Seconds until that engine serves."""
    began = time.monotonic()

    def is_there() -> bool:
        status = daemon.status()
        return bool(status["epoch"] >= epoch and status["state"] == "serving")

    while not is_there():
        assert time.monotonic() - began < within_s, daemon.status()["why"]
        time.sleep(0.1)
    return time.monotonic() - began


def story(daemon: Daemon) -> Row:
    """What the daemon tells of its engines, and how requests have ended."""
    status = daemon.status()
    kinds = [failure["failure"]["kind"] for failure in reversed(status["failures"])]
    families = text_string_to_metric_families(daemon.http.get("/metrics").text)
    ended = {sample.labels["outcome"]: int(sample.value) for family in families for sample in family.samples
             if sample.name == "llm_serve_requests_total" and sample.value}  # fmt: skip
    return {"kinds": kinds, "steps": status["steps"], "rung": status["rung"], "starts": status["engine_starts"],
            "requests": ended}  # fmt: skip


def phases(daemon: Daemon) -> list[str]:
    """What was logged of the last recovery, or of the start, each with its seconds since the first of these lines."""
    entries = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    begun = max((number for number, each in enumerate(entries) if "serving -> recovering" in each["event"]), default=0)
    words = (
        "serving",
        "engine failed",
        "%",
        "took",
        "Loading",
        "Starting to load",
        "Graph",
        "KV cache",
        "Initializing",
    )
    first = _seconds(entries[begun]) if entries else 0.0
    said = [(_seconds(each) - first, each["event"]) for each in entries[begun:] if "Capturing" not in each["event"]]
    return [f"{at:6.2f} {event[:110]}" for at, event in said if any(word in event for word in words)][:60]


def _seconds(entry: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(entry["timestamp"]).timestamp()


def play(scenes: Mapping[str, Callable[[Stage], Row]], about: str | None) -> None:
    """A command that plays some of these scenes, or all, and prints what was seen."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="*", choices=list(scenes), default=list(scenes))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="a file to which the daemons' logs are added")
    parser.add_argument("--caches", type=Path, help="a folder of an earlier run, so that this one begins warm")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays on the GPU after `timeout`
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(given.model, Path(folder), given.logs, given.caches)
        for name in given.only:
            rows[name] = _played(scenes[name], stage)
            print(name, json.dumps(rows[name], indent=1), flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))


def _played(scene: Callable[[Stage], Row], stage: Stage) -> Row:
    began, before = time.monotonic(), used_mib()
    try:
        row = scene(stage)
    except Exception:  # noqa: BLE001 - the other scenes still count
        row = {"failed": traceback.format_exc()[-1500:]}
    return row | memory_back(before) | {"scene s": round(time.monotonic() - began)}
