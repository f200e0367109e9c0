"""A stress test of GPUs: what its parts found, what the sensors showed meanwhile, and the verdict on both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from llm_serve.core.devices import Device, parse_device
from llm_serve.core.doctor.findings import gib
from llm_serve.core.doctor.gpus import ProcessFacts
from llm_serve.core.telemetry import Reading

ALL_PASSED, SOMETHING_FAILED, INTERRUPTED = 0, 70, 130
DEFAULT_LIMIT_CELSIUS, MARGIN_CELSIUS = 90.0, 3.0
_CREDIBLE_SLOWDOWN_CELSIUS = (60.0, 120.0)
_OVERHEATING = "hw_thermal_slowdown"
_MIB, _GIB = 1 << 20, 1 << 30
_DESKTOP_BYTES = 1 << 30
"""What a desktop may hold of a GPU without being in the way."""
_DRIVER_BYTES = 2 << 30
"""What a driver keeps of a large GPU for itself, which counts as used and has no holder."""


class Part(StrEnum):
    """The tests, in the order in which they are run."""

    operations = "operations"
    allocation = "allocation"
    matmul = "matmul"
    memory = "memory"
    precision = "precision"
    load = "load"


TITLES: Mapping[Part, str] = {
    Part.operations: "CUDA operations",
    Part.allocation: "allocate and free",
    Part.matmul: "matmul in fp16",
    Part.memory: "memory integrity",
    Part.precision: "precisions",
    Part.load: "full load",
}


class Verdict(StrEnum):
    """How a part ended."""

    passed = "passed"
    failed = "failed"
    stopped = "stopped"
    """Nothing was wrong until it was interrupted."""
    not_run = "not run"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much the parts do. Matrices are `matrix` x `matrix`; `short_s` is for each format but the last part's."""

    load_s: float = 60.0
    short_s: float = 4.0
    matrix: int = 8192
    elements: int = 1 << 22
    block_bytes: int = 256 * _MIB
    passes: int = 3
    """Over all patterns of memory."""
    is_shared: bool = False
    """True where somebody else uses the GPU as well."""
    device_bytes: int = 0
    """The memory of a device that does not tell it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a part has found so far. `errors` are values that were not what they had to be; `tflops` is by format."""

    part: Part
    seconds: float = 0.0
    iterations: int = 0
    errors: int = 0
    tflops: Mapping[str, float] = field(default_factory=dict)
    allocated_bytes: int = 0
    notes: tuple[str, ...] = ()
    """Where the errors are, as far as that can be told."""
    error: str = ""
    """Why the part could not go on, in the words of the driver or of the system."""
    is_cut: bool = False
    """True when it was stopped before its end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a child tells of its part: how far it is, 0 to 1, how fast just now, and whether it is over."""

    share: float
    found: Found
    tflops: float | None = None
    is_over: bool = False

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Progress:
        """The inverse of `asdict`."""
        found = told["found"] | {"part": Part(told["found"]["part"]), "notes": tuple(told["found"]["notes"])}
        return cls(**told | {"found": Found(**found)})


@dataclass(frozen=True, slots=True)
class Sample:
    """One GPU at one moment, in seconds since the test began. None where it is not known."""

    at_s: float
    part: Part | None
    celsius: float | None
    watts: float | None
    tflops: float | None
    slowed_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the most that a sensor showed; None where it showed nothing."""

    least: float | None
    most: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Range:
        """Of those values that are known."""
        known = [value for value in values if value is not None]
        return cls(min(known), max(known)) if known else cls(None, None)


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of a GPU from outside while a part ran: sensors, and errors that the driver counted."""

    celsius: Range = Range(None, None)
    watts: Range = Range(None, None)
    slowed_by: tuple[str, ...] = ()
    xids: Mapping[str, int] = field(default_factory=dict)
    ecc_errors: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Sequence[Sample], before: Reading | None, after: Reading | None) -> Sight:
        """From the samples of a part, and from readings at its two ends."""
        return cls(
            Range.of(sample.celsius for sample in samples),
            Range.of(sample.watts for sample in samples),
            tuple(dict.fromkeys(words for sample in samples for words in sample.slowed_by)),
            _more(before.xids, after.xids) if before and after else {},
            _more(before.ecc_errors, after.ecc_errors, is_complete=False) if before and after else {},
        )


def _more(before: Mapping[str, int], after: Mapping[str, int], *, is_complete: bool = True) -> dict[str, int]:
    """What has been added. A count that was not known before is news only where `before` names all that there is."""
    news = {name: count - before.get(name, 0 if is_complete else count) for name, count in after.items()}
    return {name: count for name, count in news.items() if count > 0}


@dataclass(frozen=True, slots=True)
class Row:
    """One part on one GPU, judged."""

    found: Found
    sight: Sight
    verdict: Verdict
    reason: str = ""
    """Why it did not pass; of one that did, what is worth knowing."""

    def to_json(self) -> dict[str, Any]:
        """One entry of `--json`."""
        return asdict(self.found) | asdict(self.sight) | {"verdict": self.verdict, "reason": self.reason}


