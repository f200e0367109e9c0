"""The last minutes of an instance: one sample a second, and the last events of its journal. Both are bounded.

Whoever has seen them up to some number is told only what came after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from llm_serve.core.status import Snapshot
from llm_serve.core.tally import Pace

EVERY_S = 1.0
SAMPLES, EVENTS = 900, 200
COLUMNS = (
    "time",
    "state",
    "in_flight",
    "held",
    "running",
    "waiting",
    "kv_cache_usage",
    "prompt_tokens_per_s",
    "generated_tokens_per_s",
    "ttft_median_s",
    "ttft_p99_s",
    "gpus",
)
"""Of a sample. Unix seconds; `running` and `waiting` are those in the engine.

TTFT is that of the last ten seconds; a stream that goes on after a recovery counts again, with all of its time so far.
"""
GPU_COLUMNS = ("temperature_celsius", "power_watts", "memory_used_bytes", "utilization_ratio")
"""Of a GPU within a sample, in the order of /status; null where the device has no such sensor."""

Row = tuple[Any, ...]


def sample(at: float, now: Snapshot, pace: Pace) -> Row:
    """The values of COLUMNS, rounded to what can be seen."""
    return (
        round(at, 1),
        now.state,
        now.requests_in_flight,
        now.requests_held,
        now.requests_running,
        now.requests_waiting,
        _rounded(now.kv_cache_usage, 4),
        round(pace.prompt_tokens_per_s, 1),
        round(pace.generated_tokens_per_s, 1),
        _rounded(pace.first_token_median_s, 4),
        _rounded(pace.first_token_p99_s, 4),
        [[_rounded(getattr(gpu, name), 2) for name in GPU_COLUMNS] for gpu in now.gpus],
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


class History:
    """Samples and events, numbered in one row as they came."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, Row]] = deque(maxlen=SAMPLES)
        self._events: deque[tuple[int, Mapping[str, Any]]] = deque(maxlen=EVENTS)
        self._last = 0

    def add_sample(self, row: Row) -> None:
        """One more second."""
        self._last += 1
        self._samples.append((self._last, row))

    def add_event(self, event: Mapping[str, Any]) -> None:
        """One more entry of the journal."""
        self._last += 1
        self._events.append((self._last, event))

    def after(self, number: int) -> dict[str, Any]:
        """What came after that number, oldest first; all of it where the number is not one of ours."""
        seen = number if number <= self._last else 0
        return {
            "last": self._last,
            "every_s": EVERY_S,
            "columns": COLUMNS,
            "gpu_columns": GPU_COLUMNS,
            "samples": [row for each, row in self._samples if each > seen],
            "events": [event for each, event in self._events if each > seen],
        }
