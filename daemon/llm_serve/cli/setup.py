"""`setup`: hands over to the package's own program, which needs no environment because it makes them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PYTHON = "/usr/bin/python3"
_PROGRAM = Path("/usr/share/llm-serve/setup")
_WRONG_USAGE = 2


def setup(words: Sequence[str]) -> int:
    """Become that program. Returns 2 where the package is not installed."""
    if _PROGRAM.exists():
        os.execv(_PYTHON, [_PYTHON, str(_PROGRAM), *words])  # noqa: S606 - no shell is wanted
    print(
        f"llm-serve: setup belongs to the Debian package ({_PROGRAM} is not here). In a checkout: make setup",
        file=sys.stderr,
    )
    return _WRONG_USAGE