def judge(found: Found, sight: Sight, heat: str = "") -> Row:
    """The verdict. `heat` is why the GPU was stopped, where it got too hot in this part."""
    wrong = f"{found.errors} wrong value{'s' * (found.errors != 1)}"
    where = f" ({'; '.join(found.notes)})" if found.notes else ""
    faults = [
        found.error,
        f"{wrong}{where}" if found.errors else "",
        *(f"Xid {xid}" + f" ({count} times)" * (count > 1) for xid, count in sight.xids.items()),
        _ecc(sight, "uncorrected"),
        heat,
    ]
    if any(faults):
        return Row(found, sight, Verdict.failed, "; ".join(filter(None, faults)))
    return Row(found, sight, Verdict.stopped if found.is_cut else Verdict.passed, _ecc(sight, "corrected"))


def _ecc(sight: Sight, kind: str) -> str:
    count = sight.ecc_errors.get(kind, 0)
    return f"{count} {kind} ECC error{'s' * (count != 1)}" if count else ""


def not_run(part: Part, why: str) -> Row:
    """A part that never began."""
    return Row(Found(part), Sight(), Verdict.not_run, why)


def exit_status(verdicts: Iterable[Verdict], *, is_interrupted: bool) -> int:
    """70 when something failed, 130 when it was interrupted before its end, else 0."""
    seen = set(verdicts)
    if Verdict.failed in seen:
        return SOMETHING_FAILED
    is_whole = bool(seen) and seen == {Verdict.passed}
    if is_whole:
        return ALL_PASSED
    return INTERRUPTED if is_interrupted else SOMETHING_FAILED


# Heat.
def limit_celsius(asked: float | None, slowdown: float | None) -> float:
    """Where to stop: as asked, else a little below the slow-down of the device, as far as it tells a credible one."""
    if asked is not None:
        return asked
    low, high = _CREDIBLE_SLOWDOWN_CELSIUS
    if slowdown is None or not low <= slowdown <= high:
        return DEFAULT_LIMIT_CELSIUS
    return slowdown - MARGIN_CELSIUS


def too_hot(reading: Reading, limit: float) -> str:
    """Why a GPU has to be stopped now; empty while it may go on."""
    celsius = reading.temperature_celsius
    if celsius is not None and celsius >= limit:
        return f"stopped at {celsius:.0f} °C, the limit is {limit:.0f}"
    if _OVERHEATING in (reading.throttle_reasons or ()):
        where = "" if celsius is None else f" at {celsius:.0f} °C"
        return f"stopped{where}: the hardware slows itself down for its heat"
    return ""


# Room.
def budget_bytes(free: int, total: int, *, is_shared: bool) -> int:
    """How much memory a test may take: most of what is free, or half of it where somebody else may need some."""
    return free // 2 if is_shared else max(0, free - max(_GIB // 2, total // 20))


def parse_gpus(text: str) -> tuple[Device, ...]:
    """The GPUs of a list like 0,2. Raises ValueError with what is wrong with it."""
    words = [word.strip() for word in text.split(",")]
    found = tuple(parse_device(int(word) if word.isascii() and word.isdigit() else word) for word in words)
    if len(set(found)) < len(found):
        raise ValueError("names a GPU twice")
    return found


def parse_parts(text: str) -> tuple[Part, ...]:
    """The tests of a list like matmul,load, in their own order. Raises ValueError with what is wrong with it."""
    words = {word.strip() for word in text.split(",")}
    if unknown := words - set(Part):
        raise ValueError(f"no test is called {', '.join(sorted(unknown)) or '(nothing)'}: there are {', '.join(Part)}")
    return tuple(part for part in Part if part in words)


def occupants(
    gpus: Iterable[int],
    processes: Iterable[ProcessFacts],
    unseen: Mapping[int, int],
    instances: Mapping[str, Iterable[int]],
) -> list[str]:
    """Who would suffer from a test of these GPUs, in words. `instances` have the GPUs that they use.

    A process counts when it is an engine, or holds more than a desktop does; so does memory that nobody in sight holds.
    """
    wanted = set(gpus)
    found = [f"the instance {name} runs on it" for name, used in instances.items() if wanted & set(used)]
    for process in processes:
        held = sum(used for gpu, used in process.used_bytes.items() if gpu in wanted)
        if held > _DESKTOP_BYTES or (process.is_engine and wanted & process.used_bytes.keys()):
            found.append(str(process))
    hidden = {gpu: amount for gpu, amount in sorted(unseen.items()) if gpu in wanted and amount > _DRIVER_BYTES}
    return found + [f"nobody that can be seen from here holds {gib(each)} of GPU {gpu}" for gpu, each in hidden.items()]
