"""What a doctor says: one finding for each thing looked at, with its remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

PROBLEM_FOUND, FILE_REFUSED = 75, 78
"""As of `run`: the machine is not ready, and the file is wrong. Notes and what is not known leave 0."""


class State(StrEnum):
    """How a finding is to be taken."""

    good = "good"
    note = "note"
    """Works, but slower, smaller or less safely than it could; or worth knowing."""
    problem = "problem"
    """Something does not work, or will not."""
    not_known = "not known"
    """Could not be looked at: neither good nor bad."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `check` names it for scripts, as "gpu.0.pcie"."""

    check: str
    state: State
    found: str
    """What is there, in words."""
    means: str = ""
    """What follows from it; empty where it is good."""
    cure: str = ""
    """The command or the setting that changes it."""

    def to_json(self) -> dict[str, Any]:
        """One entry of `--json`."""
        return asdict(self)


def good(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, State.good, found)


def note(check: str, found: str, means: str, cure: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check, State.note, found, means, cure)


def problem(check: str, found: str, means: str, cure: str) -> Finding:
    """To be cured."""
    return Finding(check, State.problem, found, means, cure)


def not_known(check: str, found: str, means: str = "", cure: str = "") -> Finding:
    """Could not be looked at, for the reason in `found`."""
    return Finding(check, State.not_known, found, means, cure)


def exit_status(findings: Iterable[Finding], *, is_file_refused: bool = False) -> int:
    """0 without a problem, 78 when the instance's file is refused, else 75."""
    if is_file_refused:
        return FILE_REFUSED
    return PROBLEM_FOUND if any(finding.state is State.problem for finding in findings) else 0


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
