"""What happens at ten times the load that the engine can take: refusals, goodput, and two keys that offer 10 : 1.

    python -m tests.bench.bench_overload [--model FOLDER] [--factor 10] [--seconds 60] [--json FILE]

Peak goodput is a closed loop at about the engine's batch, before and after; the overload is an open loop, whose
requests come on time however long the answers take.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from llm_serve.core.figures import percentile
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import ENGINE, MODEL_NAME, Daemon

_FEWEST_TOKENS, _SPREAD = 30, 41
_KEYS = {"many": "many-0123456789", "few": "few-0123456789"}
_TURN = ["many"] * 10 + ["few"]
_SETTLE_S = 15.0
_MAX_QUEUED = 64
Figures = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One request: whose it was, its status and tokens, how long the answer took, and when it ended."""

    key: str
    status: int
    tokens: int
    seconds: float
    ended: float


async def ask(session: aiohttp.ClientSession, url: str, key: str, number: int) -> Sample:
    """One completion, not streamed. The lengths differ, so that requests do not end in bursts."""
    tokens = _FEWEST_TOKENS + number * 7 % _SPREAD
    body = {
        "model": MODEL_NAME, "prompt": f"Once upon a time ({number})", "max_tokens": tokens, "ignore_eos": True,
        "temperature": 0,
    }  # fmt: skip
    began = time.perf_counter()
    headers = {"authorization": f"Bearer {_KEYS[key]}"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        await answer.read()
        return Sample(key, answer.status, tokens, time.perf_counter() - began, time.perf_counter())


async def peak(url: str, *, streams: int, seconds: float) -> float:
    """Tokens per second, of completed requests, in a closed loop."""
    numbers, done = iter(range(1_000_000)), list[Sample]()
    until = time.perf_counter() + seconds

    async def worker(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            done.append(await ask(session, url, "many", next(numbers)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(streams)))
        ended = time.perf_counter()
    assert {200} == {sample.status for sample in done}
    # The first and last requests find a batch that is not full: only what ended in between counts.
    first, last = began + seconds / 4, ended - seconds / 4
    return sum(sample.tokens for sample in done if first <= sample.ended < last) / (last - first)


async def overload(url: str, *, per_s: float, seconds: float) -> tuple[list[Sample], float]:
    """All samples of an open loop, and when it began. What has not been answered at its end is given up."""
    done: list[Sample] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        done.append(await ask(session, url, _TURN[number % len(_TURN)], number))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()
        running: set[asyncio.Task[None]] = set()
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
            running.add(asyncio.create_task(one(session, number)))
        for each in running:
            each.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
    failed = [each for each in ended if isinstance(each, Exception)]
    assert not failed, f"{len(failed)} requests met neither 200 nor 503: {failed[0]!r}"
    return done, began


def evaluate(samples: list[Sample], began: float, seconds: float, goodput: float) -> Figures:
    """The figures of one overload, after the queue had filled."""
    settled = [sample for sample in samples if sample.ended >= began + _SETTLE_S]
    served = [sample for sample in settled if sample.status == 200]
    assert collections.Counter(sample.status for sample in samples).keys() == {200, 503}
    refused = [sample.seconds * 1000 for sample in samples if sample.status == 503]
    by_key: collections.Counter[str] = collections.Counter()
    for sample in served:
        by_key[sample.key] += sample.tokens
    per_s = by_key.total() / (seconds - _SETTLE_S)
    return {
        "refused": float(len(refused)),
        "refused_p50_ms": percentile(refused, 0.50),
        "refused_p99_ms": percentile(refused, 0.99),
        "refused_max_ms": max(refused),
        "goodput_tokens_per_s": per_s,
        "goodput_ratio": per_s / goodput,
        "tokens_many": float(by_key["many"]),
        "tokens_few": float(by_key["few"]),
        "few_to_many": by_key["few"] / max(1, by_key["many"]),
        "wait_p50_s": percentile([sample.seconds for sample in served], 0.5),
    }


def measure(model: Path, factors: list[float], seconds: float) -> Figures:
    """Peak, overloads, peak again, in one life of a daemon."""
    with tempfile.TemporaryDirectory(prefix="llm-serve-bench-") as folder:
        keys = Path(folder) / "keys"
        keys.write_text("\n".join(_KEYS.values()) + "\n")
        keys.chmod(0o600)
        server = {"api_keys": str(keys), "max_queued": _MAX_QUEUED, "hold_timeout_s": 120}
        daemon = Daemon(model, {"server": server}, is_apart=True).start()
        try:
            daemon.wait_ready()
            return asyncio.run(_measure(daemon.url, factors, seconds))
        finally:
            daemon.destroy()


async def _measure(url: str, factors: list[float], seconds: float) -> Figures:
    slots = int(ENGINE["max_num_seqs"])
    await peak(url, streams=slots, seconds=8)
    peaks = [await peak(url, streams=streams, seconds=20) for streams in (slots, slots + slots // 4)]
    found: dict[float, tuple[list[Sample], float, float]] = {}
    for factor in factors:
        length = seconds if factor == factors[0] else _SETTLE_S + 10
        per_s = factor * max(peaks) / (_FEWEST_TOKENS + _SPREAD // 2)
        samples, began = await overload(url, per_s=per_s, seconds=length)
        found[factor] = samples, began, length
        await asyncio.sleep(3)
    peaks.append(await peak(url, streams=slots + slots // 4, seconds=20))
    print("peaks, tokens/s:", *(f"{each:.0f}" for each in peaks), flush=True)
    figures: Figures = {"peak_tokens_per_s": max(peaks), "lowest_peak_tokens_per_s": min(peaks)}
    for factor, (samples, began, length) in found.items():
        figures |= {
            f"{name}@{factor:g}x": value for name, value in evaluate(samples, began, length, max(peaks)).items()
        }
    return figures


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's without it")
    parser.add_argument("--factor", type=float, nargs="+", default=[10.0, 100.0])
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures: dict[str, Any] = measure(
        given.model or ensure_demo_model(default_cache(os.environ), print), given.factor, given.seconds
    )
    for name, value in figures.items():
        print(f"{name:24} {value:10.2f}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
