"""What can happen to an instance. Events are facts: machine.py answers them, and nobody else decides."""

from __future__ import annotations

from dataclasses import dataclass

from llm_serve.core.course import UNKNOWN, Course, Effective
from llm_serve.core.evidence import Failure
from llm_serve.core.policy import Limits


@dataclass(frozen=True, slots=True)
class HostReady:
    """Devices, folders and files that the engine needs are there. `course` is what was learned on them before."""

    course: Course | None = None


@dataclass(frozen=True, slots=True)
class HostWaits:
    """Something that the engine needs is not there yet."""

    why: str


@dataclass(frozen=True, slots=True)
class HostMissing:
    """It did not come in time, or never will: the exit status says which."""

    status: int
    why: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Somebody wants what was learned to be forgotten."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine of this epoch has generated a real token."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine of this epoch has been found dead. Why, and that its remains are gone, follows as EngineFailed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine of this epoch did not start, or died. Nothing of it is left."""

    epoch: int
    failure: Failure
    built: Effective = UNKNOWN


@dataclass(frozen=True, slots=True)
class StepUpDue:
    """There was nothing to do for long enough to try one rung up."""


@dataclass(frozen=True, slots=True)
class FileChanged:
    """The file has been read again, and has passed every check. `number` names this reading.

    `course` is what its plan begins with; None where the engine of the moment is what it asks for.
    """

    number: int
    limits: Limits
    course: Course | None = None


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Somebody wants no new request to reach the engine, which goes on."""


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """Somebody wants requests to reach the engine again."""


@dataclass(frozen=True, slots=True)
class Heated:
    """A GPU is too hot for new requests. `why` is a sentence."""

    why: str


@dataclass(frozen=True, slots=True)
class Cooled:
    """No GPU is too hot any more."""


@dataclass(frozen=True, slots=True)
class EngineRetired:
    """The engine of this epoch was ended in good order, to make room for another. Nothing of it is left."""

    epoch: int


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The back-off before this epoch's start has passed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the instance to end: SIGTERM or SIGINT. A second one means at once."""


@dataclass(frozen=True, slots=True)
class Drained:
    """No request is in flight any more, or the drain's deadline has passed."""


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """Every process of the engine is gone, after a stop."""


Event = (
    HostReady | HostWaits | HostMissing | Forgotten | EngineReady | EngineLost | EngineFailed | StepUpDue
    | FileChanged | DrainRequested | ResumeRequested | Heated | Cooled | EngineRetired | PauseOver | StopRequested
    | Drained | EngineStopped
)  # fmt: skip
