"""Recovery on a real GPU, with the figures of each fault in one table.

    python -m tests.gpu.recovery --model FOLDER [--json FILE] [--only NAME ...]

The model may be without weights: they are made up (load_format = "dummy"). Each scene has a daemon of its own, all share
their caches. What is not made for real is said in its scene.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from llm_serve.host.nvml import open_gpus
from tests.daemon import MODEL_NAME, Daemon, Stream, instance_text
from tests.faults.mixed import CATALOG

_REPOSITORY = Path(__file__).parents[2]
_KINDS = ("chat streamed", "chat with logprobs", "chat with a stop string", "chat with penalties", "chat with a seed",
          "JSON schema", "two choices")  # fmt: skip
_HOG = """
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
    process = subprocess.Popen([sys.executable, "-c", _HOG, str(gib)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def used_mib() -> int:
    """Memory in use on all GPUs together."""
    return sum(int(used) for (used,) in _asked("memory.used"))


def _memory_back(before: int, patience_s: float = 10) -> Row:
    """How much more of the GPU is in use than before, and after how long: a driver takes a moment to free it."""
    began = time.monotonic()
    while used_mib() > before and time.monotonic() - began < patience_s:
        time.sleep(0.1)
    return {"GPU MiB left": used_mib() - before, "GPU memory back after s": round(time.monotonic() - began, 1)}


def _asked(fields: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU."""
    out = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], check=True,
                         capture_output=True, text=True).stdout  # fmt: skip
    return [line.split(", ") for line in out.splitlines()]


def _placed(daemon: Daemon) -> Row:
    """Where an instance runs: the GPUs that it tells of, and the CPUs and the memory policy of its processes."""
    status = daemon.status()
    words = ("the engine runs on", "NUMA", "numactl", "gpu.devices", "GPU memory is not back")
    processes = {}
    for pid in status["engine_pids"]:
        cpus = next(
            line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Cpus_allowed_list" in line
        )
        maps = Path(f"/proc/{pid}/numa_maps")
        bound = sum(" bind:" in line for line in maps.read_text().splitlines()) if maps.exists() else None
        visible = next(
            (word for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if "CUDA_VISIBLE" in word), ""
        )
        processes[pid] = [cpus.partition(":")[2].strip(), f"{bound} maps bound", visible]
    return {"GPUs": [gpu["uuid"] for gpu in status["gpus"]], "processes": processes,
            "said": [line[:300] for line in daemon.log().splitlines() if any(word in line for word in words)]}  # fmt: skip


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


def _story(daemon: Daemon) -> Row:
    status = daemon.status()
    kinds = [failure["failure"]["kind"] for failure in reversed(status["failures"])]
    return {"kinds": kinds, "steps": status["steps"], "rung": status["rung"], "starts": status["engine_starts"]}


def start(stage: Stage) -> Row:
    """First start with empty caches, whatever backend is missing; then further processes on what was learned."""
    row: Row = {}
    began = time.monotonic()
    with stage.daemon(env={}) as daemon:
        for name in ("first", "next", "next but one"):
            if name != "first":
                daemon.stop()
                began = time.monotonic()
                daemon.start().wait_for_answers()
            until_serving(daemon, 1, 400)
            row[f"{name} start s"] = round(time.monotonic() - began, 1)
            row[name] = _story(daemon)
        return row | {"phases": _phases(daemon)}


def kills(stage: Stage) -> Row:
    """EngineCore killed in the middle of one answer of each kind: is the rest as without the kill?"""
    row: Row = {"seconds": [], "same": [], "different": {}}
    with stage.daemon() as daemon:
        until_serving(daemon, 1)
        before = {name: CATALOG[name](daemon.url) for name in _KINDS}
        row["deterministic"] = [name for name in _KINDS if CATALOG[name](daemon.url) == before[name]]
        for name in _KINDS:
            epoch = daemon.status()["epoch"]
            asked = daemon.later(lambda name=name: CATALOG[name](daemon.url))  # type: ignore[misc]
            time.sleep(0.35)
            os.kill(engine_core(daemon), signal.SIGKILL)
            try:
                got = asked.result(200)
            except Exception as error:  # noqa: BLE001 - a result like others
                got = {"error": repr(error)}
            row["seconds"].append(round(until_serving(daemon, epoch + 1), 1))
            if got == before[name]:
                row["same"].append(name)
            else:
                row["different"][name] = {"got": repr(got)[:700], "before": repr(before[name])[:700]}
        row["outcomes"] = [line for line in daemon.http.get("/metrics").text.splitlines()
                           if line.startswith("llm_serve_requests_total") and not line.endswith(" 0.0")]  # fmt: skip
        row["journal"] = [line for line in daemon.log().splitlines() if "engine failed" in line][-1:]
    return row


def under_load(stage: Stage) -> Row:
    """EngineCore killed under 64 streams, three times; the seconds to the next token, and what became of the streams."""
    row: Row = {"next token s": []}
    with stage.daemon() as daemon:
        until_serving(daemon, 1)
        for _ in range(3):
            epoch = daemon.status()["epoch"]
            streams = [Stream(daemon.url, 1200) for _ in range(64)]
            for stream in streams:
                stream.wait_for_tokens(5)
            seen = sum(len(stream.events) for stream in streams)
            os.kill(engine_core(daemon), signal.SIGKILL)
            began = time.monotonic()
            time.sleep(0.5)
            seen = sum(len(stream.events) for stream in streams)
            while sum(len(stream.events) for stream in streams) == seen:
                time.sleep(0.02)
            row["next token s"].append(round(time.monotonic() - began, 2))
            until_serving(daemon, epoch + 1)
            for stream in streams:
                stream.wait(200).close()
        row["complete"] = sum(stream.finish_reasons == ["length"] for stream in streams)
        row["phases"] = _phases(daemon)
    row["median s"] = statistics.median(row["next token s"])
    return row


def _phases(daemon: Daemon) -> list[str]:
    """The log's time stamps of the last recovery, or of the start."""
    lines = daemon.log().splitlines()
    begun = max((number for number, line in enumerate(lines) if "serving -> recovering" in line), default=0)
    words = ("serving", "engine failed", "%", "took", "Loading", "Starting to load", "graph", "Graph", "KV cache")
    return [line[:150] for line in lines[begun:] if any(word in line for word in words)][:60]


FEW_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
SPARSE_SIZES = [1, 2, 4, *range(8, 65, 8), 80, 96, 112, 128, 160, 192, 224, 256]
"""vLLM's up to 64, and above it steps of an eighth to a quarter, up to the same largest one."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "measured each time": {"env": {"VLLM_ENABLE_STARTUP_PLAN": "0"}},
    "few graphs": {"engine": {"cudagraph_capture_sizes": FEW_SIZES}},
    "sparse graphs": {"engine": {"cudagraph_capture_sizes": SPARSE_SIZES}},
    "mega artifact": {"env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"}},
    "mega artifact, sparse graphs": {
        "env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"},
        "engine": {"cudagraph_capture_sizes": SPARSE_SIZES},
    },
    "mega artifact, whole graphs": {
        "env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"},
        "engine": {"compilation_config": {"cudagraph_mode": "FULL"}},
    },
    "eager": {"engine": {"enforce_eager": True}},
}
"""What may make a rebuild faster. vLLM uses the mega artifact by itself from torch 2.12 on."""


def rebuilds(stage: Stage) -> Row:
    """Seconds from the death of an idle engine to the next answer, by variant (LLM_SERVE_VARIANTS, by semicolons); as many
    kills as LLM_SERVE_KILLS says."""
    row: Row = {}
    for name in os.environ.get("LLM_SERVE_VARIANTS", ";".join(VARIANTS)).split(";"):
        variant = VARIANTS[name]
        env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | variant.get("env", {})
        with stage.daemon(env=env, engine=variant.get("engine", {})) as daemon:
            until_serving(daemon, 1, 300)
            row[name], kills = [], int(os.environ.get("LLM_SERVE_KILLS", "3"))
            for _ in range(kills):
                began = time.monotonic()
                os.kill(engine_core(daemon), signal.SIGKILL)
                assert daemon.chat(max_tokens=1).status_code == 200
                row[name].append(round(time.monotonic() - began, 2))
            lines = [line[:120] for line in _phases(daemon) if "Capturing" not in line]
            row[f"{name}: log"] = lines if name != "as it is" else []
    return row


def graph_sizes(stage: Stage) -> Row:
    """Tokens per second with all of vLLM's graph sizes and with few: what does a faster rebuild cost while serving?"""
    row: Row = {}
    for name, engine in {"vLLM's": {}, "sparse": {"cudagraph_capture_sizes": SPARSE_SIZES}}.items():
        with stage.daemon(engine=engine) as daemon:
            until_serving(daemon, 1, 300)
            _tokens_per_second(daemon, 128, 32)
            row[name] = {clients: [_tokens_per_second(daemon, clients, 256) for _ in range(3)]
                         for clients in (1, 20, 40, 66, 72, 100, 116, 128)}  # fmt: skip
    row["ratio"] = {clients: round(statistics.median(row["sparse"][clients]) / statistics.median(seen), 3)
                    for clients, seen in row["vLLM's"].items()}  # fmt: skip
    return row


def _tokens_per_second(daemon: Daemon, clients: int, tokens: int) -> float:
    body = {"model": MODEL_NAME, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    began = time.monotonic()
    asked = [
        daemon.later(
            lambda number=number: httpx.post(  # type: ignore[misc]
                f"{daemon.url}/v1/completions", json=body | {"prompt": [number] * 20}, timeout=100, trust_env=False
            ).raise_for_status()
        )
        for number in range(1, clients + 1)
    ]
    for each in asked:
        each.result(100)
    return round(clients * tokens / (time.monotonic() - began), 1)


def frozen(stage: Stage) -> Row:
    """EngineCore stopped with a request waiting."""
    with stage.daemon() as daemon:
        until_serving(daemon, 1)
        os.kill(engine_core(daemon), signal.SIGSTOP)
        began = time.monotonic()
        asked = daemon.later(daemon.chat)
        while daemon.http.get("/readyz").status_code == 200:
            time.sleep(0.1)
        noticed = time.monotonic() - began
        answered = asked.result(200).status_code
        return {"noticed s": round(noticed, 1), "answered": answered, "after s": round(time.monotonic() - began, 1),
                **_story(daemon)}  # fmt: skip


def long_prompts(stage: Stage) -> Row:
    """Nothing but the longest prompts that the model takes, in small steps, LLM_SERVE_LONG_S seconds: never a hang."""
    seconds, is_over = float(os.environ.get("LLM_SERVE_LONG_S", "60")), threading.Event()
    answered: list[int] = []
    with stage.daemon(engine={"max_model_len": 32768, "max_num_batched_tokens": 256}) as daemon:
        until_serving(daemon, 1, 300)

        def client(number: int) -> None:
            while not is_over.is_set():
                prompt = [(number * 7919 + len(answered) * 31 + place) % 40_000 for place in range(32_760)]
                body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 4}
                answered.append(daemon.http.post("/v1/completions", json=body, timeout=400).status_code)
                assert answered[-1] == 200, "a request that was refused is no load"

        clients = [daemon.later(lambda number=number: client(number)) for number in range(8)]  # type: ignore[misc]
        ends_at, longest = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends_at:
            longest = max(longest, daemon.status()["seconds_since_engine_step"] or 0.0)
            time.sleep(0.2)
        is_over.set()
        for each in clients:
            each.result(400)
        return {"seconds": seconds, "answered": len(answered), "codes": sorted(set(answered)),
                "longest without a step s": longest, **_story(daemon)}  # fmt: skip


def memory_held(stage: Stage) -> Row:
    """Another process holds most of the GPU at the start: wait for it, then fit beside it."""
    with hog(90) as free, stage.daemon() as daemon:
        began = time.monotonic()
        until_serving(daemon, 1, 400)
        return {"free MiB": free, "serving after s": round(time.monotonic() - began, 1), **_story(daemon)}


def memory_taken(stage: Stage) -> Row:
    """Another process takes the rest while it serves, and then come prompts that need more than there is."""
    with stage.daemon(engine={"gpu_memory_utilization": 0.95, "max_num_batched_tokens": 8192}) as daemon:
        until_serving(daemon, 1)
        epoch = daemon.status()["epoch"]
        with hog(-0.06) as free:
            prompt = "one two three four five six seven " * 1000
            answers = [daemon.later(lambda number=number: daemon.chat(f"{number} {prompt}", logprobs=True,  # type: ignore[misc]
                                                                      top_logprobs=20)) for number in range(64)]  # fmt: skip
            codes = [each.result(300).status_code for each in answers]
        return {"free MiB": free, "codes": sorted(set(codes)), "engines": daemon.status()["epoch"] - epoch,
                **_story(daemon)}  # fmt: skip


def device_error(stage: Stage) -> Row:
    """An illegal memory access in the worker (injected: a kernel that writes where it must not)."""
    fault = stage.folder / "fault.json"
    with stage.daemon(environ={"LLM_SERVE_FAULT_FILE": str(fault)}) as daemon:
        until_serving(daemon, 1)
        epoch = daemon.status()["epoch"]
        fault.write_text(json.dumps({"at": "execute_model", "do": "illegal", "times": 1}))
        began = time.monotonic()
        answer = daemon.chat()
        after = time.monotonic() - began
        until_serving(daemon, epoch + 1)
        return {"answered": answer.status_code, "after s": round(after, 1), "xids": daemon.status()["gpus"][0]["xids"],
                **_story(daemon)}  # fmt: skip


def telemetry(stage: Stage) -> Row:
    """What the sensors say idle and under 64 streams, what a scrape costs, and admission that pauses for heat."""
    row: Row = {}
    with stage.daemon() as daemon:
        until_serving(daemon, 1, 300)
        row["idle"] = _sensors(daemon)
        streams = [Stream(daemon.url, 1500) for _ in range(64)]
        for stream in streams:
            stream.wait_for_tokens(5)
        row["scrape ms under load"] = _scrapes(daemon)
        time.sleep(3)
        row["under load"] = _sensors(daemon)
        row["families"] = sorted({line.split("{")[0] for line in daemon.http.get("/metrics").text.splitlines()
                                  if line.startswith("llm_serve_gpu_")})  # fmt: skip
        row["status"] = daemon.command("status").stdout.splitlines()
        for stream in streams:
            stream.wait(100).close()
        before = daemon.rewrite("[gpu]", "[gpu]\npause_above_celsius = 10")
        row["reload"] = daemon.command("reload").stdout.strip()
        row["paused after s"], row["paused"] = _until_state(daemon, "drained")
        asked = daemon.later(daemon.chat)
        time.sleep(2)
        row["held while hot"] = daemon.status()["requests_held"]
        daemon.file.write_text(before)
        row["reload back"] = daemon.command("reload").stdout.strip()
        row["goes on after s"], _ = _until_state(daemon, "serving")
        row["answered"] = asked.result(60).status_code
        return row | _story(daemon)


def utilization(stage: Stage) -> Row:
    """More of the GPU than there is: nobody holds it, so the share is what has to give."""
    with stage.daemon(engine={"gpu_memory_utilization": 0.999}) as daemon:
        asked = daemon.later(daemon.chat)
        after_s = until_serving(daemon, 1, 400)
        return {"serving after s": round(after_s, 1), "asked at once": asked.result(60).status_code, **_story(daemon)}


def capture(stage: Stage) -> Row:
    """Another process takes all but 40 MiB while CUDA graphs are captured, until the start has failed."""
    trigger = stage.folder / "take-it"
    trigger.unlink(missing_ok=True)
    command = [sys.executable, "-c", _HOG, "-0.04", str(trigger)]
    with stage.daemon() as daemon, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as thief:
        began = time.monotonic()
        asked = daemon.later(daemon.chat)
        while "GPU KV cache size" not in daemon.log():
            assert time.monotonic() - began < 200, daemon.log()[-3000:]
            time.sleep(0.02)
        while used_mib() < 100_000:  # the KV cache is there: warm-up and capture come next
            assert time.monotonic() - began < 200, daemon.log()[-3000:]
        trigger.touch()
        while not daemon.status()["failures"] and daemon.status()["state"] != "serving":
            time.sleep(0.05)
        thief.kill()
        failed = [failure["failure"] for failure in daemon.status()["failures"]]
        after_s = until_serving(daemon, 1, 400)
        told = {"failures": failed, "asked at once": asked.result(60).status_code}
        return {"serving after s": round(after_s, 1), **told, **_story(daemon)}


def backends(stage: Stage) -> Row:
    """Attention backends that cannot be used here: one for another kind of model, one that is not installed."""
    row: Row = {}
    for name in ("FLASHMLA", "FLASHINFER"):
        with stage.daemon(engine={"attention_backend": name}) as daemon:
            after_s = until_serving(daemon, 1, 400)
            failed = [failure["failure"]["detail"][:200] for failure in daemon.status()["failures"]]
            row[name] = {"serving after s": round(after_s, 1), "failures": failed, **_story(daemon)}
    return row


def _sensors(daemon: Daemon) -> Row:
    (gpu,) = daemon.status()["gpus"]
    return {name: value for name, value in gpu.items() if name not in {"index", "uuid"}}


def _scrapes(daemon: Daemon) -> dict[str, float]:
    """Milliseconds of 100 scrapes under load."""
    took = []
    for _ in range(100):
        began = time.monotonic()
        daemon.http.get("/metrics").raise_for_status()
        took.append(1000 * (time.monotonic() - began))
        time.sleep(0.02)
    return {"p50": round(statistics.median(took), 1), "max": round(max(took), 1)}


def _until_state(daemon: Daemon, state: str) -> tuple[float, str]:
    began = time.monotonic()
    while (status := daemon.status())["state"] != state:
        assert time.monotonic() - began < 60, status["why"]
        time.sleep(0.05)
    return round(time.monotonic() - began, 2), str(status["why"])


def tensor_parallel(stage: Stage) -> Row:
    """Two GPUs, one model: a worker killed, EngineCore killed, a worker stopped, each under 16 streams."""
    gpus = open_gpus()
    row: Row = {"without P2P": gpus.without_p2p([gpu.index for gpu in gpus.devices()]), "problems": gpus.problems()}
    gpus.close()
    devices = [address for (address,) in _asked("pci.bus_id")][:2]
    with stage.daemon(engine={"tensor_parallel_size": 2}, gpu={"devices": devices}, recovery=_MEETS) as daemon:
        row["start s"] = round(until_serving(daemon, 1, 400), 1)
        row["placed"] = _placed(daemon)
        for name, which, number in (
            ("worker killed", max, signal.SIGKILL), ("EngineCore killed", min, signal.SIGKILL),
            ("worker stopped", max, signal.SIGSTOP),
        ):  # fmt: skip
            status = daemon.status()
            streams = [Stream(daemon.url, 1000) for _ in range(16)]
            for stream in streams:
                stream.wait_for_tokens(5)
            os.kill(int(which(status["engine_pids"])), number)
            seen = sum(len(stream.events) for stream in streams)
            after_s = until_serving(daemon, status["epoch"] + 1)
            for stream in streams:
                stream.wait(200).close()
            row[name] = {
                "processes": len(status["engine_pids"]), "events before": seen, "serving after s": round(after_s, 1),
                "complete": sum(stream.finish_reasons == ["length"] for stream in streams),
                "left": [pid for pid in status["engine_pids"] if Path(f"/proc/{pid}").exists()],
            }  # fmt: skip
        return row | _story(daemon)


def no_p2p(stage: Stage) -> Row:
    """Two GPUs whose processes never meet (injected: both workers spin, twice): the cure, and who remembers it."""
    fault = stage.folder / "fault.json"
    fault.write_text(json.dumps({"at": "init_device", "do": "spin", "times": 4}))
    row: Row = {}
    with stage.daemon(engine={"tensor_parallel_size": 2}, recovery=_MEETS,
                      environ={"LLM_SERVE_FAULT_FILE": str(fault)}) as daemon:  # fmt: skip
        row["serving after s"] = round(until_serving(daemon, 1, 500), 1)
        row |= _story(daemon)
        row["plan"] = {name: daemon.status()["engine_arguments"][name] for name in ("arguments", "env")}
        row["said"] = [line[:400] for line in daemon.log().splitlines() if "engine failed" in line or "P2P" in line]
        daemon.stop()
        began = time.monotonic()
        daemon.start().wait_for_answers()
        until_serving(daemon, 1, 400)
        row["the next process"] = _story(daemon) | {"serving after s": round(time.monotonic() - began, 1)}
    return row


def too_many(stage: Stage) -> Row:
    """Files that ask for more GPUs, or other heads, than there are: status 78 and the line, and nothing is loaded."""
    uuid = _asked("uuid")[0][0]
    files: dict[str, dict[str, dict[str, Any]]] = {
        "GPUs": {"engine": {"tensor_parallel_size": 64}},
        "devices": {"engine": {"tensor_parallel_size": 2}, "gpu": {"devices": [0]}},
        "heads": {"engine": {"tensor_parallel_size": 2, "hf_overrides": '{"num_attention_heads": 25}'}},
        "twice": {"gpu": {"devices": [0, uuid]}},
    }
    row: Row = {}
    for name, tables in files.items():
        began = time.monotonic()
        try:
            with stage.daemon(**tables) as daemon:
                row[name] = [daemon.wait_for_exit(150), daemon.log().splitlines()[-1][:400]]
        except AssertionError as error:  # it has ended before it answered
            said = str(error).splitlines()
            row[name] = [said[0], said[-1][:400]]
        row[name].append(round(time.monotonic() - began, 1))
    return row


_MEETS = {"start_timeout_s": 400, "stall_timeout_s": 40}
"""Two processes on two GPUs need a moment to meet."""


def two_instances(stage: Stage) -> Row:
    """Two GPUs, an instance on each: one's engine is killed, and a stream of the other goes on without a pause."""
    one, two = [uuid for (uuid,) in _asked("uuid")][:2]
    with stage.daemon(gpu={"devices": [one]}) as first, stage.daemon(gpu={"devices": [two]}) as second:
        for each in (first, second):
            until_serving(each, 1, 400)
        used = [mib for (mib,) in _asked("memory.used")]
        before = second.status()
        untouched, hurt = Stream(second.url, 4000), Stream(first.url, 500)
        for stream in (untouched, hurt):
            stream.wait_for_tokens(5)
        os.kill(engine_core(first), signal.SIGKILL)
        longest, seen, at, began = 0.0, len(untouched.events), time.monotonic(), time.monotonic()
        while time.monotonic() - began < 15 and untouched.end is None:
            if len(untouched.events) != seen:
                seen, at = len(untouched.events), time.monotonic()
            longest = max(longest, time.monotonic() - at)
            time.sleep(0.005)
        until_serving(first, 2)
        hurt.wait(100)
        after = second.status()
        changed = [name for name in ("epoch", "engine_pids", "failures", "state") if before[name] != after[name]]
        return {"GPU MiB": used, "longest pause of the other s": round(longest, 3), "first": _story(first),
                "second": _story(second), "complete": hurt.finish_reasons, "changed of the other": changed,
                "UUIDs": [one, two], "first placed": _placed(first), "second placed": _placed(second)}  # fmt: skip


SCENES: dict[str, Callable[[Stage], Row]] = {
    scene.__name__: scene
    for scene in (
        *(
            start,
            kills,
            under_load,
            rebuilds,
            graph_sizes,
            frozen,
            long_prompts,
            memory_held,
            memory_taken,
            device_error,
            telemetry,
            utilization,
            capture,
            backends,
        ),
        *(tensor_parallel, two_instances, no_p2p, too_many),
    )
}


def main() -> None:
    """Play the scenes and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--only", nargs="*", choices=list(SCENES), default=list(SCENES)[:-4], help="the last four need two GPUs"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="a file to which the daemons' logs are added")
    parser.add_argument("--caches", type=Path, help="a folder of an earlier run, so that this one begins warm")
    given = parser.parse_args()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            began, before = time.monotonic(), used_mib()
            try:
                rows[name] = SCENES[name](Stage(given.model, Path(folder), given.logs, given.caches))
            except Exception:  # noqa: BLE001 - the other scenes still count
                rows[name] = {"failed": traceback.format_exc()[-1500:]}
            rows[name] |= _memory_back(before) | {"scene s": round(time.monotonic() - began)}
            print(name, json.dumps(rows[name], indent=1), flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
