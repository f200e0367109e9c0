"""What it costs to look at a request before it is let in.

    python -m tests.bench.bench_edge

The body is on the way of every request, on the one loop that serves them all: microseconds here are requests per second.
"""

from __future__ import annotations

import json
import timeit
from functools import partial
from typing import Any

from llm_serve.core.edge import Edge
from llm_serve.core.settings import LimitSettings


def _chat(messages: int, characters: int, tools: int = 0) -> bytes:
    body: dict[str, Any] = {
        "model": "m", "temperature": 0.7, "max_tokens": 256, "stream": True, "stop": ["\n"],
        "messages": [{"role": ("user", "assistant")[n % 2], "content": "x, y " * (characters // 5)} for n in range(messages)],
    }  # fmt: skip
    properties = {f"p{n}": {"type": "string", "description": "d" * 60} for n in range(6)}
    body["tools"] = [
        {"type": "function", "function": {"name": f"f{n}", "description": "d" * 300, "parameters": {"properties": properties}}}
        for n in range(tools)
    ]  # fmt: skip
    return json.dumps(body).encode()


def _image(size: int) -> bytes:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}]}).encode()


BODIES = {
    "one message": _chat(1, 60),
    "four messages": _chat(4, 200),
    "twenty messages": _chat(20, 500),
    "a hundred messages": _chat(100, 4000),
    "forty tools": _chat(2, 300, 40),
    "an image": _image(1_000_000),
    "32,000 tokens": json.dumps({"prompt": list(range(32_000))}).encode(),
}


def main() -> None:
    """Print a line for each kind of body."""
    edge = Edge.of(LimitSettings(), {})
    print(f"{'body':20} {'KB':>8} {'edge us':>10} {'json.loads us':>14}")
    for name, body in BODIES.items():
        assert edge.refusal(body) is None, name
        number = max(3, min(2000, 2_000_000 // len(body)))
        ours = min(timeit.repeat(partial(edge.refusal, body), number=number, repeat=7)) / number
        plain = min(timeit.repeat(partial(json.loads, body), number=number, repeat=7)) / number
        print(f"{name:20} {len(body) / 1000:8.1f} {ours * 1e6:10.1f} {plain * 1e6:14.1f}")


if __name__ == "__main__":
    main()
