"""The reading of GPUs: once a second, in a thread, and nothing that is too old."""

from __future__ import annotations

import threading
from typing import Any, cast

from llm_serve.core.telemetry import Reading
from llm_serve.host.nvml import Gpu
from llm_serve.host.telemetry import Telemetry

GPUS = tuple(Gpu(index, f"GPU-{index}", "NVIDIA H200", "", 1) for index in range(2))


class Library:
    """GPUs whose temperature is the number of the reading; the third never ends."""

    def __init__(self) -> None:
        self.readings, self.is_over = 0, threading.Event()
        self.is_stuck = threading.Event()

    def forget_xids(self) -> None:
        """Nothing."""

    def read(self, gpu: Gpu) -> Reading:
        """Hang, in the end."""
        self.readings += gpu.index == 0
        if self.readings == 3:
            self.is_stuck.set()
            self.is_over.wait(10)
        return Reading(gpu.index, gpu.uuid, gpu.name, temperature_celsius=float(self.readings))


def test_the_last_reading_is_told_until_it_is_too_old() -> None:
    """A GPU that lets its reader wait is soon one of which nothing is known; nobody else waits."""
    library, now = Library(), [0.0]
    telemetry = Telemetry(cast("Any", library), GPUS, clock=lambda: now[0])
    assert () == telemetry.readings()
    telemetry.read()
    telemetry.read()
    assert [2.0, 2.0] == [each.temperature_celsius for each in telemetry.readings()]

    telemetry.start()
    assert library.is_stuck.wait(5)
    now[0] = 4.0
    assert [2.0, 2.0] == [each.temperature_celsius for each in telemetry.readings()]
    now[0] = 6.0
    assert [("GPU-0", None), ("GPU-1", None)] == [
        (each.uuid, each.temperature_celsius) for each in telemetry.readings()
    ]

    library.is_over.set()
    telemetry.close()


def test_without_gpus_nothing_is_read() -> None:
    """On a machine without a GPU there is no thread."""
    library, before = Library(), threading.active_count()

    Telemetry(cast("Any", library), ()).start()

    assert (0, before) == (library.readings, threading.active_count())
