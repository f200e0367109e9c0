"""How long a start and a rebuild take on a real GPU, and what makes them faster.

    python -m tests.gpu.speed --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

LLM_SERVE_VARIANTS picks variants of `rebuilds`, LLM_SERVE_KILLS says how many of each.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import Any

import httpx

from tests.daemon import MODEL_NAME, Daemon
from tests.gpu.stage import Row, Stage, engine_core, phases, play, story, until_serving

FEW_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
SPARSE_SIZES = [1, 2, 4, *range(8, 65, 8), 80, 96, 112, 128, 160, 192, 224, 256]
"""vLLM's up to 64, and above it steps of an eighth to a quarter, up to the same largest one."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "measured each time": {"env": {"VLLM_ENABLE_STARTUP_PLAN": "0"}},
    "few graphs": {"engine": {"cudagraph_capture_sizes": FEW_SIZES}},
    "sparse graphs": {"engine": {"cudagraph_capture_sizes": SPARSE_SIZES}},
    "mega artifact": {"env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"}},
    "mega artifact, sparse graphs": {
        "env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"},
        "engine": {"cudagraph_capture_sizes": SPARSE_SIZES},
    },
    "mega artifact, whole graphs": {
        "env": {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"},
        "engine": {"compilation_config": {"cudagraph_mode": "FULL"}},
    },
    "eager": {"engine": {"enforce_eager": True}},
}
"""What may make a rebuild faster. vLLM uses the mega artifact by itself from torch 2.12 on."""


def start(stage: Stage) -> Row:
    """First start with empty caches, whatever backend is missing; then further processes on what was learned."""
    row: Row = {}
    began = time.monotonic()
    with stage.daemon(env={}) as daemon:
        for name in ("first", "next", "next but one"):
            if name != "first":
                daemon.stop()
                began = time.monotonic()
                daemon.start().wait_for_answers()
            until_serving(daemon, 1, 400)
            row[f"{name} start s"] = round(time.monotonic() - began, 1)
            row[name] = story(daemon)
        return row | {"phases": phases(daemon)}


def rebuilds(stage: Stage) -> Row:
    """Seconds from the death of an idle engine to the next answer, by variant (LLM_SERVE_VARIANTS, by semicolons); as many
    kills as LLM_SERVE_KILLS says."""
    row: Row = {}
    for name in os.environ.get("LLM_SERVE_VARIANTS", ";".join(VARIANTS)).split(";"):
        variant = VARIANTS[name]
        env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | variant.get("env", {})
        with stage.daemon(env=env, engine=variant.get("engine", {})) as daemon:
            until_serving(daemon, 1, 300)
            row[name], kills = [], int(os.environ.get("LLM_SERVE_KILLS", "3"))
            for _ in range(kills):
                began = time.monotonic()
                os.kill(engine_core(daemon), signal.SIGKILL)
                assert daemon.chat(max_tokens=1).status_code == 200
                row[name].append(round(time.monotonic() - began, 2))
            lines = [line[:120] for line in phases(daemon) if "Capturing" not in line]
            row[f"{name}: log"] = lines if name != "as it is" else []
    return row


def graph_sizes(stage: Stage) -> Row:
    """Tokens per second with all of vLLM's graph sizes and with few: what does a faster rebuild cost while serving?"""
    row: Row = {}
    for name, engine in {"vLLM's": {}, "sparse": {"cudagraph_capture_sizes": SPARSE_SIZES}}.items():
        with stage.daemon(engine=engine) as daemon:
            until_serving(daemon, 1, 300)
            _tokens_per_second(daemon, 128, 32)
            row[name] = {clients: [_tokens_per_second(daemon, clients, 256) for _ in range(3)]
                         for clients in (1, 20, 40, 66, 72, 100, 116, 128)}  # fmt: skip
    row["ratio"] = {clients: round(statistics.median(row["sparse"][clients]) / statistics.median(seen), 3)
                    for clients, seen in row["vLLM's"].items()}  # fmt: skip
    return row


def _tokens_per_second(daemon: Daemon, clients: int, tokens: int) -> float:
    body = {"model": MODEL_NAME, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    began = time.monotonic()
    asked = [
        daemon.later(
            lambda number=number: httpx.post(  # type: ignore[misc]
                f"{daemon.url}/v1/completions", json=body | {"prompt": [number] * 20}, timeout=100, trust_env=False
            ).raise_for_status()
        )
        for number in range(1, clients + 1)
    ]
    for each in asked:
        each.result(100)
    return round(clients * tokens / (time.monotonic() - began), 1)


SCENES = {scene.__name__: scene for scene in (start, rebuilds, graph_sizes)}


if __name__ == "__main__":
    play(SCENES, __doc__)
