"""Attention backends tried for real, on the CPU; and how a trial that goes wrong ends."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")

import torch
from vllm.model_executor.layers.attention import Attention

from llm_serve.core.doctor import attention as judge
from llm_serve.core.doctor.attention import Outcome, Shape
from llm_serve.core.doctor.findings import State
from llm_serve.core.settings import Settings
from llm_serve.engine import attention, attention_layer
from llm_serve.engine.attention import Question
from llm_serve.engine.attention_trials import Fork
from tests.patience import patient

pytestmark = [
    pytest.mark.vllm,
    # Where this process has threads, newer Pythons warn. The program that forks in earnest has none.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
DAEMON = Path(attention.__file__).parents[2]


def running() -> list[psutil.Process]:
    """What this test has started and what still runs."""
    return [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


# The whole way.
@pytest.mark.slow
def test_the_backend_of_the_cpu_runs() -> None:
    """vLLM is loaded in a child, its backend computes what attention is, and nothing is left."""
    before = set(running())

    facts = attention.ask(Question(Shape(9, 3, 64, "float32")))

    assert "" == facts.error
    assert [("CPU_ATTN", Outcome.ran, "")] == [(trial.backend, trial.outcome, trial.detail) for trial in facts.trials]
    assert ("the CPU", "float32", 9) == (facts.device, facts.shape.dtype, facts.shape.heads)
    assert facts.torch.version == torch.__version__
    assert State.good == {finding.check: finding.state for finding in judge.judge(facts)}["attention"]
    assert set(running()) <= before


def test_a_vllm_that_does_not_load_is_told(tmp_path: Path) -> None:
    """The child's last words are the reason."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")

    facts = attention.ask(Question(env={"PYTHONPATH": f"{tmp_path}:{DAEMON}"}))

    assert "the child ended with 1: ImportError: libcudart.so.13: cannot open shared object file" == facts.error


def test_a_vllm_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever it has started."""
    monkeypatch.setattr(attention, "LOAD_TIMEOUT_S", 6.0)
    (tmp_path / "vllm").mkdir()
    marker = tmp_path / "pid"
    (tmp_path / "vllm/__init__.py").write_text(
        "import subprocess, pathlib\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(marker)!r}).write_text(str(child.pid))\nchild.wait()\n"
    )

    facts = attention.ask(Question(timeout_s=0.5, env={"PYTHONPATH": f"{tmp_path}:{DAEMON}"}))

    assert "no answer within 6.5 s" == facts.error
    assert (
        not psutil.pid_exists(int(marker.read_text())) or psutil.Process(int(marker.read_text())).status() == "zombie"
    )


# One trial.
SHAPES = [
    Shape(9, 3, 64, "float32"),
    Shape(4, 4, 128, "float16"),
    Shape(8, 1, 96, "bfloat16"),
    Shape(8, 2, 128, "bfloat16", "fp8"),
]


def played(shape: Shape, folder: Path) -> Callable[[], bool]:
    """A whole trial."""

    def play() -> bool:
        # Where an earlier test has computed something, a fork of its process has no threads to compute with.
        torch.set_num_threads(1)
        attention_layer.register_model()
        attention_layer.run(attention_layer.engine_config(shape, "CPU_ATTN", folder), shape)
        return True

    return play


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_is_computed(shape: Shape, tmp_path: Path) -> None:
    """Grouped heads, none shared, one for all; three types and a small cache."""
    end = Fork(played(shape, tmp_path), 40, tmp_path / "output").end()

    assert (Outcome.ran, "", True) == (end.outcome, end.detail, end.value)
    assert 0 < end.seconds < patient(40)


def _scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(heads: int, size: int, scale: float, *rest: Any, **more: Any) -> Any:
        return Attention(heads, size, scale * 1.5, *rest, **more)

    monkeypatch.setattr(attention_layer, "Attention", wrong)


def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_layer._step

    def step(stage: Any, cache: Any, qkv: Any, spans: Any) -> Any:
        if spans[0][0]:  # a decode looks into the other request's blocks
            cache = replace(cache, blocks=cache.blocks.flip(0))
        return real(stage, cache, qkv, spans)

    monkeypatch.setattr(attention_layer, "_step", step)


def _without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_layer._step
    monkeypatch.setattr(attention_layer, "_step", lambda *given: real(*given) * float("nan"))


@pytest.mark.parametrize("fault", [_scaled, _forgetful, _without_numbers])
def test_a_kernel_that_computes_something_else_is_found_out(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong scale, wrong blocks, not a number."""
    fault(monkeypatch)

    end = Fork(played(Shape(8, 2, 128, "bfloat16"), tmp_path), 40, tmp_path / "output").end()

    assert Outcome.wrong == end.outcome
    assert "the largest error is" in end.detail


