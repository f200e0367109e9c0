"""How far an engine start has come, read off the log records that vLLM writes on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of a start. `ratio` is how much of a usual start lies before it: 0 at first, 1 when serving."""

    name: str
    ratio: float


IMPORTING = Phase("loading vLLM", 0.02)
CONFIGURING = Phase("checking the model's configuration", 0.15)
LAUNCHING = Phase("starting the engine's processes", 0.20)
FIRST_TOKEN = Phase("generating the first token", 0.97)
SERVING = Phase("serving", 1.0)
MEETING = Phase("starting the engine's processes", 0.30)
"""EngineCore is there; where there are several GPUs, their processes meet now (NCCL)."""

_MARKERS = (
    ("Initializing a V1 LLM engine", MEETING),
    ("Starting to load model", Phase("loading weights", 0.40)),
    ("Loading weights took", Phase("weights loaded", 0.60)),
    ("Model loading took", Phase("weights loaded", 0.62)),
    ("Dynamo bytecode transform time", Phase("compiling", 0.66)),
    ("Available KV cache memory", Phase("measuring memory", 0.75)),
    ("KV cache size", Phase("making the KV cache", 0.80)),
    ("Capturing CUDA graphs", Phase("capturing CUDA graphs", 0.85)),
    ("Warming up model", Phase("warming up", 0.85)),
    ("Graph capturing finished", Phase("warming up", 0.92)),
    ("init engine", Phase("engine ready", 0.95)),
)


def phase_of(message: str) -> Phase | None:
    """The phase that a log message announces, or None for any other message."""
    return next((phase for marker, phase in _MARKERS if marker in message), None)


class Marks(NamedTuple):
    """What work leaves behind, counted from some beginning: CPU seconds, bytes read, records and lines heard."""

    cpu_s: float
    bytes_read: int
    heard: int


LEAST_CPU_SHARE = 0.05
"""Of one core. A daemon that only waits uses a tenth of this; one that imports, or an engine that loads, all of it."""


def is_progress(before: Marks, after: Marks, seconds: float, *, spins: bool = False) -> bool:
    """True when something was done in the `seconds` between two marks, and not merely waited.

    `spins` says that who waits now keeps a core busy, as processes do that wait for each other's GPUs.
    """
    is_busy = not spins and after.cpu_s - before.cpu_s >= LEAST_CPU_SHARE * seconds
    return is_busy or after.bytes_read > before.bytes_read or after.heard > before.heard
