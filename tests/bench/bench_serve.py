"""llm-serve against vLLM's own API server, on the same machine, with the same arguments, turn by turn.

    python -m tests.bench.bench_serve [--model FOLDER] [--rounds 3] [--json FILE]

Each round starts both servers, one after the other, and measures start, load and rest; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_serve.core.figures import percentile
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.bench import load, servers

_STREAMS = (1, 8, 16)
_TOKENS = 50
_REQUESTS_PER_STREAM = {1: 8, 8: 6, 16: 5}
Figures = dict[str, float]


def measure(start: Callable[..., Any], model: Path, cache: Path, *, is_ours: bool) -> Figures:
    """All figures of one server in one life."""
    figures: Figures = {}
    with start(model, cache) as running:
        figures["start_to_first_token_s"] = running.first_token_s
        asyncio.run(load.run(running.url, servers.MODEL_NAME, streams=4, requests=8, tokens=_TOKENS))
        for streams in _STREAMS:
            count = _REQUESTS_PER_STREAM[streams] * streams
            seen = asyncio.run(
                load.run(running.url, servers.MODEL_NAME, streams=streams, requests=count, tokens=_TOKENS)
            )
            assert not seen.errors, f"of {count} requests: {seen.errors}"
            assert seen.answered == count
            figures[f"requests_per_s@{streams}"] = seen.requests_per_s
            figures[f"ttft_p50_ms@{streams}"] = (seen.ttft_s.p50 or 0.0) * 1000
            figures[f"ttft_p99_ms@{streams}"] = (seen.ttft_s.p99 or 0.0) * 1000
        figures["server_process_mib"] = running.resident_mib()
        figures["idle_cpu_percent"] = running.cpu_share(15) * 100
        if is_ours:
            figures |= _under_load(running.url)
    return figures


def _under_load(url: str) -> Figures:
    async def both() -> dict[str, list[float]]:
        busy = load.run(url, servers.MODEL_NAME, streams=16, requests=64, tokens=_TOKENS)
        _, metrics, ready = await asyncio.gather(
            busy, load.probe(url, "/metrics", seconds=15), load.probe(url, "/readyz", seconds=15)
        )
        return {"metrics": metrics, "readyz": ready}

    seen = asyncio.run(both())
    return {f"{path}_p99_under_load_ms": percentile(took, 0.99) * 1000 for path, took in seen.items()}


def while_loading(model: Path, cache: Path) -> Figures:
    """How fast /metrics and /readyz answer from the first second until the engine serves."""
    seen: dict[str, list[float]] = {"metrics": [], "readyz": []}

    def watch(url: str, is_over: threading.Event) -> None:
        async def both() -> None:
            while not is_over.is_set():
                for path, took in seen.items():
                    took.extend(await load.probe(url, f"/{path}", seconds=0.1, every_s=0.02))

        asyncio.run(both())

    original = servers._first_token

    def watched(url: str, process: Any, log: Path) -> float:
        is_over = threading.Event()
        watcher = threading.Thread(target=watch, args=(url, is_over))
        watcher.start()
        try:
            return original(url, process, log)
        finally:
            is_over.set()
            watcher.join()

    servers._first_token = watched
    try:
        with servers.llm_serve(model, cache):
            pass
    finally:
        servers._first_token = original
    figures = {f"{path}_p99_while_loading_ms": percentile(took, 0.99) * 1000 for path, took in seen.items()}
    return figures | {f"{path}_samples_while_loading": float(len(took)) for path, took in seen.items()}


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = given.model or ensure_demo_model(default_cache(os.environ), print)
    # What vLLM's server leaves among the temporary files goes with this folder.
    folder = tempfile.TemporaryDirectory(prefix="llm-serve-bench-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name
    cache = Path(folder.name) / "cache"
    kinds = {"llm-serve": servers.llm_serve, "vLLM": servers.vllm_server}
    rounds: dict[str, list[Figures]] = {name: [] for name in kinds}
    cold: dict[str, float] = {}
    for name, start in kinds.items():
        with start(model, servers.fresh(cache)) as running:
            cold[name] = running.first_token_s
    for number in range(given.rounds):
        for name, start in list(kinds.items())[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(measure(start, model, cache, is_ours=name == "llm-serve"))
            print(f"round {number + 1} {name} {time.strftime('%H:%M:%S')}: {rounds[name][-1]}", flush=True)
    loads = [while_loading(model, cache) for _ in range(given.rounds)]
    loading = {key: statistics.median(each[key] for each in loads) for key in loads[0]}
    ours, theirs = (
        {key: statistics.median(each[key] for each in rounds[name]) for key in rounds[name][0]} for name in kinds
    )
    ours["cold_start_to_first_token_s"], theirs["cold_start_to_first_token_s"] = cold["llm-serve"], cold["vLLM"]
    ours |= loading
    print(f"\n{'figure':34} {'llm-serve':>10} {'vLLM':>10} {'ratio':>7}")
    for key, value in ours.items():
        other = theirs.get(key)
        print(
            f"{key:34} {value:10.2f} "
            + (f"{other:10.2f} {value / other if other else 0:7.3f}" if other is not None else "")
        )
    if given.json:
        given.json.write_text(json.dumps({"llm-serve": ours, "vLLM": theirs, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
