"""What the survivor costs while nothing fails: the same streams asked of an engine directly and through it.

    python -m tests.bench.bench_survivor [--model FOLDER] [--rounds 5] [--json FILE]

One engine, both ways by turns. Also with and without the processor that repeats tokens, in two engines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from llm_serve.host.demo_model import default_cache, ensure_demo_model

_STREAMS, _TOKENS = 16, 64
_NAMES = itertools.count()


async def measure(model: str, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round, by way."""
    from llm_serve.core.plan import EnginePlan
    from llm_serve.core.settings import RecoverySettings
    from llm_serve.engine import forced, relay
    from llm_serve.engine.ending import Places
    from llm_serve.engine.evidence import Collector
    from llm_serve.engine.factory import Factory, Origin

    arguments = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True,
                 "kv_cache_memory_bytes": 512 << 20}  # fmt: skip
    plan, install = EnginePlan(model, arguments, {}), forced.install
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        receiver = relay.Receiver(Path(folder), lambda value: None, lambda line: None)
        factory = Factory(Places(Path(folder), Path(folder)), Collector(), receiver, Origin("bench"))
        factory.prepare(plan, ["LlamaForCausalLM"])
        for epoch, with_processor in enumerate((True, False), 1):
            forced.install = install if with_processor else lambda config: None
            engine = await factory.build(plan, epoch, RecoverySettings(start_timeout_s=600, stall_timeout_s=600))
            await _both_ways(engine.llm, rounds, "" if with_processor else ", no processor", seen)
            await factory.ending.stop(engine)
        factory.close()
        receiver.close()
    return seen


async def _both_ways(llm: Any, rounds: int, suffix: str, seen: dict[str, list[float]]) -> None:
    from llm_serve.engine.survivor import Survivor

    survivor = Survivor(lambda epoch: None)
    survivor.attach(llm)
    survivor.bind(llm, 1)
    ways = {f"direct{suffix}": llm, f"survivor{suffix}": survivor}
    await _decode(llm)
    for number in range(rounds):
        for name, engine in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            seen.setdefault(name, []).append(await _decode(engine))
            print(f"round {number + 1} {name}: {seen[name][-1]:.1f} tok/s", flush=True)


async def _decode(engine: Any) -> float:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    delta = RequestOutputKind.DELTA
    params = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True, output_kind=delta)

    async def stream(number: int) -> None:
        async for _ in engine.generate({"prompt_token_ids": [1, 42, 77, number]}, params, f"r{next(_NAMES)}"):
            pass

    began = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(_STREAMS)))
    return _STREAMS * _TOKENS / (time.perf_counter() - began)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = given.model or ensure_demo_model(default_cache(os.environ), print)
    seen = asyncio.run(measure(str(model), given.rounds))
    medians = {name: statistics.median(values) for name, values in seen.items()}
    for name, value in medians.items():
        print(f"{name:24} {value:8.1f} tok/s")
    ratios = {
        "survivor / direct": medians["survivor"] / medians["direct"],
        "processor / none": medians["direct"] / medians["direct, no processor"],
    }
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:8.3f}")
    if given.json:
        given.json.write_text(json.dumps({"medians": medians, "ratios": ratios, "rounds": seen}, indent=2))
    os._exit(0)


if __name__ == "__main__":
    main()
