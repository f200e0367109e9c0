"""What the engine room says to the front ends beside the daemon's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from llm_serve.core.admission import Load
from llm_serve.core.company import ALONE, Company

if TYPE_CHECKING:
    from llm_serve.engine.steps import StepWatch


class Crew(Protocol):
    """The other front ends. They have been offered the engine while it started (engine/attach.py)."""

    company: Company
    """The same, as the first process's own survivor and gate know them."""

    def bind(self, epoch: int, tasks: tuple[str, ...], steps: StepWatch) -> None:
        """The engine of this epoch works: they may give it requests. `steps` is the first process's watch on it."""

    def unbind(self, epoch: int) -> None:
        """The engine of this epoch is gone, or about to go."""

    def judge(self, own: int, *, may_be_a_request: bool) -> int | None:
        """Why it has ended. Returns how many requests it took along; `own` are the first process's."""

    def cut(self, why: str) -> None:
        """No engine follows: every request is to end, with an error that says why."""

    def ban(self, fingerprint: str, seconds: float) -> None:
        """A request of the first process has killed engines: it is not to come in elsewhere either."""


class Entrance(Protocol):
    """What the supervisor orders and asks: the only gate, or all gates as one."""

    @property
    def held(self) -> int:
        """How many requests wait."""

    @property
    def in_flight(self) -> int:
        """How many requests there are, those that wait included."""

    def open(self, model: Any, slots: int | None = None) -> None:
        """Let requests through to an engine that runs `slots` of them at once."""

    def hold(self) -> None:
        """Make requests wait."""

    def refuse(self, message: str, retry_after_s: int) -> None:
        """Answer 503 at once, also to those that wait."""

    def note(self, load: Load) -> None:
        """The engine has done a step, and this is what it has to do now."""


class Nobody:
    """The crew of an only front end."""

    company: Company = ALONE

    def bind(self, epoch: int, tasks: tuple[str, ...], steps: StepWatch) -> None:
        """Nobody listens."""

    def unbind(self, epoch: int) -> None:
        """Nobody listens."""

    def judge(self, own: int, *, may_be_a_request: bool) -> int | None:  # noqa: ARG002 - as the protocol has it
        """Those of the first process are all."""
        return None

    def cut(self, why: str) -> None:
        """Nobody listens."""

    def ban(self, fingerprint: str, seconds: float) -> None:
        """Nobody listens."""
