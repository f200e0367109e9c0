"""What a failed engine left behind, and what it means: one total table from Evidence to Failure.

The order is that of certainty. A worker's own exception comes before EngineCore's wrapper of it, and both
before the parent's "Engine core initialization failed". What the daemon's own process logged comes last, and
no row is asked about it: a client's bad request leaves exceptions there too. What no row knows is retried.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of failure that call for different answers."""

    configuration = "configuration"
    weights = "weights"
    host_limit = "host_limit"
    out_of_memory = "out_of_memory"
    start_timeout = "start_timeout"
    killed = "killed"
    crashed = "crashed"
    unknown = "unknown"


DETERMINISTIC = frozenset({Kind.configuration, Kind.weights})
"""Kinds that fail again however often they are tried: the daemon exits 78."""


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """One exception that a vLLM process logged."""

    process: str
    type: str
    text: str
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about one failed engine. `exit_codes` by process name; negative is a signal."""

    phase: str = ""
    errors: tuple[ErrorRecord, ...] = ()
    output_tail: tuple[str, ...] = ()
    exit_codes: Mapping[str, int] = field(default_factory=dict)
    parent_error: ErrorRecord | None = None
    timed_out_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The verdict: what happened, in words, and what a person can do about it."""

    kind: Kind
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        """One line for a log or a status."""
        return f"{self.kind}: {self.detail}" + (f" {self.advice}" if self.advice else "")


@dataclass(frozen=True, slots=True)
class _Row:
    pattern: re.Pattern[str]
    kind: Kind
    advice: str


def _row(pattern: str, kind: Kind, advice: str) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), kind, advice)


_TEXTS = (
    _row(r"MetadataIncompleteBuffer|incomplete metadata|HeaderTooLarge|InvalidHeader|"
         r"unpack requires a buffer",
         Kind.weights, "A weight file is cut short or is not a safetensors file: download it again."),
    _row(r"Cannot find any model weights|Weight files referenced in index but missing|"
         r"not initialized from checkpoint",
         Kind.weights, "The model folder lacks weight files: download the model again."),
    _row(r"estimated maximum model length is|No available memory for the cache blocks|KV cache is needed",
         Kind.out_of_memory, "Lower engine.max_model_len or raise engine.gpu_memory_utilization."),
    _row(r"OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED|cannot allocate memory",
         Kind.out_of_memory,
         "Lower engine.max_num_seqs, engine.max_model_len or engine.gpu_memory_utilization."),
    _row(r"Free memory on device|Available memory on node", Kind.out_of_memory,
         "Another process holds the memory, or engine.gpu_memory_utilization asks for too much."),
    _row(r"No space left on device|Errno 28", Kind.host_limit,
         "Free space on the disk that holds the caches."),
    _row(r"Too many open files|Errno 24", Kind.host_limit, "Raise LimitNOFILE."),
    _row(r"Insufficient space in /dev/shm|SIGBUS", Kind.host_limit, "Make /dev/shm larger."),
    _row(r"Permission denied|Errno 13", Kind.host_limit, "Give the service user access to that path."),
    _row(r"no kernel image is available|is not compatible with the current PyTorch", Kind.configuration,
         "The installed build has no kernels for this GPU: install the build that has."),
    _row(r"validation error for|is not supported for now|are not supported|"
         r"does not recognize this architecture|must be divisible by tensor parallel size|"
         r"Unknown attention backend", Kind.configuration, "Change the instance file."),
)  # fmt: skip


def classify(evidence: Evidence) -> Failure:
    """Name the failure. Total: every Evidence has an answer."""
    if evidence.timed_out_after_s is not None:
        phase = f" in the phase '{evidence.phase}'" if evidence.phase else ""
        return Failure(
            Kind.start_timeout,
            f"the engine was not ready {evidence.timed_out_after_s:.0f} s after its start{phase}.",
            "If it is only slow, raise recovery.start_timeout_s.",
        )
    cause = root_cause(evidence)
    for row in _TEXTS:
        if cause is not None and row.pattern.search(f"{cause.type}: {cause.text}"):
            return Failure(row.kind, _sentence(cause), row.advice)
    for process, code in evidence.exit_codes.items():
        if code < 0:
            return _signalled(process, -code)
    if cause is not None:
        return Failure(Kind.crashed, _sentence(cause))
    if evidence.errors:
        return Failure(Kind.crashed, _sentence(evidence.errors[-1]))
    last_words = evidence.output_tail[-1] if evidence.output_tail else "the engine ended without a word."
    return Failure(Kind.unknown, last_words)


def root_cause(evidence: Evidence) -> ErrorRecord | None:
    """The exception that says most: a worker's first, then EngineCore's, then the parent's."""
    # A worker is "VllmWorker-0" until it has named itself "Worker_TP0" or the like.
    workers = [error for error in evidence.errors if "Worker" in error.process]
    cores = [error for error in evidence.errors if error.process.startswith("EngineCore")]
    first = (workers or cores)[:1]
    return first[0] if first else evidence.parent_error


def _sentence(error: ErrorRecord) -> str:
    text = " ".join(error.text.split())
    where = f" (in {error.process})" if error.process else ""
    return f"{error.type.rsplit('.', 1)[-1]}{where}: {text[:600]}"


def _signalled(process: str, number: int) -> Failure:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    kind = Kind.killed if number == signal.SIGKILL else Kind.crashed
    advice = "If nobody killed it, the kernel did: look for 'Out of memory' in the kernel log."
    return Failure(kind, f"{process} was ended by {name}.", advice if kind is Kind.killed else "")
