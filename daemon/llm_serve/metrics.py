"""Every metric of ours, in one place. vLLM's own (`vllm:*`) live beside them in the same registry.

Ours must not begin with `vllm:`: each new engine unregisters that prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from llm_serve.core.evidence import Kind
from llm_serve.core.states import State
from llm_serve.core.status import Snapshot
from llm_serve.core.telemetry import THROTTLE_REASONS, Reading

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_RECOVERY_BUCKETS_S = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 300, 600, 1800)
OUTCOMES = ("completed", "replayed", "resumed", "interrupted", "rejected", "poisoned", "aborted")
REFUSALS = ("full", "late", "stopping")
_HOLD_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

_START_REASONS = ("start", "reload", "step_up", *Kind)

engine_starts = Counter("llm_serve_engine_starts", "Engine starts by reason: start, or the failure before.", ["reason"])
engine_failures = Counter(
    "llm_serve_engine_failures", "Engines that died or did not start, by kind of failure.", ["kind"]
)
# A counter that begins at 1 has never risen, as Prometheus sees it: the first failure would raise no alarm.
for _reason in _START_REASONS:
    engine_starts.labels(_reason)
for _kind in Kind:
    engine_failures.labels(_kind)
recovery_seconds = Histogram(
    "llm_serve_recovery_seconds",
    "From the failure of an engine to the first token of the next.",
    buckets=_RECOVERY_BUCKETS_S,
)
requests_held = Gauge("llm_serve_requests_held", "Requests that wait for an engine.")
requests = Counter("llm_serve_requests", "Requests for the model by how they ended.", ["outcome"])
for _outcome in OUTCOMES:
    requests.labels(_outcome)

hold_seconds = Histogram(
    "llm_serve_hold_seconds", "How long requests waited at the gate that did wait.", buckets=_HOLD_BUCKETS_S
)
refusals = Counter("llm_serve_refusals", "Requests that the gate has answered with 503, by reason.", ["reason"])
for _reason in REFUSALS:
    refusals.labels(_reason)
slow_clients = Counter(
    "llm_serve_slow_clients",
    "Connections ended because a part of the request or of its answer took too long, or was too long.",
    ["part"],
)
for _part in ("headers", "body", "answer"):
    slow_clients.labels(_part)
connections_refused = Counter(
    "llm_serve_connections_refused", "Connections closed at once because there were too many, in all or of one address."
)


class SnapshotCollector:
    """Turns the supervisor's snapshot into gauges at the moment of a scrape."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """The families for one scrape."""
        now = self._snapshot()
        info = GaugeMetricFamily(
            "llm_serve_info", "What runs here; always 1.", labels=["version", "vllm_version", "model"]
        )
        info.add_metric([now.version, now.vllm_version, now.model], 1)
        yield info
        state = GaugeMetricFamily(
            "llm_serve_state", "1 for the state that the instance is in, 0 for others.", labels=["state"]
        )
        for each in State:
            state.add_metric([each.value], float(each.value == now.state))
        yield state
        yield _gauge("llm_serve_rung", "Steps below the plan that the file asks for.", now.rung)
        yield from _optional("llm_serve_plan_max_model_len", "Longest request in tokens.", now.max_model_len)
        yield from _optional("llm_serve_plan_max_num_seqs", "Most requests in one engine step.", now.max_num_seqs)
        yield from _optional(
            "llm_serve_seconds_since_engine_step",
            "Seconds since a step of the engine last got anywhere.",
            now.seconds_since_engine_step,
        )
        yield _gauge(
            "llm_serve_engine_stalled_seconds",
            "Seconds for which the engine has had work and no step got anywhere; 0 without work.",
            now.engine_stalled_s,
        )
        yield _gauge("llm_serve_requests_in_flight", "Requests that have come and not ended.", now.requests_in_flight)
        yield _gauge("llm_serve_max_queued", "Requests that may wait at the gate.", now.max_queued)
        yield _gauge("llm_serve_front_ends", "Processes that answer HTTP.", max(1, len(now.front_ends)))
        yield _gauge(
            "llm_serve_start_progress_ratio",
            "How far the engine's start has come; 1 when it serves.",
            now.progress,
        )
        yield _gauge("llm_serve_process_uptime_seconds", "Seconds since the daemon started.", now.uptime_s)
        yield from _of_gpus(now.gpus)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _optional(name: str, text: str, value: float | None) -> Iterable[GaugeMetricFamily]:
    """Absent, not zero, while it is not known."""
    return () if value is None else (_gauge(name, text, value),)


_GPU_LABELS = ("gpu", "uuid", "name")
_GPU_GAUGES: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
    ("llm_serve_gpu_temperature_celsius", "Temperature of the GPU.", lambda gpu: gpu.temperature_celsius),
    ("llm_serve_gpu_power_watts", "Power that the GPU draws.", lambda gpu: gpu.power_watts),
    ("llm_serve_gpu_power_limit_watts", "Power that it may draw.", lambda gpu: gpu.power_limit_watts),
    ("llm_serve_gpu_memory_used_bytes", "Memory in use, by whomever.", lambda gpu: gpu.memory_used_bytes),
    ("llm_serve_gpu_memory_total_bytes", "Memory that it has.", lambda gpu: gpu.memory_total_bytes),
    ("llm_serve_gpu_utilization_ratio", "Share of time in which a kernel ran.", lambda gpu: gpu.utilization_ratio),
)


