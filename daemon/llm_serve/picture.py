"""Pictures that commands draw with --png, where matplotlib is installed; nothing else of llm-serve needs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MISSING = "--png needs matplotlib: pip install matplotlib (it is not installed here)"


def check(path: Path | None) -> None:
    """Raise ValueError, before anything is measured, where a picture could not be drawn or not be written there."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(_MISSING)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--png {path}: there is no folder {path.absolute().parent}")


def new_figure(title: str) -> Any:
    """An empty figure of matplotlib."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    return figure


def written(draw: Callable[[Path], None], path: Path) -> bool:
    """Draw it there; where that fails, say on stderr why, and return False."""
    try:
        draw(path)
    except OSError as error:
        print(f"llm-serve: cannot write {path}: {error.strerror}", file=sys.stderr)
        return False
    return True
