"""Finds compilers, and packages with kernels, without importing any."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llm_serve.core.doctor.tools import ToolFacts
from llm_serve.host.doctor.gpus import build, driver_facts

_PROGRAMS = ("cc", "gcc", "clang", "c++", "g++", "clang++", "ninja", "nvcc")
_PACKAGES = ("flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache", "triton")
_ASIDE = Path("/usr/local/cuda/bin/nvcc")
_ANSWER_TIMEOUT_S = 5.0


def tool_facts(environ: Mapping[str, str] = os.environ, aside: Path = _ASIDE) -> ToolFacts:
    """What is on PATH and under CUDA_HOME, beside this interpreter, and among its packages."""
    path = os.pathsep.join([environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if home := environ.get("CUDA_HOME"):
        path = os.pathsep.join([str(Path(home) / "bin"), path])
    programs = {name: shutil.which(name, path=path) for name in _PROGRAMS}
    nvcc = programs["nvcc"]
    return ToolFacts(
        is_for_gpu=not build().is_for_cpu,
        programs=programs,
        nvcc_version=_nvcc_version(nvcc) if nvcc else None,
        nvcc_aside=str(aside) if not nvcc and os.access(aside, os.X_OK) else "",
        driver_cuda=driver_facts().cuda,
        python_headers=_python_headers(),
        python_version=".".join(platform.python_version_tuple()[:2]),
        flash_attn=_flash_attn(),
        packages={name: _version(name) for name in _PACKAGES},
    )


def _nvcc_version(nvcc: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True
        )
        if found := re.search(r"release (\d+)\.(\d+)", said.stdout):
            return int(found[1]), int(found[2])
    return None


def _python_headers() -> str:
    folders = (sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return next((folder for folder in folders if folder and Path(folder, "Python.h").is_file()), "")


def _flash_attn() -> str:
    """The kernels that vLLM ships itself: a shared object beside its Python."""
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder, "vllm_flash_attn").glob("*.so")):
            return ", ".join(file.name for file in found)
    return ""


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
