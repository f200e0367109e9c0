"""How much `llm-serve bench` can ask for before it is slower than the server: its ceiling, against a server without a model.

    python -m tests.bench.bench_generator [--seconds 8] [--json FILE]

The server answers as fast as Python can, or at the pace of an engine. It is Python too, and no faster than the
generator: what counts is what the generator reads for a second of its own CPU (`tokens_per_cpu_s`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_serve.bench.client import Asking, Server
from llm_serve.bench.load import Loop, Tally
from llm_serve.core.figures import figures
from llm_serve.core.workload import Ask, Step
from tests.daemon import eventually, free_port
from tests.sse_server import MODEL_NAME

_TOKENS = 50
_STREAMS = (1, 8, 64, 256)
_PACE = 20.0
"""Tokens a second in a stream, as of an engine with many: for the cost of a token in a thousand streams."""


@contextmanager
def server(tokens_per_s: float) -> Iterator[str]:
    """One server, ended at the end."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.sse_server", str(port), str(tokens_per_s)])
    try:
        eventually(lambda: _answers(port), bool, within_s=20, what="the server")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def ceiling(url: str, streams: int, seconds: float) -> dict[str, float]:
    """One closed loop of 50-token answers."""
    tally = Tally()
    async with Server(url).session(60) as session:
        loop = Loop(session, Asking(MODEL_NAME), itertools.repeat(Ask("Hello.", _TOKENS)), asyncio.Event())
        await loop.closed(tally, streams, requests=streams)
        tally = Tally()
        await loop.closed(tally, streams, seconds=seconds)
    found = figures(
        Step(streams=streams), tally.samples, began_s=tally.began_s, until_s=tally.until_s, generator=tally.generator
    )
    assert not found.errors, found.errors
    assert found.tokens_per_s is not None
    return {
        "requests_per_s": found.requests_per_s,
        "tokens_per_s": found.tokens_per_s,
        "generator_cpu": found.generator.cpu_share,
        "tokens_per_cpu_s": found.tokens_per_s / found.generator.cpu_share,
        "late_p99_ms": found.generator.late_p99_s * 1000,
        "ttft_p99_ms": (found.ttft_s.p99 or 0.0) * 1000,
    }


def main() -> None:
    """Measure, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found: dict[str, dict[str, float]] = {}
    for name, pace in (("as fast as it goes", 0.0), (f"{_PACE:g} tokens/s a stream", _PACE)):
        with server(pace) as url:
            for streams in _STREAMS:
                found[f"{streams} streams, {name}"] = asyncio.run(ceiling(url, streams, given.seconds))
    for name, row in found.items():
        print(f"{name:36}", *(f"{key} {value:.1f}" for key, value in row.items()), sep="  ", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
