"""The two servers under comparison, started as users start them, with the same arguments."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MODEL_NAME = "bench"
ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
}
_START_LIMIT_S = 400


@dataclass
class Running:
    """A server that answers, and how long it took to its first token."""

    url: str
    process: subprocess.Popen[bytes]
    first_token_s: float

    def resident_mib(self) -> float:
        """Memory of the server's own process, without its engine's."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def cpu_share(self, seconds: float) -> float:
        """CPU of the server's own process over a while, as a share of one core."""
        before = sum(psutil.Process(self.process.pid).cpu_times()[:2])
        time.sleep(seconds)
        return (sum(psutil.Process(self.process.pid).cpu_times()[:2]) - before) / seconds


@contextlib.contextmanager
def llm_serve(model: Path, cache: Path, daemon: Path | None = None) -> Iterator[Running]:
    """`llm-serve run FILE`; of another checkout whose `daemon/` is this one."""
    port = _free_port()
    options = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ARGUMENTS.items())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.toml"
        file.write_text(
            f'model = "{model}"\n[server]\nlisten = "127.0.0.1:{port}"\n'
            f'[engine]\nserved_model_name = ["{MODEL_NAME}"]\n{options}\n'
        )
        command = [sys.executable, "-c", "from llm_serve.cli.main import main; main()", "run", str(file)]
        more = {"XDG_RUNTIME_DIR": folder} | ({"PYTHONPATH": str(daemon)} if daemon else {})
        with _started(command, port, cache, more) as running:
            yield running


@contextlib.contextmanager
def vllm_server(model: Path, cache: Path) -> Iterator[Running]:
    """vLLM's own API server."""
    port = _free_port()
    command = vllm_command(model, port, ARGUMENTS)
    with _started(command, port, cache, {}) as running:
        yield running


def vllm_command(model: Path, port: int, arguments: Mapping[str, Any]) -> list[str]:
    """The command line of vLLM's own API server."""
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in arguments.items()
    ]
    where = [f"--model={model}", f"--served-model-name={MODEL_NAME}", "--host=127.0.0.1", f"--port={port}"]
    quiet = ["--disable-uvicorn-access-log"]
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *where, *quiet, *options]


@contextlib.contextmanager
def _started(command: list[str], port: int, cache: Path, more: dict[str, str]) -> Iterator[Running]:
    environment = (
        os.environ | {"VLLM_CACHE_ROOT": str(cache), "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"} | more
    )
    log = Path(tempfile.gettempdir()) / f"bench-server-{port}.log"
    began = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        try:
            url = f"http://127.0.0.1:{port}"
            yield Running(url, process, _first_token(url, process, log) - began)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            log.unlink(missing_ok=True)


def _first_token(url: str, process: subprocess.Popen[bytes], log: Path) -> float:
    body = json.dumps({"model": MODEL_NAME, "prompt": "Hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    until = time.perf_counter() + _START_LIMIT_S
    while time.perf_counter() < until:
        if process.poll() is not None:
            raise RuntimeError(f"server ended with {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=_START_LIMIT_S) as answer:
            if answer.status == 200:
                return time.perf_counter()
        time.sleep(0.1)
    raise RuntimeError("no first token in time")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fresh(cache: Path) -> Path:
    """An empty cache folder: what a first start finds."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    return cache
