"""The sums of seconds and starts that have to fit into each other, and what they come to.

The unit file and the instance file are written apart and meet only here: a number of the unit that is
changed there has to be changed here, and a test reads both.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from llm_serve.core.devices import parallel_sizes, product_in_words

if TYPE_CHECKING:
    from llm_serve.core.settings import Settings

UNIT_STOP_TIMEOUT_S = 330
"""TimeoutStopSec of llm-serve@.service: after it systemd kills what is left."""

UNIT_START_LIMIT_BURST = 3
"""StartLimitBurst of llm-serve@.service: how often systemd starts a daemon that gave up."""

KILL_S = 15
"""Longest time from the end of the drain until the last process of the engine is gone."""

STOP_MARGIN_S = 15
"""Kept free under TimeoutStopSec, so that it is never systemd that ends a stop in good order."""

MAX_DRAIN_S = UNIT_STOP_TIMEOUT_S - KILL_S - STOP_MARGIN_S


def seconds(value: float) -> str:
    """`60 s`, `0.5 s`: no `.0` where the file has none."""
    return f"{value:g} s" if value < 1e6 else f"{value:.0f} s"


def over_budget(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield (option, message, hint) for each sum that does not fit."""
    drain = settings.server.drain_timeout_s
    if drain > MAX_DRAIN_S:
        total = drain + KILL_S + STOP_MARGIN_S
        yield (
            "server.drain_timeout_s",
            (
                f"{seconds(drain)} drain + {KILL_S} s kill + {STOP_MARGIN_S} s margin = {seconds(total)}, "
                f"more than the unit's TimeoutStopSec of {UNIT_STOP_TIMEOUT_S} s"
            ),
            f"Set it to {MAX_DRAIN_S} or less",
        )
    yield from _floors_above_the_file(settings)
    yield from _more_devices_than_given(settings)


def _floors_above_the_file(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """A floor that the file sets above its own wish leaves the ladder no rung, not even the first."""
    for name in ("max_model_len", "max_num_seqs"):
        option, wish = f"floor_{name}", settings.engine.get(name)
        if option not in settings.recovery.model_fields_set or type(wish) is not int:
            continue
        floor = getattr(settings.recovery, option)
        if floor > wish:
            yield (
                f"recovery.{option}",
                f"the floor of {floor} is above engine.{name} = {wish}",
                f"Set it to {wish} or less",
            )


def _more_devices_than_given(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """One process per GPU: what vLLM multiplies has to fit on the devices named."""
    devices, sizes = settings.gpu.devices, parallel_sizes(settings.engine)
    if devices is not None and sizes is not None and prod(sizes.values()) > len(devices):
        yield (
            "gpu.devices",
            f"{product_in_words(sizes)}, but devices names {len(devices)}",
            "Name as many devices as the engine has processes, or lower the parallel sizes",
        )


def budgets(settings: Settings) -> tuple[str, ...]:
    """What the settings come to in the worst case, one sentence a sum."""
    drain, hold = settings.server.drain_timeout_s, settings.server.hold_timeout_s
    limit, window = settings.recovery.restart_limit, settings.recovery.restart_window_s
    stop = drain + KILL_S
    starts = limit * UNIT_START_LIMIT_BURST
    every = f"{limit} in {seconds(window)}"
    return (
        f"a stop: {seconds(drain)} drain + {KILL_S} s kill = {seconds(stop)} of {UNIT_STOP_TIMEOUT_S} s",
        f"a request: {seconds(hold)} wait for an engine + its own run",
        f"engine starts: {every} x {UNIT_START_LIMIT_BURST} by systemd = {starts}, then it stays failed",
    )
