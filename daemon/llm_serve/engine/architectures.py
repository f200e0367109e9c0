"""What can be read off a model's folder before vLLM is there to ask."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def named_by(model: str) -> list[str]:
    """The model classes that the folder's config.json names; empty when it is not a local folder with one.

    Only used to load the right classes early, so an unreadable file is no error here.
    """
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(model) / "config.json").read_text())
        return [str(name) for name in config.get("architectures") or ()]
    return []
