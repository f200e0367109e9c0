"""`llm-serve bench` against `vllm bench serve`: the same server, concurrency, prompts and lengths, turn by turn.

    python -m tests.bench.bench_agreement [--url URL] [--model FOLDER] [--streams 8 16] [--each 6] [--rounds 3] [--together] [--json FILE]

Without --url it starts a daemon with the demo's model. Each run's prompts are the same but for a number in front, by
which no run finds the prompts of the one before in the server's cache. vLLM's reader of files of prompts needs pandas,
which is not among its own dependencies: the prompts are given to the function behind it. On a machine whose speed
changes from minute to minute, `--together` lets both measure the same minutes of the same server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx

from llm_serve.bench.client import Server
from llm_serve.bench.measure import Plan, measure
from llm_serve.core.workload import Ask, Step, made_up
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.bench import servers

Figures = dict[str, float]
_OWN = "vllm:time_to_first_token_seconds"
_FIGURES = (
    "server_ttft_mean",
    "requests_per_s",
    "tokens_per_s",
    "ttft_p50",
    "ttft_p99",
    "tpot_p50",
    "tpot_p99",
    "latency_p50",
    "latency_p99",
)


def prompts(run: int, count: int) -> tuple[Ask, ...]:
    """The requests of one run: the same texts each time behind another number. Answers of 30 to 70 tokens: were they of
    one length, all would end in one step, and whoever asks again first would always find the next one first.
    """
    same = itertools.islice(made_up("short", random.Random(5).random), count)
    texts = (str(ask.prompt).partition("-")[2] for ask in same)
    return tuple(Ask(f"{1000 + run}{text}", 30 + number * 7 % 41) for number, text in enumerate(texts))


def ours(url: str, asks: tuple[Ask, ...], streams: int) -> Figures:
    """One run of `llm-serve bench`."""
    plan = Plan(prompts=asks, steps=(Step(streams=streams),), requests=(len(asks) - streams) // streams)
    report = asyncio.run(measure(Server(url), plan, asyncio.Event(), lambda what, tally: None))
    found = report.steps[0].figures
    assert not found.errors, found.errors
    assert len(asks) - streams == found.answered
    times = {"ttft": found.ttft_s, "tpot": found.tpot_s, "latency": found.latency_s}
    return {
        "requests_per_s": found.requests_per_s,
        "tokens_per_s": found.tokens_per_s or 0.0,
        **{f"{name}_p50": (spread.p50 or 0.0) * 1000 for name, spread in times.items()},
        **{f"{name}_p99": (spread.p99 or 0.0) * 1000 for name, spread in times.items()},
    }


def theirs(url: str, asks: tuple[Ask, ...], streams: int, model: Path) -> Figures:
    """One run of `vllm bench serve`, which wants the model's tokenizer."""
    module: Any = importlib.import_module("vllm.benchmarks.serve")
    datasets: Any = importlib.import_module("vllm.benchmarks.datasets")
    parser: Any = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    module.add_cli_args(parser)
    options = parser.parse_args([
        "--backend=openai-chat", f"--base-url={url}", "--endpoint=/v1/chat/completions", "--dataset-name=custom",
        f"--max-concurrency={streams}", f"--num-warmups={streams}", "--ignore-eos", "--temperature=0",
        f"--tokenizer={model}", "--percentile-metrics=ttft,tpot,e2el", "--metric-percentiles=50,99", "--disable-tqdm",
    ])  # fmt: skip
    options.num_prompts = len(asks) - streams
    requests = [datasets.SampleRequest(prompt=ask.prompt, prompt_len=1, expected_output_len=ask.tokens) for ask in asks]
    # Its warm-up sends the first request again and again, ours the first few: neither is counted.
    module.get_samples = lambda _args, _tokenizer: requests[streams:]
    with contextlib.redirect_stdout(io.StringIO()):
        found = asyncio.run(module.main_async(options))
    assert options.num_prompts == found["completed"], found
    names = {"ttft": "ttft", "tpot": "tpot", "latency": "e2el"}
    return {
        "requests_per_s": found["request_throughput"],
        "tokens_per_s": found["output_throughput"],
        **{f"{name}_p50": float(found[f"median_{other}_ms"]) for name, other in names.items()},
        **{f"{name}_p99": float(found[f"p99_{other}_ms"]) for name, other in names.items()},
    }


def _first_tokens(url: str) -> tuple[float, float]:
    """What the server says of itself: the sum of all times to first tokens, in seconds, and their number."""
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    sums = re.findall(rf"^{_OWN}_(sum|count){{[^}}]*}} (\S+)$", text, re.MULTILINE)
    total = {kind: sum(float(value) for each, value in sums if each == kind) for kind in ("sum", "count")}
    return total["sum"], total["count"]


def _mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    return 1000 * (after[0] - before[0]) / max(1.0, after[1] - before[1])


def _load() -> None:
    importlib.import_module("vllm.benchmarks.serve")


def compare(url: str, model: Path, streams: int, each: int, rounds: int, *, together: bool) -> dict[str, list[Figures]]:
    """Both, each in a process of its own: in turn, the first one changing, or at the same time."""
    tools: dict[str, Callable[..., Figures]] = {
        "llm-serve bench": ours,
        "vllm bench serve": functools.partial(theirs, model=model),
    }
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    run, own = itertools.count(streams * 100), dict[tuple[str, int], float]()
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in tools}
        for pool in pools.values():
            pool.submit(_load).result()  # none begins before the other can
        for number in range(rounds):
            waiting = []
            for name in list(tools)[:: 1 if number % 2 == 0 else -1]:
                asks = prompts(next(run), streams * (each + 1))
                waiting.append((name, pools[name].submit(tools[name], url, asks, streams)))
                if not together:
                    before = _first_tokens(url)
                    wait([waiting[-1][1]])
                    own[name, number] = _mean_ms(before, _first_tokens(url))
            for name, future in waiting:
                found[name].append(future.result() | {"server_ttft_mean": own.get((name, number), 0.0)})
                print(f"round {number + 1}, {streams} streams, {name}: {found[name][-1]}", flush=True)
    return found


def main() -> None:
    """Measure, print one table a concurrency, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs; without it one is started")
    parser.add_argument("--model", type=Path, help="its model's folder; the demo's without it")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--each", type=int, default=6, help="requests a stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="at the same time, each with so many streams")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = given.model or ensure_demo_model(default_cache(os.environ), print)
    with contextlib.ExitStack() as stack:
        url = given.url
        if url is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-serve-bench-")))
            url = stack.enter_context(servers.llm_serve(model, cache)).url
        found = {
            streams: compare(url, model, streams, given.each, given.rounds, together=given.together)
            for streams in given.streams
        }
    for streams, tools in found.items():
        mine, other = (
            {name: statistics.median(each[name] for each in rounds) for name in _FIGURES} for rounds in tools.values()
        )
        print(f"\n{f'{streams} streams':16} {'llm-serve bench':>16} {'vllm bench serve':>17} {'ratio':>7}")
        for name in _FIGURES:
            print(f"{name:16} {mine[name]:16.2f} {other[name]:17.2f} {mine[name] / (other[name] or float('nan')):7.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
