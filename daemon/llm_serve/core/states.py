"""Where an instance can be, and what states have in common."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where an instance can be. See the design's section 5."""

    waiting_for_host = "waiting_for_host"
    starting = "starting"
    serving = "serving"
    recovering = "recovering"
    drained = "drained"
    reloading = "reloading"
    draining = "draining"
    stopped = "stopped"
    failed = "failed"


FINAL = frozenset({State.stopped, State.failed})
HOLDING = frozenset({State.waiting_for_host, State.starting, State.recovering, State.reloading})
"""States in which a request waits for an engine instead of being refused."""
UP = frozenset({State.serving, State.drained})
"""States in which the engine answers; `drained` is without admission, which a hand or the heat has stopped."""
WATCHED = UP | {State.reloading}
"""States in which an engine may be at work on requests, so that its death or stall matters."""
