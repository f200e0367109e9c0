"""Rebuilds of an engine whose weights are real files: read anew each time, and kept in GPU memory.

    python -m tests.gpu.weights --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

The model's folder needs no weights: random ones are written beside a copy of it (13 GiB for Qwen2.5-7B's shape), and the
kernel has them in memory then. LLM_SERVE_KILLS says how often an engine is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from tests.daemon import Daemon
from tests.gpu.stage import Row, Stage, asked, engine_core, phases, play, story, until_serving

_SHARD_BYTES = 4 << 30
_ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_MEGA_AOT_ARTIFACT": "1"}
_MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
model, folder, most = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with torch.device("meta"):
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
shards, size = [[]], 0
for name, shape in shapes.items():
    if size + 2 * shape.numel() > most and shards[-1]:
        shards.append([])
        size = 0
    shards[-1].append(name)
    size += 2 * shape.numel()
places = {}
for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    tensors = {name: (torch.randn(shapes[name], device="cuda", dtype=torch.bfloat16) * 0.02).cpu() for name in shard}
    save_file(tensors, folder / file, metadata={"format": "pt"})
    places |= dict.fromkeys(shard, file)
whole = sum(2 * shape.numel() for shape in shapes.values())
index = {"metadata": {"total_size": whole}, "weight_map": places}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""


def files(stage: Stage) -> Row:
    """Each engine reads its weights from the files."""
    return _kills(stage, keep_weights=False)


def kept(stage: Stage) -> Row:
    """Each engine but the first finds its weights in GPU memory."""
    return _kills(stage, keep_weights=True)


def faults(stage: Stage) -> Row:
    """What holds the weights is killed under an engine that serves; then a kernel writes where it must not (injected).

    Weights are made up here: the same each time, so that answers can be compared.
    """
    fault = stage.folder / "fault.json"
    fault.unlink(missing_ok=True)
    environ = {"LLM_SERVE_FAULT_FILE": str(fault)}
    with stage.daemon(recovery={"keep_weights": True}, env=_ENV, environ=environ) as daemon:
        until_serving(daemon, 1, 300)
        said, first = {_answer(daemon)}, _holders(daemon)
        os.kill(first[0], signal.SIGKILL)
        time.sleep(1)
        said.add(_answer(daemon))
        row: Row = {"engines after the holder's death": daemon.status()["epoch"]}
        began = time.monotonic()
        os.kill(engine_core(daemon), signal.SIGKILL)
        said.add(_answer(daemon))
        row["engine killed after it, s"] = round(time.monotonic() - began, 2)
        second, epoch = _holders(daemon), daemon.status()["epoch"]
        fault.write_text(json.dumps({"at": "execute_model", "do": "illegal", "times": 1}))
        began = time.monotonic()
        said.add(_answer(daemon))
        row["illegal access, s"] = round(time.monotonic() - began, 2)
        until_serving(daemon, epoch + 1)
        others = len({*first, *second, *_holders(daemon)})
        return row | {"holders in all": others, "different answers": len(said), **story(daemon)}


def _kills(stage: Stage, *, keep_weights: bool) -> Row:
    began = time.monotonic()
    recovery = {"keep_weights": keep_weights}
    with _with_files(stage).daemon(engine={"load_format": "auto"}, recovery=recovery, env=_ENV) as daemon:
        until_serving(daemon, 1, 300)
        row: Row = {"start s": round(time.monotonic() - began, 1), "kills s": []}
        said = [_answer(daemon)]
        for _ in range(int(os.environ.get("LLM_SERVE_KILLS", "5"))):
            began = time.monotonic()
            os.kill(engine_core(daemon), signal.SIGKILL)
            said.append(_answer(daemon))
            row["kills s"].append(round(time.monotonic() - began, 2))
        row |= {"answer": said[0], "same": said.count(said[0]), "used by process MiB": _used(daemon)}
        tokens = [
            line.partition("KV cache size: ")[2][:20] for line in daemon.log().splitlines() if "KV cache size" in line
        ]
        return row | {"KV cache": tokens, "last": phases(daemon)} | story(daemon)


def _answer(daemon: Daemon) -> str:
    answer = daemon.chat(max_tokens=8, temperature=0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def _holders(daemon: Daemon) -> list[int]:
    return list(daemon.status()["weight_pids"])


def _used(daemon: Daemon) -> dict[str, int]:
    return {each["name"]: each["used_bytes"] >> 20 for each in daemon.status()["gpus"][0]["processes"]}


def _with_files(stage: Stage) -> Stage:
    """The same stage for a copy of the model that has weights."""
    folder = stage.folder / "with-files"
    if not folder.exists():
        shutil.copytree(stage.model, folder)
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", _MAKE, stage.model, str(folder), str(_SHARD_BYTES)], check=True)
        print(f"weights made in {time.monotonic() - began:.0f} s; GPU MiB used: {asked('memory.used')}", flush=True)
    return stage.with_model(str(folder))


SCENES = {scene.__name__: scene for scene in (files, kept, faults)}


if __name__ == "__main__":
    play(SCENES, __doc__)
