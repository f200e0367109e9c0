"""Every error that llm-serve raises on purpose.

    LlmServeError                 exit status
      ConfigError                 78   the file is wrong: fixed by a person, never by a restart
      HostError                   75   the machine is not ready: device absent, port in use; try again
      EngineStartError            70   one start of the engine failed
      GaveUp                      70   every start that the limits allow has failed

The exit status is an interface: the unit keeps systemd from restarting on 78 and lets it restart on
everything else. A foreign exception is wrapped once, at the border where it enters, with `from`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one file, and where."""

    file: str
    line: int | None
    path: str
    """The option's dotted name, as `engine.max_model_len`; empty when it is the file as a whole."""
    message: str
    hint: str | None = None
    """What to do about it."""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        words = f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"
        if not self.hint:
            return words
        return f"{words} {self.hint}" if words.endswith((".", "!", "?")) else f"{words}. {self.hint}"


class LlmServeError(Exception):
    """Base of all: catching it catches what llm-serve itself reports, and no bug."""

    exit_status = 70


class ConfigError(LlmServeError):
    """The configuration is refused, for all the reasons in `problems`."""

    exit_status = 78

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        # `args` holds what __init__ takes, so that the error survives pickling between processes.
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class HostError(LlmServeError):
    """The machine cannot do it now, but may soon: no device yet, the port in use, no network."""

    exit_status = 75


class EngineStartError(LlmServeError):
    """One start of the engine failed; what follows is decided by the recovery rules."""


class GaveUp(LlmServeError):  # noqa: N818 - the end of a policy, said as it is; no single error
    """The restart limit is spent: nothing more is tried in this process."""
