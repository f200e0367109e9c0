"""What an instance does about it. Actions are orders: the supervisor carries them out (supervisor.py)."""

from __future__ import annotations

from dataclasses import dataclass

from llm_serve.core.course import Course
from llm_serve.core.plan import EnginePlan


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Build the engine of this epoch."""

    epoch: int
    reason: str
    plan: EnginePlan


@dataclass(frozen=True, slots=True)
class Remember:
    """Write the course to disk, so that the next process begins with it."""

    course: Course


@dataclass(frozen=True, slots=True)
class RetireEngine:
    """End the engine, which is well, and report EngineRetired. Requests that it has not answered move to the next."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Report PauseOver(epoch) after this many seconds."""

    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Let requests through to the engine."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the service manager that the engine answers."""


@dataclass(frozen=True, slots=True)
class CloseGate:
    """Stop letting requests through. `refuse` answers 503 at once; else they wait."""

    refuse: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Let requests in flight finish and report Drained, at the latest after the drain time-out."""


@dataclass(frozen=True, slots=True)
class CutRequests:
    """End every request in flight with an error that says so."""


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End the engine, up or coming up, and report EngineStopped."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process with this status. `why` is the last word in the log."""

    status: int
    why: str


Action = (
    StartEngine | Remember | RetireEngine | Pause | OpenGate | Announce | CloseGate | Drain | CutRequests | StopEngine
    | Exit
)  # fmt: skip
