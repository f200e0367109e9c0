"""Loads for our own benchmarks: closed loops of streamed completions by `llm-serve bench`'s generator, and probes."""

from __future__ import annotations

import asyncio
import itertools
import time

import aiohttp

from llm_serve.bench.client import Asking, Server
from llm_serve.bench.load import Loop, Tally
from llm_serve.core.figures import Figures, figures
from llm_serve.core.workload import Ask, Step

_PROMPTS = (
    "Once upon a time",
    "The sea was",
    "In the year 1900",
    "A good engineer",
    "My favourite food is",
    "Rain fell on",
)


async def run(url: str, model: str, *, streams: int, requests: int, tokens: int) -> Figures:
    """Keep `streams` requests of `tokens` tokens running until `requests` have been answered."""
    prompts = zip(itertools.cycle(_PROMPTS), itertools.count())
    asks = (Ask(f"{prompt} ({number})", tokens) for prompt, number in prompts)
    tally = Tally()
    async with Server(url).session(timeout_s=600) as session:
        loop = Loop(session, Asking(model, completions=True), asks, asyncio.Event())
        await loop.closed(tally, streams, requests=requests)
    return figures(Step(streams=streams), tally.samples, began_s=tally.began_s, generator=tally.generator)


async def probe(url: str, path: str, *, seconds: float, every_s: float = 0.05) -> list[float]:
    """Ask for one path again and again, and return how long each answer took."""
    took: list[float] = []
    async with aiohttp.ClientSession() as session:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            try:
                async with session.get(url + path) as response:
                    await response.read()
            except aiohttp.ClientError:
                await asyncio.sleep(every_s)
                continue
            took.append(time.perf_counter() - began)
            await asyncio.sleep(every_s)
    return took
