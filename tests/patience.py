"""How long tests wait. Their bounds are those of a quiet machine; LLM_SERVE_PATIENCE multiplies them on a busy one."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("LLM_SERVE_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """This bound on this machine, in seconds. For the longest that something may take, never for the shortest."""
    return seconds * PATIENCE
