"""Tells Triton from the start which assembler to use, so that every engine finds the kernels of the one before.

torch up to 2.12 brings a ptxas of its own and points Triton to it when it compiles its first kernel. By then Triton has
asked its own ptxas for the version, by which it names the kernels that it keeps. An engine that finds torch's kernels
compiled is pointed there earlier: it looks for kernels by another name, and compiles them anew, 20 s on an H200.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

VARIABLE = "TRITON_PTXAS_PATH"


def environment() -> dict[str, str]:
    """What torch would set, where it would. It is looked for without loading torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    assembler = Path(spec.origin).parent / "bin" / "ptxas"
    return {VARIABLE: str(assembler)} if assembler.is_file() and os.access(assembler, os.X_OK) else {}