def _of_gpus(gpus: Sequence[Reading]) -> Iterator[Metric]:
    """A family is there if one of the GPUs has such a sensor, with those that have."""
    labels = {gpu.index: (str(gpu.index), gpu.uuid, gpu.name) for gpu in gpus}
    families: list[Metric] = []
    for name, text, value_of in _GPU_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=_GPU_LABELS)
        for gpu in gpus:
            if (value := value_of(gpu)) is not None:
                gauge.add_metric(labels[gpu.index], value)
        families.append(gauge)
    throttle = GaugeMetricFamily(
        "llm_serve_gpu_throttle_reasons",
        "1 for what sets the clocks now, 0 for others.",
        labels=[*_GPU_LABELS, "reason"],
    )
    xids = CounterMetricFamily(
        "llm_serve_gpu_xid_errors", "NVIDIA's errors since the daemon started, by number.", labels=[*_GPU_LABELS, "xid"]
    )
    ecc = CounterMetricFamily(
        "llm_serve_gpu_ecc_errors", "Memory errors over the life of the GPU, by kind.", labels=[*_GPU_LABELS, "kind"]
    )
    for gpu in gpus:
        for reason in THROTTLE_REASONS if gpu.throttle_reasons is not None else ():
            throttle.add_metric([*labels[gpu.index], reason], float(reason in (gpu.throttle_reasons or ())))
        for xid, count in gpu.xids.items():
            xids.add_metric([*labels[gpu.index], xid], count)
        for kind, count in gpu.ecc_errors.items():
            ecc.add_metric([*labels[gpu.index], kind], count)
    yield from (family for family in (*families, throttle, xids, ecc) if family.samples)


_OF_THE_FIRST_TOKEN = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success")


class Continuous(Collector):
    """A registry in which vLLM's counters go on where the last engine's ended.

    Each engine starts them at zero, which Prometheus would take for a restart of the process and graph as a burst.
    A value that has become smaller is the sign of a new engine; `observe` is called at an engine's end too, so that
    what was counted after the last scrape is not lost.
    """

    def __init__(self, inner: prometheus_client.CollectorRegistry) -> None:
        self._inner = inner
        self._last: dict[Series, float] = {}
        self._before: dict[Series, float] = {}
        self._twice: dict[str, float] = {}

    def counted_before(self, family: str, amount: float) -> None:
        """So much of what this engine is about to count in `family`, the last one has counted already."""
        self._twice[family] = self._twice.get(family, 0.0) + amount

    def engine_starts(self) -> None:
        """An engine's first token is asked for by us, to see that it works: it is no client's request."""
        self._twice = dict.fromkeys(_OF_THE_FIRST_TOKEN, 1.0)

    def engine_ended(self) -> None:
        """Take note of all values as they are now, the last that this engine has counted."""
        self.observe()
        self._twice.clear()

    def collect(self) -> Iterator[Metric]:
        """The families of the inner registry, with vLLM's counters and histograms carried on."""
        for family in self._inner.collect():
            if family.name.startswith("vllm:") and family.type in {"counter", "histogram"}:
                self._note_new_engine(family)
                family.samples = [self._carried_on(sample) for sample in family.samples]
            yield family

    def observe(self) -> None:
        """Take note of all values as they are now."""
        for _ in self.collect():
            pass

    def _note_new_engine(self, family: Metric) -> None:
        """One value that is smaller than before means that all of the family began anew."""
        if any(sample.value < self._last.get(series_of(sample), 0.0) for sample in family.samples):
            for series in map(series_of, family.samples):
                self._before[series] = self._before.get(series, 0.0) + self._last.pop(series, 0.0)
        if self._twice.get(family.name):
            self._leave_out(family)
        self._last |= {series_of(sample): sample.value for sample in family.samples}

    def _leave_out(self, family: Metric) -> None:
        """Take what is counted twice out of what has been added since the last look; the sum never falls."""
        for sample in family.samples:
            series = series_of(sample)
            added = sample.value - self._last.get(series, 0.0)
            twice = min(added, self._twice[family.name]) if sample.name == f"{family.name}_total" else 0.0
            self._before[series] = self._before.get(series, 0.0) - twice
            self._twice[family.name] -= twice

    def _carried_on(self, sample: Sample) -> Sample:
        return sample._replace(value=sample.value + self._before.get(series_of(sample), 0.0))


def series_of(sample: Sample) -> Series:
    """What tells one value of a family from the others."""
    return sample.name, tuple(sorted(sample.labels.items()))


Series = tuple[str, tuple[tuple[str, str], ...]]
continuous = Continuous(prometheus_client.REGISTRY)


def render(registry: Collector = continuous) -> bytes:
    """Everything in the registry in Prometheus's text format."""
    return prometheus_client.generate_latest(registry)
