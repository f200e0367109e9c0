"""What a failed engine left behind, and the verdict on it: values that the log, /status, tests and files share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """The kinds of failure that call for different answers."""

    # The file, the model or the machine is wrong for good: a person must change something.
    configuration = "configuration"
    weights = "weights"
    weights_do_not_fit = "weights_do_not_fit"
    unsupported_gpu = "unsupported_gpu"
    toolchain = "toolchain"
    # Memory: a smaller plan helps.
    kv_cache_too_small = "kv_cache_too_small"
    no_kv_cache = "no_kv_cache"
    out_of_memory = "out_of_memory"
    too_many_sequences = "too_many_sequences"
    share_too_large = "share_too_large"
    host_out_of_memory = "host_out_of_memory"
    # Somebody else has it, or it is not there yet: waiting helps.
    memory_held = "memory_held"
    driver_not_ready = "driver_not_ready"
    hub_unreachable = "hub_unreachable"
    address_in_use = "address_in_use"
    host_limit = "host_limit"
    # A way of computing does not work here: another way may.
    attention_backend = "attention_backend"
    flashinfer = "flashinfer"
    compilation = "compilation"
    graph_capture = "graph_capture"
    communication = "communication"
    # Starting again helps.
    start_timeout = "start_timeout"
    start_stalled = "start_stalled"
    stalled = "stalled"
    killed = "killed"
    crashed = "crashed"
    device_error = "device_error"
    unknown = "unknown"
    # Nothing that a process can do helps.
    device_lost = "device_lost"
    unkillable = "unkillable"


class Place(StrEnum):
    """The part of an engine's life in which it failed."""

    start = "start"
    loading = "loading"
    profiling = "profiling"
    kv_cache = "kv_cache"
    warm_up = "warm_up"
    capture = "capture"
    serving = "serving"


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """One exception that a vLLM process logged."""

    process: str
    type: str
    text: str
    frames: tuple[str, ...] = ()
    """Function names, outermost first."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory of a GPU."""

    gpu: int
    pid: int
    name: str
    used_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) holds {self.used_bytes / 2**30:.1f} GiB of GPU {self.gpu}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about one failed engine. Holds no prompt and no answer."""

    phase: str = ""
    """The last phase that its log announced; see `progress`."""
    has_served: bool = False
    """True when it had answered before."""
    errors: tuple[ErrorRecord, ...] = ()
    """Exceptions that its processes logged, oldest first."""
    output_tail: tuple[str, ...] = ()
    """The last lines that its processes wrote past the log."""
    exit_codes: Mapping[str, int] = field(default_factory=dict)
    """By process name; negative is a signal."""
    parent_error: ErrorRecord | None = None
    """What the daemon's own thread saw."""
    timed_out_after_s: float | None = None
    """The start's deadline, where that ended it."""
    stalled_for_s: float | None = None
    """How long nothing had happened, where that ended it."""
    stalled_on: str = ""
    """What was waiting then, in words."""
    oom_kills: int = 0
    """Processes of our cgroup that the kernel killed for memory during this engine's life."""
    kernel_log: tuple[str, ...] = ()
    """Lines of the kernel's log that tell of OOM kills, Xids or crashes in this engine's life; empty if unreadable."""
    xids: tuple[int, ...] = ()
    """NVIDIA's error numbers of our GPUs, from the driver."""
    gpu_holders: tuple[Holder, ...] = ()
    """Other processes that held memory of our GPUs."""
    unkillable: tuple[str, ...] = ()
    """Processes of it that outlived a SIGKILL, with what the kernel says they wait for."""
    no_p2p: tuple[str, ...] = ()
    """Pairs of our GPUs that cannot reach each other's memory, as the driver says, in words."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """The verdict: what happened, in words, and what a person can do about it. Numbers are those the engine named."""

    kind: Kind
    detail: str
    advice: str = ""
    place: Place = Place.start
    tried_bytes: int | None = None
    """The allocation that failed."""
    fitting_model_len: int | None = None
    """vLLM's own estimate of the longest request that fits."""
    fitting_num_seqs: int | None = None
    """The most sequences that fit."""
    free_bytes: int | None = None
    """Free on the device."""
    total_bytes: int | None = None
    """All of the device."""
    no_p2p: tuple[str, ...] = ()
    """Pairs of GPUs that cannot reach each other's memory, where that may be the cause."""

    def __str__(self) -> str:
        """One line for a log or a status."""
        return f"{self.kind}: {self.detail}" + (f" {self.advice}" if self.advice else "")

    def to_json(self) -> dict[str, Any]:
        """As plain values; what is not known is left out."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) not in (None, "", ())}
