"""The cheapest client of short streamed chats: it counts events and reads none. A process of its own imports little.

    python -m tests.bench.chats URL MODEL STREAMS REQUESTS TOKENS

says "ready", begins at a line of its input, so that several can begin together, and prints one line of JSON: when it began
and ended, seconds to the first event of each answer, and all events.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import aiohttp

_WORDS = ("sun", "sea", "wind", "rock", "tree", "bird", "fish", "salt")


async def run(url: str, model: str, streams: int, requests: int, tokens: int) -> tuple[list[float], int]:
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


def main() -> None:
    """Load a server and report."""
    url, model, *numbers = sys.argv[1:]
    streams, requests, tokens = map(int, numbers)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    first, events = asyncio.run(run(url, model, streams, requests, tokens))
    print(json.dumps({"began": began, "ended": time.time(), "first": first, "events": events}))


if __name__ == "__main__":
    main()
