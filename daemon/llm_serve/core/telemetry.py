"""What a GPU's sensors say at one moment, and what slows it down, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm_serve.core.evidence import Holder

THROTTLE_REASONS: Mapping[str, tuple[int, str]] = {
    "gpu_idle": (0x1, ""),
    "applications_clocks_setting": (0x2, "clocks set by hand"),
    "sw_power_cap": (0x4, "power limit"),
    "hw_slowdown": (0x8, "hardware slow-down"),
    "sync_boost": (0x10, "clocks of another GPU"),
    "sw_thermal_slowdown": (0x20, "too hot, says the driver"),
    "hw_thermal_slowdown": (0x40, "too hot, says the hardware"),
    "hw_power_brake_slowdown": (0x80, "power brake, by the power supply"),
    "display_clock_setting": (0x100, ""),
}
"""NVML's clock event reasons: the bit of each, and what it is called where it slows work down (nvml.h)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One GPU at one moment. None, or nothing, where the device has no such sensor or does not answer.

    Watts, degrees Celsius, bytes; `utilization_ratio` is the share of the last sample in which a kernel ran.
    `ecc_errors` by kind, over the life of the GPU; `xids` by number, since the daemon started.
    """

    index: int
    uuid: str
    name: str
    temperature_celsius: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization_ratio: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_errors: Mapping[str, int] = field(default_factory=dict)
    xids: Mapping[str, int] = field(default_factory=dict)
    processes: tuple[Holder, ...] = ()

    @property
    def slowed_by(self) -> tuple[str, ...]:
        """What makes it slower than it could be, in words."""
        return tuple(THROTTLE_REASONS[each][1] for each in self.throttle_reasons or () if THROTTLE_REASONS[each][1])


def reasons(bits: int) -> tuple[str, ...]:
    """NVML's bits by name; what a newer driver adds has none."""
    return tuple(name for name, (bit, _) in THROTTLE_REASONS.items() if bits & bit)
