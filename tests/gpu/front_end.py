"""Is the front end the limit? Requests per second and time to the first token of each server, in one run.

    python -m tests.gpu.front_end --model FOLDER [--only NAME ...] [--streams 64 256 512] [--rounds 2] [--json FILE]

Streamed chat answers of 50 tokens. The clients are eight processes, so that they are not the limit themselves. `engine` is
vLLM's AsyncLLM in a process of its own, without HTTP: what a single front end could reach at best. Last of all /metrics is
read ten times a second under 64 streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llm_serve.core.figures import percentile
from tests.daemon import MODEL_NAME, free_port
from tests.gpu.stage import Stage, until_serving

_TOKENS, _CLIENTS, _PER_STREAM = 50, 8, 8
_SEQS = 1024
_ENGINE: Mapping[str, Any] = {"load_format": "dummy", "max_model_len": 8192, "max_num_seqs": _SEQS}
Seen = tuple[float, list[float], float]
"""Seconds of a whole load, seconds to the first token of each request, and events per answer where there are any."""


@dataclass(frozen=True)
class Server:
    """What is measured: `load` puts so many streams on it, `url` is where it answers HTTP."""

    load: Callable[[int], Seen]
    url: str = ""


def _requests(streams: int) -> int:
    """Some seconds of them: where few run at once, a load of the same number of turns would be over too soon."""
    return max(streams * _PER_STREAM, min(streams * 32, 1024))


# ---- clients ------------------------------------------------------------------------------------------


def _over_http(url: str, streams: int) -> Seen:
    command = [sys.executable, "-m", "tests.bench.chats", url, MODEL_NAME]
    count = min(_CLIENTS, streams)
    parts = [str(streams // count), str(_requests(streams) // count), str(_TOKENS)]
    clients = [
        subprocess.Popen([*command, *parts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for _ in range(count)
    ]
    # They begin together, and by their own clocks: how long their interpreters take to start is not the server's doing.
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
    reports = [json.loads(client.communicate()[0]) for client in clients]
    seconds = max(report["ended"] for report in reports) - min(report["began"] for report in reports)
    first = [each for report in reports for each in report["first"]]
    return seconds, first, sum(report["events"] for report in reports) / len(first)


def _at(url: str) -> Server:
    return Server(lambda streams: _over_http(url, streams), url)


def _scrapes(server: Server) -> list[float]:
    """Milliseconds of each scrape, ten a second, under 64 streams."""
    took = []
    with ThreadPoolExecutor(1) as pool, httpx.Client(trust_env=False, timeout=30) as client:
        load = pool.submit(server.load, 64)
        time.sleep(1)  # until the clients have started
        while not load.done():
            began = time.perf_counter()
            client.get(f"{server.url}/metrics").raise_for_status()
            took.append(1000 * (time.perf_counter() - began))
            time.sleep(0.1)
    return took


# ---- servers ------------------------------------------------------------------------------------------


@contextmanager
def _ours(stage: Stage, front_ends: int) -> Iterator[Server]:
    with stage.daemon(engine=dict(_ENGINE), server={"front_ends": front_ends}) as daemon:
        until_serving(daemon, 1, 400)
        while front_ends > 1 and [each["epoch"] for each in daemon.status()["front_ends"]] != [1] * front_ends:
            time.sleep(0.1)
        yield _at(daemon.url)


@contextmanager
def _vllm(stage: Stage, servers: int) -> Iterator[Server]:
    """vLLM's own server, as its users start it."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", stage.model, f"--port={port}",
               f"--served-model-name={MODEL_NAME}", "--load-format=dummy", "--max-model-len=8192",
               f"--max-num-seqs={_SEQS}", f"--api-server-count={servers}", "--disable-uvicorn-access-log"]  # fmt: skip
    env = os.environ | stage.caches | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    log = stage.folder / f"vllm-{servers}.log"
    with log.open("w") as sink:
        server = subprocess.Popen(command, env=env, stdout=sink, stderr=sink, process_group=0)
    try:
        _wait_for(f"http://127.0.0.1:{port}", server, log)
        yield _at(f"http://127.0.0.1:{port}")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        time.sleep(3)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        time.sleep(2)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)


@contextmanager
def _bare(stage: Stage) -> Iterator[Server]:
    """AsyncLLM alone, in a process that takes a number of streams a line."""
    env = os.environ | stage.caches | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    command = [sys.executable, "-m", "tests.gpu.front_end", "--engine", "--model", stage.model]
    log = (stage.folder / "engine.log").open("w")
    engine = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert engine.stdin is not None
    assert engine.stdout is not None

    def ask(streams: int) -> Seen:
        print(streams, file=engine.stdin, flush=True)
        for line in engine.stdout or ():
            if line.startswith("{"):
                report = json.loads(line)
                return report["seconds"], report["first"], 0.0
        raise AssertionError((stage.folder / "engine.log").read_text()[-3000:])

    try:
        yield Server(ask)
    finally:
        engine.stdin.close()
        engine.wait(60)
        log.close()


async def _engine(model: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=model, **_ENGINE), usage_context=UsageContext.OPENAI_API_SERVER
    )
    params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.DELTA)

    async def measure(streams: int) -> tuple[float, list[float]]:
        left, first = iter(range(_requests(streams))), []

        async def worker() -> None:
            for number in left:
                began, took = time.perf_counter(), 0.0
                prompt = {"prompt_token_ids": [random.randrange(1000, 20_000) for _ in range(40)]}
                async for _ in llm.generate(prompt, params, f"{began}-{number}"):
                    took = took or time.perf_counter() - began
                first.append(took)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(streams)))
        return time.perf_counter() - began, first

    while line := await asyncio.to_thread(sys.stdin.readline):
        seconds, first = await measure(int(line))
        print(json.dumps({"seconds": seconds, "first": first}), flush=True)
    llm.shutdown()


SERVERS: Mapping[str, Callable[[Stage], Any]] = {
    "llm-serve": lambda stage: _ours(stage, 1),
    "llm-serve x 4": lambda stage: _ours(stage, 4),
    "vllm": lambda stage: _vllm(stage, 1),
    "vllm x 4": lambda stage: _vllm(stage, 4),
    "engine": _bare,
}


def main() -> None:
    """Measure the servers, one after the other, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="*", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--streams", nargs="*", type=int, default=[64, 256, 512])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--caches", type=Path, help="a folder of an earlier run, so that this one begins warm")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        return asyncio.run(_engine(given.model))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(given.model, Path(folder), given.logs, given.caches)
        for name in given.only:
            rows[name] = _measure(name, stage, given.streams, given.rounds)
            print(name, json.dumps(rows[name]), flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))
    return None


def _measure(name: str, stage: Stage, counts: list[int], rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        with SERVERS[name](stage) as server:
            server.load(64)  # warm-up: what is compiled at the first request
            for streams in counts:
                seen = [server.load(streams) for _ in range(rounds)]
                row[f"requests/s @{streams}"] = round(
                    statistics.median(len(first) / seconds for seconds, first, _ in seen), 1
                )
                firsts = [each for _, first, _ in seen for each in first]
                row[f"TTFT ms P50/P99 @{streams}"] = [round(1000 * percentile(firsts, share)) for share in (0.5, 0.99)]
                row[f"events per answer @{streams}"] = round(statistics.median(events for *_, events in seen), 1)
            if server.url:
                took = _scrapes(server)
                row["scrape ms P50/max @64"] = [round(statistics.median(took), 1), round(max(took), 1)]
    except Exception:  # noqa: BLE001 - the other servers still count
        row["failed"] = traceback.format_exc()[-1500:]
    return row


if __name__ == "__main__":
    main()
