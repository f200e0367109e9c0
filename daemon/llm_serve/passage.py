"""What happened to the request at hand on its way, told from where it happens (engine/) to where it is counted (web/).

The gate opens a Passage for each request; whatever runs on its behalf finds it in the context.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Passage:
    """One request's history: `replays` counts engines that died under it, `resumes` those after its first output."""

    replays: int = 0
    resumes: int = 0
    is_interrupted: bool = False
    is_poisoned: bool = False

    def outcome(self, *, is_complete: bool) -> str:
        """The label under which the request is counted."""
        if not is_complete:
            return "aborted"
        if self.is_poisoned:
            return "poisoned"
        if self.is_interrupted:
            return "interrupted"
        if self.resumes:
            return "resumed"
        return "replayed" if self.replays else "completed"


current: ContextVar[Passage] = ContextVar("passage")


def here() -> Passage:
    """The passage of the request at hand; a new one outside of any request."""
    return current.get(None) or Passage()
