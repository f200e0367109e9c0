"""How long a start and a rebuild take on a real GPU, and what makes them faster.

    python -m tests.gpu.speed --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

LLM_SERVE_VARIANTS picks variants of `rebuilds`, LLM_SERVE_KILLS says how many of each.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from contextlib import ExitStack
from typing import Any

import httpx

from tests.daemon import MODEL_NAME, Daemon
from tests.gpu.stage import Row, Stage, engine_core, phases, play, story, until_serving

_ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
_MEGA = {"VLLM_USE_MEGA_AOT_ARTIFACT": "1"}
_VLLMS_GRAPHS = {"max_cudagraph_capture_size": 256}
"""vLLM's own choice for 128 sequences, asked for: then none of its graphs is left out."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "measured each time": {"env": {"VLLM_ENABLE_STARTUP_PLAN": "0"}},
    "mega artifact": {"env": _MEGA},
    "mega artifact, vLLM's graphs": {"env": _MEGA, "engine": _VLLMS_GRAPHS},
    "mega artifact, whole graphs": {"env": _MEGA, "engine": {"compilation_config": {"cudagraph_mode": "FULL"}}},
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
        env = _ENV | variant.get("env", {})
        with stage.daemon(env=env, engine=variant.get("engine", {})) as daemon:
            until_serving(daemon, 1, 300)
            row[name], kills = [], int(os.environ.get("LLM_SERVE_KILLS", "3"))
            for _ in range(kills):
                began = time.monotonic()
                os.kill(engine_core(daemon), signal.SIGKILL)
                assert daemon.chat(max_tokens=1).status_code == 200
                row[name].append(round(time.monotonic() - began, 2))
            row[f"{name}: log"] = phases(daemon)
    return row


def graph_sizes(stage: Stage) -> Row:
    """Tokens per second with the graphs that are left and with all of vLLM's, by streams: what do fewer cost?

    Two daemons on one GPU, of which one is loaded at a time, by turns. The next graph is larger by 8 tokens, or by 16.
    """
    both: dict[str, dict[str, Any]] = {"ours": {}, "vLLM's": {"max_cudagraph_capture_size": 512}}
    engine = {"max_num_seqs": 512, "gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 30 << 30}
    row: Row = {name: {clients: [] for clients in (66, 130, 200, 260, 330)} for name in both}
    with ExitStack() as stack:
        daemons = {
            name: stack.enter_context(stage.daemon(engine=engine | graphs, env=_ENV | _MEGA))
            for name, graphs in both.items()
        }
        for daemon in daemons.values():
            until_serving(daemon, 1, 300)
            _tokens_per_second(daemon, 330, 32)
        for _ in range(int(os.environ.get("LLM_SERVE_ROUNDS", "4"))):
            for clients in row["ours"]:
                for name, daemon in daemons.items():
                    row[name][clients].append(_tokens_per_second(daemon, clients, 256))
            print(row, flush=True)
    row["ratio"] = {clients: round(statistics.median(seen) / statistics.median(row["vLLM's"][clients]), 3)
                    for clients, seen in row["ours"].items()}  # fmt: skip
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
