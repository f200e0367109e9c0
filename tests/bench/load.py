"""A closed-loop load of streamed completions, on aiohttp: httpx would measure itself."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import aiohttp

_PROMPTS = (
    "Once upon a time",
    "The sea was",
    "In the year 1900",
    "A good engineer",
    "My favourite food is",
    "Rain fell on",
)


@dataclass(frozen=True)
class Load:
    """What one load saw: seconds for all of it, and per request the time to its first token."""

    seconds: float
    first_token_s: list[float]
    errors: int

    @property
    def per_second(self) -> float:
        """Completed requests per second."""
        return len(self.first_token_s) / self.seconds


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; exact, from all samples."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


async def run(url: str, model: str, *, streams: int, requests: int, tokens: int) -> Load:
    """Keep `streams` requests of `tokens` tokens running until `requests` have been answered."""
    todo = iter(range(requests))
    first: list[float] = []
    errors = 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal errors
        for number in todo:
            if (took := await _one(session, url, model, number, tokens)) is None:
                errors += 1
            else:
                first.append(took)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(streams)))
        return Load(time.perf_counter() - began, first, errors)


async def _one(session: aiohttp.ClientSession, url: str, model: str, number: int, tokens: int) -> float | None:
    prompt = f"{_PROMPTS[number % len(_PROMPTS)]} ({number})"
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    began, first, chunks = time.perf_counter(), None, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return None
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                chunks += len(json.loads(line[6:]).get("choices", ()))
    return first if chunks >= tokens else None


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
