"""Loads what an OpenAI front end needs of vLLM, in the daemon and in what is forked for it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from pathlib import Path


def import_vllm() -> None:
    """Import what the daemon needs of vLLM, 20 s with cold disks. Call it inside `interpreter.loop_first`."""
    _map_torch()
    for name in DAEMON_IMPORTS:
        importlib.import_module(name)


def _map_torch() -> None:
    """Map torch's libraries before `import torch` does it with the interpreter locked, 0.2 s warm and more cold."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    libraries = Path(spec.origin).parent / "lib"
    dlopen = ctypes.CDLL(None).dlopen  # called as a foreign function, it lets other threads run
    for name in ("libtorch_global_deps.so", "libtorch_python.so"):
        dlopen(str(libraries / name).encode(), os.RTLD_LAZY | os.RTLD_GLOBAL)


DAEMON_IMPORTS = (
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "llm_serve.engine.survivor",
)
