"""When work that is under way counts as such, and when a larger plan is worth a trial: functions of numbers."""

from __future__ import annotations

from llm_serve.core.progress import LEAST_CPU_SHARE

_LONGEST_IDLE_S = 30.0


class Progress:
    """Since when CPU seconds and bytes read stand still. Empty marks, of no process at all, always do."""

    def __init__(self) -> None:
        self._marks: tuple[float, int] | None = None
        self._marked_at = self._moved_at = float("-inf")

    def idle_s(self, marks: tuple[float, int], now: float) -> float:
        """Seconds without progress, at the monotonic time `now`, of what had used and read so much."""
        if self._marks is not None and self._has_moved(marks, now - self._marked_at):
            self._moved_at = now
        self._marks, self._marked_at = marks, now
        return now - self._moved_at

    def _has_moved(self, marks: tuple[float, int], passed_s: float) -> bool:
        assert self._marks is not None
        return marks[0] - self._marks[0] >= LEAST_CPU_SHARE * passed_s or marks[1] > self._marks[1]


def is_step_up_due(*, on_plan_s: float, idle_s: float, wait_s: float, trials_failed: int) -> bool:
    """True when the plan has held for `wait_s`, twice as long after each failed trial, and nobody would notice now."""
    return on_plan_s >= wait_s * 2.0 ** min(trials_failed, 16) and idle_s >= min(wait_s, _LONGEST_IDLE_S)
