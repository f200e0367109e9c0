"""Reads GPUs, those of an instance once a second, in a thread: a GPU that has fallen off the bus may let one wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from llm_serve.core.telemetry import Reading
from llm_serve.host.nvml import Gpu, Gpus

_EVERY_S = 1.0
_STALE_S = 5.0


class Telemetry:
    """The last reading of each GPU. What is too old is not told: absent, not wrong."""

    def __init__(
        self,
        gpus: Gpus,
        used: Sequence[Gpu],
        clock: Callable[[], float] = time.monotonic,
        *,
        every_s: float = _EVERY_S,
    ) -> None:
        self._gpus, self._used, self._clock, self._every_s = gpus, tuple(used), clock, every_s
        self._last: tuple[Reading, ...] = ()
        self._read_at = clock()
        self._is_over = threading.Event()

    def start(self) -> None:
        """Read from now on, where there is something to read."""
        if self._used:
            self._gpus.forget_xids()  # from now on they are counted
            threading.Thread(target=self._read_on, name="gpu-telemetry", daemon=True).start()

    def readings(self) -> tuple[Reading, ...]:
        """One for each GPU; of one that does not answer nothing but its name is known."""
        if self._clock() - self._read_at <= _STALE_S:
            return self._last
        return tuple(Reading(gpu.index, gpu.uuid, gpu.name) for gpu in self._used)

    def close(self) -> None:
        """Read no more."""
        self._is_over.set()

    def read(self) -> None:
        """Read all of them now."""
        self._last = tuple(self._gpus.read(gpu) for gpu in self._used)
        self._read_at = self._clock()

    def _read_on(self) -> None:
        while not self._is_over.is_set():
            self.read()
            self._is_over.wait(self._every_s)
