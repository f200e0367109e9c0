"""How a front end begins: apart from what it then loads, for the daemon's loop to name it without loading that."""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def live(birth: Birth, listener: socket.socket, connection: socket.socket, board: int) -> None:
    """The whole life of a front end, in a fork of the fork server, which has loaded it."""
    front_end: Any = importlib.import_module("llm_serve.front_ends.front_end")
    front_end.main(birth, listener, connection, board)