def test_a_backend_that_vllm_does_not_know_fails(tmp_path: Path) -> None:
    """In vLLM's own words."""
    end = Fork(lambda: attention_layer.engine_config(Shape(), "NONE_SUCH", tmp_path), 40, tmp_path / "output").end()

    assert Outcome.failed == end.outcome
    assert "NONE_SUCH" in end.detail


def _fail(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("task", "outcome", "detail"),
    [
        pytest.param(_fail(RuntimeError("Ninja build failed.\n[1/2] nvcc\nfatal error: Python.h")), "failed", "RuntimeError: Ninja build failed. ... fatal error: Python.h", id="error"),
        pytest.param(_fail(ValueError("Selected backend X is not valid for this configuration. Reason: [no]")), "refused", "Reason: [no]", id="refusal"),
        pytest.param(_fail(torch.OutOfMemoryError("CUDA out of memory.")), "no_memory", "out of memory", id="memory"),
        pytest.param(_fail(SystemExit(3)), "failed", "SystemExit: 3", id="exit"),
        pytest.param(_fail(AssertionError()), "failed", "AssertionError", id="no words"),
        pytest.param(lambda: ctypes.string_at(0), "crashed", "SIGSEGV in string_at (__init__.py:", id="segfault"),
        pytest.param(lambda: os._exit(7), "crashed", "status 7", id="status"),
    ],
)  # fmt: skip
def test_every_end_has_a_name(task: Callable[[], Any], outcome: str, detail: str, tmp_path: Path) -> None:
    """And the reason in one line."""
    end = Fork(task, 20, tmp_path / "output").end()

    assert outcome == end.outcome
    assert detail in end.detail
    assert "\n" not in end.detail


def _hangs_in_here() -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.wait()


def test_a_trial_that_hangs_says_where_it_stands(tmp_path: Path) -> None:
    """Innermost first, with the program that it waits for; both are gone afterwards."""
    before = set(running())
    begun = time.monotonic()

    end = Fork(_hangs_in_here, 1.0, tmp_path / "output").end()

    assert time.monotonic() - begun < patient(5)
    assert (Outcome.timed_out, 1.0) == (end.outcome, end.seconds)
    assert "_hangs_in_here (test_attention_trials.py:" in end.detail
    assert "waiting for sleep" in end.detail
    assert set(running()) <= before


# What is asked.
def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(name="a", source="a.toml", model=str(folder), **changes)


@pytest.mark.parametrize(
    ("about", "engine", "expected"),
    [
        ({"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}, {}, Shape(28, 4, 128)),
        (
            {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
            {"tensor_parallel_size": 4, "dtype": "half"},
            Shape(16, 2, 128, "half"),
        ),
        (
            {"text_config": {"num_attention_heads": 8, "head_dim": 256}},
            {"kv_cache_dtype": "fp8"},
            Shape(8, 8, 256, "auto", "fp8"),
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64},
            {"tensor_parallel_size": 2},
            Shape(4, 1, 64),
        ),
        ({"num_attention_heads": 128, "kv_lora_rank": 512, "hidden_size": 7168}, {}, Shape()),
        ({"num_attention_heads": 0, "hidden_size": 1}, {}, Shape()),
        ({}, {"dtype": "float32"}, Shape(dtype="float32")),
        ("text", {}, Shape()),
    ],
)
def test_the_shape_is_the_models(about: Any, engine: dict[str, Any], expected: Shape, tmp_path: Path) -> None:
    """As its config.json has it, a GPU's share; the usual one where that says nothing."""
    (tmp_path / "config.json").write_text(json.dumps(about))

    asked = settings(tmp_path, engine=engine)

    assert expected == attention.shape_of(asked)
    assert ("kv_lora_rank" in about) == attention.has_latent_attention(asked)


def test_the_backends_that_a_file_names_are_tried(tmp_path: Path) -> None:
    """The one of the engine first; on the GPUs that the file names."""
    asked = settings(
        tmp_path,
        engine={"attention_backend": "flashinfer"},
        recovery={"attention_backends": ("TRITON_ATTN", "FLASHINFER")},
        gpu={"devices": (2, 3)},
    )

    question = attention.question(asked, timeout_s=5)

    assert ("FLASHINFER", "TRITON_ATTN") == question.wanted
    assert "2,3" == question.env["CUDA_VISIBLE_DEVICES"]
    assert ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION") == attention.question(None, timeout_s=5).wanted
