"""Keeps what the engine's processes say, so that a failure can be explained after they are gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from llm_serve.core.evidence import ErrorRecord, Evidence
from llm_serve.core.progress import Phase, phase_of

_OUTPUT_LINES, _TAIL_LINES, _ERRORS = 400, 20, 50
_TELLING = "Exception in aoti_torch"
"""How torch prints an exception that it does not pass on through its C interface."""
_CAUSE_LIMIT = 20
_ERROR_LEVELS = frozenset({"ERROR", "CRITICAL"})
"""vLLM also logs exceptions that it gets over, as warnings; they explain no failure."""


class Collector:
    """Gathers one engine's records, output and phase.

    Called from the relay's threads; every write is one append.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last engine, before the next is started."""
        self.phase: Phase | None = None
        self.heard = 0
        self._errors: deque[tuple[float, ErrorRecord]] = deque(maxlen=_ERRORS)
        self._output: deque[str] = deque(maxlen=_OUTPUT_LINES)
        self._names: dict[int, str] = {}
        self._ended: dict[int, int] = {}

    def add_record(self, value: Mapping[str, Any]) -> None:
        """Take note of one relayed log record."""
        self.heard += 1
        if ended := value.get("ended"):
            self._ended[ended[0]] = ended[1]
            return
        self._names[value["pid"]] = value["process"]
        if found := phase_of(value["message"]):
            self.phase = found if self.phase is None or found.ratio >= self.phase.ratio else self.phase
        if (error := value.get("exception")) and value["level"] in _ERROR_LEVELS:
            frames = tuple(error["frames"])
            found_error = ErrorRecord(value["process"], error["type"], error["text"], frames)
            self._errors.append((value["time"], found_error))

    def add_output(self, line: str) -> None:
        """Take note of one line that a process wrote past its logger."""
        self.heard += 1
        self._output.append(line)

    def has_ends_of(self, pids: Iterable[int]) -> bool:
        """True once the fork server has told how each of these ended; it tells nothing of those that ended well."""
        return set(pids) <= self._ended.keys()

    def _tail(self) -> tuple[str, ...]:
        """The last lines, and before them those that are the only word on an error: a long C++ trace follows them."""
        lines = tuple(self._output)
        telling = tuple(line for line in lines[:-_TAIL_LINES] if _TELLING in line)
        return telling[-_TAIL_LINES:] + lines[-_TAIL_LINES:]

    def evidence(self, error: BaseException | None = None, *, since: float = 0.0, **more: Any) -> Evidence:
        """What is known now, with the error that the daemon itself saw.

        `since` is the Unix time before which an error explains nothing: an engine survives many that it logs. `more`
        are further fields of Evidence.
        """
        named = {self._names[pid]: code for pid, code in list(self._ended.items()) if pid in self._names}
        codes = named | exit_codes_in(error) | more.pop("exit_codes", {})
        return Evidence(
            phase=self.phase.name if self.phase else "",
            errors=tuple(record for time, record in self._errors if time >= since),
            output_tail=self._tail(),
            exit_codes=codes,
            parent_error=ErrorRecord("", f"{type(error).__module__}.{type(error).__qualname__}", str(error))
            if error
            else None,
            **more,
        )


def exit_codes_in(error: BaseException | None) -> dict[str, int]:
    """Exit codes of EngineCore processes that a start-up error still holds in the frames of its traceback.

    vLLM reports `{}` for a process that was killed: it looks before the exit status is there.
    """
    trace = error.__traceback__ if error else None
    codes: dict[str, int] = {}
    for _ in range(_CAUSE_LIMIT):
        if trace is None:
            break
        manager = getattr(trace.tb_frame.f_locals.get("launch"), "engine_manager", None)
        codes |= exit_codes_of(manager)
        trace = trace.tb_next
    return codes


def exit_codes_of(manager: Any) -> dict[str, int]:
    """Exit codes of the processes of a CoreEngineProcManager that have ended."""
    found = {process.name: process.exitcode for process in getattr(manager, "processes", ())}
    return {name: code for name, code in found.items() if code not in (None, 0)}
