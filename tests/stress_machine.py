"""`llm-serve stress` on a machine without a GPU: its tests really run, on torch's CPU device at tiny sizes.

    python -m tests.stress_machine stress --seconds 10 --png /tmp/stress.png

What is made up is NVIDIA's library: two GPUs whose temperature and power rise while this process runs.
LLM_SERVE_HEATING is by how many degrees a second, LLM_SERVE_GPUS how many there are.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any, cast

from llm_serve.cli import main as command_line
from llm_serve.cli import stress as command
from llm_serve.core.doctor.driver import Build
from llm_serve.core.stress import Sizes
from llm_serve.core.telemetry import Reading
from llm_serve.host.nvml import Gpu, NoGpus
from llm_serve.stress.measure import Plan

MIB = 1 << 20
TINY = Sizes(
    load_s=0.6, short_s=0.1, matrix=256, elements=1 << 16, block_bytes=MIB, passes=1, device_bytes=8 * MIB
)  # fmt: skip


class Sensors(NoGpus):
    """GPUs that get warmer by so many degrees a second, from 40 on, and tell of errors that a test has set."""

    def __init__(self, count: int = 1, heating: float = 0.0, slowdown: float | None = None) -> None:
        super().__init__("")
        self.count, self.heating, self.slowdown, self.began = count, heating, slowdown, time.monotonic()
        self.news: dict[str, Any] = {}

    def devices(self) -> tuple[Gpu, ...]:
        """Those that are asked for."""
        return tuple(Gpu(index, f"GPU-{index}", "Stand-in", "", 8 * MIB) for index in range(self.count))

    def read(self, gpu: Gpu) -> Reading:
        """The second one is a little warmer."""
        celsius = 40 + gpu.index + self.heating * (time.monotonic() - self.began)
        known = {"temperature_celsius": celsius, "power_watts": 5 * celsius, "power_limit_watts": 450.0}
        return Reading(gpu.index, gpu.uuid, gpu.name, **known | self.news)

    def slowdown_celsius(self, gpu: Gpu) -> float | None:
        """As a device tells it."""
        return self.slowdown


def main() -> None:
    """The command line, with this machine below it."""
    count, heating = int(os.environ.get("LLM_SERVE_GPUS", "2")), float(os.environ.get("LLM_SERVE_HEATING", "1"))
    replaced: dict[str, Any] = {
        "open_gpus": lambda: Sensors(count, heating),
        "build": lambda: Build("vllm", "0", "2", "13"),
        "process_facts": lambda: ((), {}),
        "Plan": partial(Plan, device="cpu"),
        "Sizes": lambda load_s, **more: Sizes(
            load_s, TINY.short_s, TINY.matrix, TINY.elements, TINY.block_bytes, TINY.passes, device_bytes=8 * MIB
        ),
    }
    for name, what in replaced.items():
        setattr(cast("Any", command), name, what)
    command_line.main()


if __name__ == "__main__":
    main()
