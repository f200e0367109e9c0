"""Where Triton is told to keep kernels, and which ptxas it is pointed to before a start."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from llm_serve.engine import kernel_cache


@pytest.fixture
def torch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch seems to be installed."""
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
    return tmp_path / "torch"


def test_the_one_that_torch_brings_is_named(torch_folder: Path) -> None:
    """As torch itself does when it compiles."""
    own = torch_folder / "bin/ptxas"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)

    assert str(own) == kernel_cache.environment({})["TRITON_PTXAS_PATH"]


@pytest.mark.parametrize("mode", [None, 0o644])
def test_without_one_that_can_run_triton_keeps_its_own(torch_folder: Path, mode: int | None) -> None:
    """torch for CPUs, and from 2.13 on, brings none."""
    own = torch_folder / "bin/ptxas"
    own.parent.mkdir(parents=True)
    if mode is not None:
        own.touch(mode=mode)

    assert "TRITON_PTXAS_PATH" not in kernel_cache.environment({})


def test_without_torch_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`llm-serve check` and others run where it is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert "TRITON_PTXAS_PATH" not in kernel_cache.environment({})


@pytest.mark.parametrize(("environ", "folder"), [
    ({}, "/home/somebody/.cache/vllm/triton"),
    ({"XDG_CACHE_HOME": "/var/cache/x"}, "/var/cache/x/vllm/triton"),
    ({"VLLM_CACHE_ROOT": "~/caches", "XDG_CACHE_HOME": "/var/cache/x"}, "/home/somebody/caches/triton"),
    ({"TRITON_HOME": "/srv", "VLLM_CACHE_ROOT": "/caches"}, "/srv/.triton/cache"),
])  # fmt: skip
def test_kernels_are_kept_where_the_variables_say(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], folder: str
) -> None:
    """Beside what vLLM keeps; Triton's own place only where its home is named."""
    monkeypatch.setenv("HOME", "/home/somebody")

    assert folder == kernel_cache.environment(environ)["TRITON_CACHE_DIR"]
