"""What a running instance tells: its snapshot (/status, /metrics, systemd's STATUS line), and replies to orders."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llm_serve.core.telemetry import Reading


@dataclass(frozen=True, slots=True)
class FrontEndStatus:
    """One of several processes that answer HTTP; `place` 0 is the daemon's own.

    `epoch` is that of the engine which it gives requests to, 0 while there is none. Forks share part of their memory.
    """

    place: int
    pid: int
    epoch: int
    requests_held: int
    requests_in_flight: int
    connections: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One instance at one moment. Times are seconds; `since` and `started` are Unix times.

    `asked` is the plan of the file, `engine_arguments` that of the moment. `requests_running` and `requests_waiting`
    are those in the engine, `kv_cache_usage` is a share of 1; None without an engine. `weight_pids` are the processes
    that hold weights between engines.
    """

    instance: str
    model: str
    state: str
    why: str
    since: float
    started: float
    uptime_s: float
    phase: str
    progress: float
    version: str
    vllm_version: str
    pid: int
    listen: str
    source: str
    epoch: int = 0
    rung: int = 0
    steps: tuple[str, ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    engine_starts: int = 0
    last_failure: str | None = None
    failures: tuple[dict[str, Any], ...] = ()
    seconds_since_engine_step: float | None = None
    engine_stalled_s: float = 0.0
    max_queued: int = 0
    requests_held: int = 0
    requests_in_flight: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    kv_cache_usage: float | None = None
    is_drained: bool = False
    too_hot: str = ""
    reload_failed: str | None = None
    engine_network: str = ""
    engine_pids: tuple[int, ...] = ()
    weight_pids: tuple[int, ...] = ()
    memory_bytes: int = 0
    front_ends: tuple[FrontEndStatus, ...] = ()
    gpus: tuple[Reading, ...] = ()
    engine_arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The body of /status."""
        return asdict(self) | {"gpus": [asdict(gpu) | {"slowed_by": gpu.slowed_by} for gpu in self.gpus]}

    @property
    def line(self) -> str:
        """One line for systemd and people."""
        if self.state in {"starting", "recovering", "reloading"}:
            return f"{self.state}: {self.phase}, {self.progress:.0%} ({self.why})"
        if self.state == "serving":
            rung = f", rung {self.rung}" if self.rung else ""
            counts = f"{self.requests_in_flight} in flight, {self.engine_starts} start(s){rung}"
            reload = f"; the last reload failed: {self.reload_failed}" if self.reload_failed else ""
            return f"serving {self.model} on {self.listen}: {counts}{reload}"
        return f"{self.state}: {self.why}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of an order: the exit status for the command, and a sentence for the person."""

    exit_status: int
    message: str
