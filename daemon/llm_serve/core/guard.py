"""When a GPU is too hot for new requests."""

from __future__ import annotations

from collections.abc import Sequence

from llm_serve.core.telemetry import Reading

_HYSTERESIS_C = 5


def too_hot(gpus: Sequence[Reading], limit_c: int, *, is_paused: bool) -> str | None:
    """Why admission is to pause; empty when it is not, None when no GPU tells its temperature.

    It pauses above `limit_c` degrees Celsius (0: never) and goes on 5 degrees below, so that it does not flutter.
    """
    if not limit_c:
        return ""
    known = [(gpu.temperature_celsius, gpu.index) for gpu in gpus if gpu.temperature_celsius is not None]
    if not known:
        return None
    (hottest, index), go_on_at = max(known), limit_c - _HYSTERESIS_C
    is_hot = hottest > go_on_at if is_paused else hottest > limit_c
    limit = f"gpu.pause_above_celsius is {limit_c}"
    return f"GPU {index} has {hottest:.0f} °C and {limit}: admission pauses until it has {go_on_at}" if is_hot else ""
