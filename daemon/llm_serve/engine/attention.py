"""Asks a process that has vLLM which attention backends work here. This one does not load it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llm_serve.core.doctor.attention import AttentionFacts, Outcome, Shape, TorchFacts, Trial
from llm_serve.core.fallbacks import AUTO_BACKENDS
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import Settings
from llm_serve.host import processes
from llm_serve.host.cpus import keep_to_a_free_one
from llm_serve.host.doctor.gpus import build

LOAD_TIMEOUT_S = 60.0
"""For Python to load vLLM, and for what comes before the first trial: 12 s on two cores with cold files."""
_MODULE = "llm_serve.engine.attention_trials"


@dataclass(frozen=True, slots=True)
class Question:
    """What to try: `wanted` are backends beside those that vLLM itself would choose from."""

    shape: Shape = field(default_factory=Shape)
    wanted: tuple[str, ...] = AUTO_BACKENDS
    timeout_s: float = 40.0
    """For each backend."""
    needs_latent: bool = False
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """For the whole: trials run side by side."""
        return LOAD_TIMEOUT_S + self.timeout_s


def question(settings: Settings | None, *, timeout_s: float) -> Question:
    """The trials that tell most: with the heads of the instance's model, where its folder is here."""
    if settings is None:
        return Question(timeout_s=timeout_s)
    engine, asked = settings.engine, settings.recovery.attention_backends
    names = [engine.get("attention_backend"), *(AUTO_BACKENDS if asked == "auto" else asked)]
    wanted = tuple(dict.fromkeys(str(name).upper() for name in names if name))
    env = EnginePlan.from_settings(settings).env
    return Question(shape_of(settings), wanted, timeout_s, has_latent_attention(settings), env)


def shape_of(settings: Settings) -> Shape:
    """As the model's config.json has it, one GPU's share of it; the usual one where that says nothing."""
    shape, engine, about = Shape(), settings.engine, _about(settings)
    types = {name: str(engine[name]) for name in ("dtype", "kv_cache_dtype") if name in engine}
    ways = engine.get("tensor_parallel_size", 1)
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        heads = int(about["num_attention_heads"])
        kv_heads = int(about.get("num_key_value_heads") or heads)
        size = int(about.get("head_dim") or about["hidden_size"] // heads)
        if not has_latent_attention(settings):
            shape = Shape(max(1, heads // ways), max(1, kv_heads // ways), size)
    return Shape(shape.heads, shape.kv_heads, shape.head_size, **types)


def has_latent_attention(settings: Settings) -> bool:
    """True for a model that keeps no heads in its cache: its backends are others, and are not tried."""
    return "kv_lora_rank" in _about(settings)


def _about(settings: Settings) -> dict[str, Any]:
    """What config.json says of the language model; nothing where it is not a local folder with one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        about = json.loads((Path(settings.model).expanduser() / "config.json").read_text())
        text: dict[str, Any] = about.get("text_config") or about
        return text
    return {}


def ask(question: Question) -> AttentionFacts:
    """Let a child try. Whatever becomes of it, it and all that it has started are gone afterwards."""
    child = subprocess.Popen(
        [sys.executable, "-m", _MODULE],
        env=_environment(question.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if build().is_for_cpu:
        keep_to_a_free_one(child.pid)
    text = json.dumps({"shape": asdict(question.shape), "wanted": question.wanted, "timeout_s": question.timeout_s})
    with child:
        try:
            answer, complaints = child.communicate(text, timeout=question.total_s)
        except subprocess.TimeoutExpired:
            return AttentionFacts("this machine", question.shape, error=f"no answer within {question.total_s:g} s")
        finally:
            _end(child)
    try:
        return _facts(json.loads(answer), question)
    except (ValueError, KeyError, TypeError):
        last = ([line.strip() for line in complaints.splitlines() if line.strip()] or ["it said nothing"])[-1]
        return AttentionFacts("this machine", question.shape, error=f"the child ended with {child.returncode}: {last}")


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHINDUCTOR_COMPILE_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    return (
        os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | quiet | dict(more)
    )


def _end(child: subprocess.Popen[str]) -> None:
    """Kill what is left of it, compilers among its children."""
    if child.poll() is not None:
        return
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(child.pid)
        for process in [*processes.children(parent), parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _facts(answer: Mapping[str, Any], question: Question) -> AttentionFacts:
    torch = answer["torch"]
    return AttentionFacts(
        device=answer["device"],
        shape=Shape(**answer["shape"]) if answer.get("shape") else question.shape,
        trials=tuple(Trial(**each | {"outcome": Outcome(each["outcome"])}) for each in answer["trials"]),
        latent=tuple(answer["latent"]),
        needs_latent=question.needs_latent,
        torch=TorchFacts(
            **torch
            | {
                "kernels": tuple(torch["kernels"]),
                "gpus": tuple((index, name, tuple(capability)) for index, name, capability in torch["gpus"]),
            }
        ),
        error=answer["error"],
    )
