"""Where the installed vLLM is, what its functions take, and all of its source: what the tests of its surface look at."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient

VLLM = Path(inspect.getfile(EngineClient)).parents[1]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name."""
    return dict(inspect.signature(function).parameters)


@cache
def vllm_source() -> str:
    """All of vLLM's Python source, with texts that are split over lines put together again."""
    whole = "\n".join(path.read_text(errors="replace") for path in sorted(VLLM.rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", whole)
