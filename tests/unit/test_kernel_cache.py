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


def test_kernels_are_kept_where_triton_keeps_them_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the home, or what stands for it."""
    monkeypatch.setenv("HOME", "/home/somebody")

    assert "/home/somebody/.triton/cache" == kernel_cache.environment({})["TRITON_CACHE_DIR"]
    assert "/srv/.triton/cache" == kernel_cache.environment({"TRITON_HOME": "/srv"})["TRITON_CACHE_DIR"]
