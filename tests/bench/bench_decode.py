"""Decoding speed of an engine forked from the preloaded fork server against one that vLLM spawns itself.

    python -m tests.bench.bench_decode [--model FOLDER] [--rounds 3]

libgomp reads OMP_* when it is loaded, which for a fork was in the fork server: this shows that nothing is lost by it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_serve.host.demo_model import default_cache, ensure_demo_model

_PROMPT = [1, 42, 77, 1024]


async def tokens_per_second(model: str, way: str) -> tuple[float, float, float]:
    """(seconds to build, tokens/s of one stream, tokens/s of eight) for an engine built this way."""
    from llm_serve.core.plan import EnginePlan
    from llm_serve.core.settings import RecoverySettings
    from llm_serve.engine import forkserver, relay
    from llm_serve.engine.ending import Places
    from llm_serve.engine.evidence import Collector
    from llm_serve.engine.factory import Factory, Origin

    arguments = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 512 << 20,
    }
    plan = EnginePlan(model, arguments, {})
    with tempfile.TemporaryDirectory() as folder:
        receiver = relay.Receiver(Path(folder), lambda value: None, lambda line: None)
        factory = Factory(Places(Path(folder), Path(folder)), Collector(), receiver, Origin("bench"))
        if way == "spawn":
            forkserver.install = lambda: None
        factory.prepare(plan, ["LlamaForCausalLM"])
        first = await factory.build(plan, 1, RecoverySettings(start_timeout_s=600, stall_timeout_s=600))
        await factory.ending.stop(first)
        began = time.perf_counter()
        engine = await factory.build(plan, 2, RecoverySettings(start_timeout_s=600, stall_timeout_s=600))
        built = time.perf_counter() - began
        await _decode(engine.llm, 1, 32)
        one, eight = await _decode(engine.llm, 1, 200), await _decode(engine.llm, 8, 100)
        await factory.ending.stop(engine)
        factory.close()
        receiver.close()
    return built, one, eight


async def _decode(llm: object, streams: int, tokens: int) -> float:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def stream(number: int) -> None:
        async for _ in llm.generate({"prompt_token_ids": [*_PROMPT, number]}, params, f"{streams}-{tokens}-{number}"):  # type: ignore[attr-defined]
            pass

    began = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(streams)))
    return streams * tokens / (time.perf_counter() - began)


def main() -> None:
    """Run each way in processes of its own, turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way")
    given = parser.parse_args()
    model = given.model or ensure_demo_model(default_cache(os.environ), print)
    if given.way:
        print("FIGURES", *asyncio.run(tokens_per_second(str(model), given.way)), flush=True)
        os._exit(0)
    seen: dict[str, list[list[float]]] = {"fork server": [], "spawn": []}
    for number in range(given.rounds):
        for way in list(seen)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, "-m", "tests.bench.bench_decode"]
            out = subprocess.run(
                [*command, "--model", str(model), "--way", way],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            line = next(line for line in out.splitlines() if line.startswith("FIGURES"))
            seen[way].append([float(word) for word in line.split()[1:]])
            print(f"round {number + 1} {way}: {seen[way][-1]}", flush=True)
    print(f"\n{'way':12} {'rebuild s':>10} {'1 stream tok/s':>15} {'8 streams tok/s':>16}")
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in seen.items()}
    for way, (built, one, eight) in medians.items():
        print(f"{way:12} {built:10.2f} {one:15.1f} {eight:16.1f}")
    fork, spawn = medians["fork server"], medians["spawn"]
    print("ratio fork/spawn: " + " ".join(f"{ours / theirs:.3f}" for ours, theirs in zip(fork, spawn, strict=True)))


if __name__ == "__main__":
    main()
