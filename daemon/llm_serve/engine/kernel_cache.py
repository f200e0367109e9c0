"""Tells Triton from the start where kernels are kept and by what they are named, so that every engine finds them again.

vLLM and torch say both in the middle of a start, and only in one that compiles. An engine that finds torch's kernels
compiled says neither: it looks for vLLM's own kernels elsewhere, or by another name, and compiles them anew, 20 s on an
H200.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

FOLDER = "TRITON_CACHE_DIR"
ASSEMBLER = "TRITON_PTXAS_PATH"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What to set beside `environ`, where it does not say so itself."""
    return {FOLDER: _folder(environ)} | _assembler()


def _folder(environ: Mapping[str, str]) -> str:
    """Triton's own where its home is named, else below vLLM's cache: a service's user may have no home to write to."""
    if home := environ.get("TRITON_HOME"):
        return str(Path(home, ".triton", "cache"))
    caches = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path raises without a home
    return str(Path(os.path.expanduser(environ.get("VLLM_CACHE_ROOT") or f"{caches}/vllm"), "triton"))  # noqa: PTH111


def _assembler() -> dict[str, str]:
    """The ptxas of torch, looked for without loading torch.

    torch up to 2.12 brings one, and points Triton to it when it compiles its first kernel. By then Triton has asked its
    own ptxas for the version, by which it names the kernels that it keeps.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    assembler = Path(spec.origin).parent / "bin" / "ptxas"
    return {ASSEMBLER: str(assembler)} if assembler.is_file() and os.access(assembler, os.X_OK) else {}
