"""What front ends before the same engine know of each other, and what each of them lets the others know.

All of it is facts, each written by one and read by all; whoever has to wait for another finds that out by a rule over
them, and nobody is asked. Two that look at the same moment may both see the same room: a crowd of N front ends lets in
at most N - 1 requests more than one would. The engine keeps those waiting that it has no place for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Other:
    """Another front end, as it was a moment ago.

    `inside`: requests that it has let in; `let_in`: those of them that the engine's last step did not know yet;
    `waiting`: those at its gate, of which the next one to go came at `first_since` (monotonic seconds), NEVER where
    none may go. `given`: requests that are with the engine; `suspects`: those of its requests that have to run alone.
    `goes_first` is true of one whose suspects run before ours.
    """

    inside: int = 0
    let_in: int = 0
    waiting: int = 0
    first_since: float = NEVER
    given: int = 0
    suspects: int = 0
    goes_first: bool = False


class Company(Protocol):
    """The other front ends, and what they are told of this one."""

    def others(self) -> Sequence[Other]:
        """Those that are alive."""

    def tell_gate(self, *, inside: int, let_in: int, waiting: int, first_since: float) -> None:
        """What this front end's gate has let in and keeps waiting; see Other."""

    def tell_work(self, *, given: int, suspects: int) -> None:
        """What of it is with the engine; see Other."""

    def waiting(self, key: bytes) -> int:
        """How many of this key wait at the others' gates; now and then another key's are counted along."""

    def tell_waiting(self, key: bytes, change: int) -> None:
        """So many more of this key, or fewer, wait at this front end's gate."""


class Alone:
    """The company of an only front end."""

    def others(self) -> Sequence[Other]:
        """Nobody."""
        return ()

    def tell_gate(self, *, inside: int, let_in: int, waiting: int, first_since: float) -> None:
        """Nobody listens."""

    def tell_work(self, *, given: int, suspects: int) -> None:
        """Nobody listens."""

    def waiting(self, key: bytes) -> int:  # noqa: ARG002 - as the protocol has it
        """Nobody's."""
        return 0

    def tell_waiting(self, key: bytes, change: int) -> None:
        """Nobody listens."""


ALONE = Alone()
