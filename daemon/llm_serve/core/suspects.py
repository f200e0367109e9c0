"""Which request kills engines: a ledger of who was in flight at each death, and who has to run alone because of it.

One death proves nothing, and who was in flight at two of them may have had bad company. Such a request is suspected
and runs alone, one suspect at a time: whoever then takes the engine along is guilty, and everybody else is cleared.

Several front ends have a ledger each, of their own requests, and let the others know how many are with the engine and
how many are suspected. Alone means alone before all of them: while one has suspects nobody else gives the engine
anything, the suspects of the front end with the lowest number go first, and each waits until nothing is there.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from llm_serve.core.company import ALONE, Company

DEATHS_TO_SUSPECT = 2
_SHORTEST_TRIAL_S, _LONGEST_TRIAL_S = 5.0, 60.0


@dataclass(slots=True)
class _Record:
    """One request that is not answered yet."""

    deaths: int = 0
    was_alone: bool = False
    longest_s: float = 0.0
    """How long it had been with an engine that died, at most."""
    given_at: float | None = None
    """Since when it is with an engine; None while it waits."""


class Suspects:
    """The ledger of one front end. Requests are known by any hashable name, times are monotonic seconds."""

    def __init__(self, company: Company = ALONE) -> None:
        self._company = company
        self._records: dict[Hashable, _Record] = {}
        self._awaiting_verdict: list[Hashable] = []
        self._banned: dict[str, float] = {}

    # A request's way.
    def enter(self, name: Hashable) -> None:
        """A request wants an engine."""
        self._records[name] = _Record()

    def give(self, name: Hashable, at: float) -> None:
        """It is with an engine now."""
        self._records[name].given_at = at
        self._tell()

    def leave(self, name: Hashable) -> None:
        """It has its answer, or nobody waits for one any more."""
        if self._records.pop(name, None) is not None:
            self._tell()

    # An engine's end.
    def engine_lost(self, at: float) -> int:
        """The engine is gone with everything that was in flight; whether one of them can be the cause follows.

        Returns how many of this ledger were with it.
        """
        for name, record in self._records.items():
            if record.given_at is not None:
                self._awaiting_verdict.append(name)
                record.longest_s = max(record.longest_s, at - record.given_at)
                record.given_at = None
        self._tell()
        return len(self._awaiting_verdict)

    def verdict(self, *, may_be_a_request: bool, everywhere: int | None = None) -> None:
        """Why the engine was lost: count the death against those in flight, or against nobody.

        `everywhere` is how many were in flight at all front ends together, where there are several. Before the next
        engine; without an engine lost since the last verdict it changes nothing.
        """
        in_flight, self._awaiting_verdict = self._awaiting_verdict, []
        if not may_be_a_request:
            return
        for name in in_flight:
            if (record := self._records.get(name)) is not None:
                record.deaths += 1
                record.was_alone = record.was_alone or (everywhere or len(in_flight)) == 1
        self._tell()

    # Questions.
    def is_guilty(self, name: Hashable) -> bool:
        """In flight at two deaths, and at one of them there was nobody else."""
        record = self._records[name]
        return record.deaths >= DEATHS_TO_SUSPECT and record.was_alone

    def may_run(self, name: Hashable) -> bool:
        """True when the engine may have it now: there is no suspect, or it is the one whose turn it is."""
        suspect, others = self.next_suspect, self._company.others()
        if any(other.suspects and (other.goes_first or suspect is None) for other in others):
            return False
        if suspect is None:
            return True
        is_empty = all(record.given_at is None for record in self._records.values())
        return name == suspect and is_empty and not any(other.given for other in others)

    @property
    def next_suspect(self) -> Hashable | None:
        """The one that runs, or is to run, alone: the earliest."""
        return next(filter(self._is_suspected, self._records), None)

    def trial_s(self, name: Hashable) -> float:
        """How long it runs alone before it is cleared: twice as long as it has ever been with an engine that died."""
        return min(max(2 * self._records[name].longest_s, _SHORTEST_TRIAL_S), _LONGEST_TRIAL_S)

    def clear(self, name: Hashable) -> None:
        """It has run alone for long enough: the deaths were not its doing."""
        if (record := self._records.get(name)) is not None and record.given_at is not None:
            record.deaths, record.was_alone = 0, False
            self._tell()

    def _tell(self) -> None:
        if self._company is not ALONE:
            given = sum(record.given_at is not None for record in self._records.values())
            self._company.tell_work(given=given, suspects=sum(map(self._is_suspected, self._records)))

    def _is_suspected(self, name: Hashable) -> bool:
        return self._records[name].deaths >= DEATHS_TO_SUSPECT

    # What comes again.
    def ban(self, fingerprint: str, until: float) -> None:
        """Refuse this request, whoever sends it, until then."""
        self._banned[fingerprint] = until

    @property
    def has_banned(self) -> bool:
        """True while it is worth taking fingerprints."""
        return bool(self._banned)

    def is_banned(self, fingerprint: str, at: float) -> bool:
        """True while it is refused."""
        self._banned = {each: until for each, until in self._banned.items() if at < until}
        return fingerprint in self._banned
