"""One instance as it is seen from outside: what its daemon tells, or why nobody does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_serve.core.vitals import Vitals


@dataclass(frozen=True, slots=True)
class Report:
    """One instance at one moment. `since` is a Unix time; `status` is the body of /status, or None: nobody answers."""

    instance: str
    state: str
    why: str
    since: float | None = None
    status: Mapping[str, Any] | None = None
    vitals: Vitals | None = None

    @classmethod
    def told(cls, status: Mapping[str, Any], vitals: Vitals | None = None) -> Report:
        """What a daemon has answered."""
        return cls(status["instance"], status["state"], status["why"], status["since"], status, vitals)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it: /status and the load, or what is known without the daemon."""
        if self.status is not None:
            return dict(self.status) | {"load": self.vitals.to_json() if self.vitals else None}
        return {"instance": self.instance, "state": self.state, "why": self.why, "since": self.since}


def is_open(status: Mapping[str, Any]) -> bool:
    """True where requests go through to an engine, so that those that wait do so for a limit of it."""
    return bool(status["state"] == "serving")


def has_engine(status: Mapping[str, Any]) -> bool:
    """True where there is an engine to tell of; while one is built, there is none."""
    return bool(status["engine_pids"])
