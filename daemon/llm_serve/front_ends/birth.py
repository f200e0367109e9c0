"""What a front end begins with: handed to the fork that becomes one, and read by it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llm_serve.core.settings import Settings
from llm_serve.core.status import Snapshot


@dataclass(frozen=True)
class Birth:
    """What a front end begins with: its place among all `places`, and what the first process has read and opened."""

    place: int
    places: int
    settings: Settings
    keys: tuple[str, ...] = field(repr=False)
    control: Path
    """The socket on which the first process answers for the instance."""
    now: Snapshot
    is_to_journal: bool
    """True where it may log by itself; else the first process logs for it."""
