"""Loads for our own benchmarks: closed loops of streamed completions by `llm-serve bench`'s generator, and probes."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any

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
_WORDS = ("sun", "sea", "wind", "rock", "tree", "bird", "fish", "salt")


async def run(url: str, model: str, *, streams: int, requests: int, tokens: int) -> Figures:
    """Keep `streams` requests of `tokens` tokens running until `requests` have been answered."""
    prompts = zip(itertools.cycle(_PROMPTS), itertools.count())
    asks = (Ask(f"{prompt} ({number})", tokens) for prompt, number in prompts)
    tally = Tally()
    async with Server(url).session(timeout_s=600) as session:
        loop = Loop(session, Asking(model, completions=True), asks, asyncio.Event())
        await loop.closed(tally, streams, requests=requests)
    return figures(Step(streams=streams), tally.samples, began_s=tally.began_s, generator=tally.generator)


async def chats(url: str, model: str, streams: int, requests: int, tokens: int) -> tuple[list[float], int]:
    """Keep `streams` short chats running until `requests` have been answered, each streamed and of `tokens` tokens.

    Returns seconds to the first event of each, in the order of their ends, and how many events they had in all. No
    event is read but counted: the client is to cost as little as it can.
    """
    left, first, events = iter(range(requests)), [], 0

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        nonlocal events
        for _ in left:
            began, took, chunks = time.perf_counter(), 0.0, 0
            async with session.post(f"{url}/v1/chat/completions", json=_chat(model, tokens)) as answer:
                assert answer.status == 200, await answer.text()
                async for chunk in answer.content.iter_any():
                    took = took or time.perf_counter() - began
                    chunks += chunk.count(b"data: {")
            assert chunks > 1, "an answer that was cut"
            first.append(took)
            events += chunks

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one_after_another(session) for _ in range(streams)))
    return first, events


def _chat(model: str, tokens: int) -> dict[str, Any]:
    words = " ".join(random.choice(_WORDS) for _ in range(12))
    return {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": tokens,
            "ignore_eos": True, "stream": True, "temperature": 0}  # fmt: skip


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
