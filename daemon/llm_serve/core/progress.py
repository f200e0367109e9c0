"""How far an engine start has come, read off the log records that vLLM writes on its way."""

from __future__ import annotations

from dataclasses import dataclass


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

_MARKERS = (
    ("Initializing a V1 LLM engine", Phase("starting the engine's processes", 0.30)),
    ("Starting to load model", Phase("loading weights", 0.40)),
    ("Loading weights took", Phase("weights loaded", 0.60)),
    ("Model loading took", Phase("weights loaded", 0.62)),
    ("torch.compile", Phase("compiling", 0.66)),
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
