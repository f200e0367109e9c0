"""What the process that answers HTTP costs: ours, vLLM's own server, and ours of another checkout, turn by turn.

    python -m tests.bench.bench_front_end [--model FOLDER] [--streams 64] [--rounds 5] [--against CHECKOUT] [--json FILE]

All run at once and are loaded one after the other, with short streamed chats. Their model has one small layer with made
up weights, so that the engine is quick and HTTP is most of the work. On a machine with few CPUs the engines and the
client take their part of them: CPU per answer tells more there than requests/s. `loop` is the thread of the event loop
alone, the one that is the limit of a single process; `process` is with all its threads, without the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from llm_serve.core.figures import percentile
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.bench import chats, servers

_TOKENS, _PER_STREAM = 50, 8
_SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
Figures = dict[str, float]


def small_model(demo: Path, folder: Path) -> Path:
    """The demo model's tokenizer, template and kind with one small layer and no weights."""
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | _SMALL))
    return folder


def measure(running: servers.Running, streams: int) -> Figures:
    """One load."""
    loop, process = _cpu_s(running.process.pid)
    began = time.perf_counter()
    first, events = asyncio.run(chats.run(running.url, servers.MODEL_NAME, streams, streams * _PER_STREAM, _TOKENS))
    seconds = time.perf_counter() - began
    loop, process = (after - before for after, before in zip(_cpu_s(running.process.pid), (loop, process), strict=True))
    return {
        "requests/s": len(first) / seconds,
        "TTFT P50 ms": 1000 * percentile(first, 0.5),
        "TTFT P99 ms": 1000 * percentile(first, 0.99),
        "events per answer": events / len(first),
        "CPU per answer, loop, ms": 1000 * loop / len(first),
        "CPU per answer, process, ms": 1000 * process / len(first),
    }


def _cpu_s(pid: int) -> tuple[float, float]:
    """Seconds on a CPU of the main thread, and of all threads, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task")
    each = {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}
    return each[str(pid)], sum(each.values())


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="whose tokenizer and kind are taken; the demo's without it")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of llm-serve")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    servers.ARGUMENTS |= {"max_num_seqs": given.streams, "load_format": "dummy"}
    demo = given.model or ensure_demo_model(default_cache(os.environ), print)
    with tempfile.TemporaryDirectory(prefix="llm-serve-bench-") as folder, contextlib.ExitStack() as stack:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        model, cache = small_model(demo, Path(folder) / "model"), Path(folder) / "cache"
        running = {"llm-serve": stack.enter_context(servers.llm_serve(model, cache))}
        running["vLLM"] = stack.enter_context(servers.vllm_server(model, cache))
        if given.against:
            other = servers.llm_serve(model, cache, given.against.resolve() / "daemon")
            running["against"] = stack.enter_context(other)
        for server in running.values():
            measure(server, given.streams)  # what is compiled or filled at the first requests
        rounds: dict[str, list[Figures]] = {name: [] for name in running}
        for number in range(given.rounds):
            for name in list(running)[:: 1 if number % 2 == 0 else -1]:
                rounds[name].append(measure(running[name], given.streams))
    medians = {
        name: {key: statistics.median(each[key] for each in seen) for key in seen[0]} for name, seen in rounds.items()
    }
    print(f"{given.streams} streams, {given.rounds} rounds, medians; in brackets llm-serve's share of it")
    for key, ours in medians["llm-serve"].items():
        others = (f"{name} {seen[key]:9.2f} ({ours / seen[key]:.3f})" for name, seen in list(medians.items())[1:])
        print(f"{key:28} llm-serve {ours:9.2f}   {'   '.join(others)}")
    if given.json:
        given.json.write_text(json.dumps({"medians": medians, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
