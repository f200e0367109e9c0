"""The metrics as a scraper reads them."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from llm_serve import metrics
from llm_serve.core.evidence import Kind
from llm_serve.core.states import State
from llm_serve.core.status import FrontEndStatus, Snapshot
from llm_serve.core.telemetry import THROTTLE_REASONS, Reading

NOW = Snapshot(
    instance="a",
    model='the "model"\n\\ of é',
    state="starting",
    why="w",
    since=0.0,
    started=0.0,
    uptime_s=12.5,
    phase="loading weights",
    progress=0.4,
    version="1",
    vllm_version="0.32.0",
    pid=1,
    listen="127.0.0.1:8000",
    source="a.toml",
)
PREFIXES = ("llm_serve_", "vllm:", "python_", "process_", "http_")


@pytest.fixture
def _registered() -> Iterator[None]:
    collector = metrics.SnapshotCollector(lambda: NOW)
    REGISTRY.register(collector)
    yield
    REGISTRY.unregister(collector)


def scrape(now: Snapshot = NOW) -> dict[str, Metric]:
    """The families of one snapshot, by name."""
    registry = CollectorRegistry()
    registry.register(metrics.SnapshotCollector(lambda: now))
    return {each.name: each for each in text_string_to_metric_families(generate_latest(registry).decode())}


@pytest.mark.usefixtures("_registered")
def test_everything_that_is_rendered_is_well_formed() -> None:
    """Each family appears once, with a type, a help text that is a sentence, and a name of a known kind."""
    families = list(text_string_to_metric_families(metrics.render().decode()))

    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all(name.startswith(PREFIXES) for name in names)
    for family in families:
        assert family.type in {"counter", "gauge", "histogram", "summary"}
        assert family.documentation
    ours = [family for family in families if family.name.startswith("llm_serve_")]
    assert 10 <= len(ours)
    assert all(family.documentation.endswith(".") for family in ours)
    assert not any(sample.name.endswith("_created") for family in families for sample in family.samples)


@pytest.mark.usefixtures("_registered")
def test_every_outcome_is_there_from_the_start() -> None:
    """A rate over an outcome that has not happened yet is zero, not absent."""
    rendered = metrics.render().decode()

    for outcome in metrics.OUTCOMES:
        assert f'llm_serve_requests_total{{outcome="{outcome}"}}' in rendered


@pytest.mark.usefixtures("_registered")
def test_the_first_failure_of_a_kind_is_a_rise() -> None:
    """Prometheus sees no increase in a series that begins with 1."""
    rendered = metrics.render().decode()

    for kind in Kind:
        assert f'llm_serve_engine_failures_total{{kind="{kind}"}}' in rendered
    for reason in ("start", "reload", "step_up", *Kind):
        assert f'llm_serve_engine_starts_total{{reason="{reason}"}}' in rendered


def test_exactly_one_state_is_one() -> None:
    """Every state has a sample, and the current one is 1."""
    for state in State:
        family = scrape(dataclasses.replace(NOW, state=state.value))["llm_serve_state"]
        values = {sample.labels["state"]: sample.value for sample in family.samples}

        assert {each.value: float(each is state) for each in State} == values


def test_what_is_not_known_is_absent() -> None:
    """The plan's sizes are not there as zero before an engine has told them."""
    names = {"llm_serve_plan_max_model_len", "llm_serve_plan_max_num_seqs"}
    known = scrape(dataclasses.replace(NOW, max_model_len=2048, max_num_seqs=8))

    assert not names & set(scrape())
    assert [2048.0, 8.0] == [known[name].samples[0].value for name in sorted(names)]


def test_labels_survive_odd_characters() -> None:
    """A model's name with quotes, line breaks and letters of any script is read back as it is."""
    sample = scrape()["llm_serve_info"].samples[0]

    assert {"version": "1", "vllm_version": "0.32.0", "model": NOW.model} == sample.labels


def test_values_are_those_of_the_snapshot() -> None:
    """Progress, rung, uptime and what the gate and the watch see are passed on as they are."""
    place = FrontEndStatus(0, 1, 1, 0, 0, 0, 0)
    now = dataclasses.replace(
        NOW, rung=2, engine_stalled_s=3.5, requests_in_flight=7, max_queued=256, front_ends=(place, place)
    )

    values = {name: family.samples[0].value for name, family in scrape(now).items()}

    expected = {
        "start_progress_ratio": 0.4, "rung": 2.0, "process_uptime_seconds": 12.5, "engine_stalled_seconds": 3.5,
        "requests_in_flight": 7.0, "max_queued": 256.0, "front_ends": 2.0,
    }  # fmt: skip
    assert expected == {name: values[f"llm_serve_{name}"] for name in expected}
    assert 1.0 == scrape()["llm_serve_front_ends"].samples[0].value


def test_counters_of_an_engine_go_on_where_the_last_one_ended() -> None:
    """A new engine counts from zero; what is shown never becomes smaller, and gauges are left as they are."""
    inner = CollectorRegistry()
    shown = metrics.Continuous(inner)

    def engine(count: int, seconds: float, running: int) -> list[Counter | Gauge | Histogram]:
        counter = Counter("vllm:tokens", "t", ["model"], registry=inner)
        histogram = Histogram("vllm:latency", "l", buckets=(1,), registry=inner)
        gauge = Gauge("vllm:running", "r", registry=inner)
        counter.labels("m").inc(count)
        histogram.observe(seconds)
        gauge.set(running)
        return [counter, histogram, gauge]

    def values() -> dict[str, float]:
        return {sample.name: sample.value for family in shown.collect() for sample in family.samples}

    first = engine(100, 0.5, 7)
    before = values()
    for collector in first:
        inner.unregister(collector)
    engine(3, 0.25, 2)
    after = values()

    assert (100, 103) == (before["vllm:tokens_total"], after["vllm:tokens_total"])
    assert (0.75, 2) == (after["vllm:latency_sum"], after["vllm:latency_count"])
    assert 2 == after["vllm:running"]
    assert after == values()


def test_what_two_engines_count_is_counted_once() -> None:
    """A prompt that a second engine reads again is left out of the sum, which never falls; a third begins anew."""
    inner = CollectorRegistry()
    shown = metrics.Continuous(inner)

    def engine() -> Counter:
        return Counter("vllm:tokens", "t", ["model"], registry=inner)

    def total() -> float:
        return next(sample.value for each in shown.collect() for sample in each.samples)

    first = engine()
    first.labels("m").inc(100)
    assert 100 == total()
    shown.engine_ended()
    inner.unregister(first)
    second = engine()
    second.labels("m").inc(0)
    shown.counted_before("vllm:tokens", 30)
    seen = []
    for more in (0, 20, 20, 5):
        second.labels("m").inc(more)
        seen.append(total())
    assert [100, 100, 110, 115] == seen

    shown.counted_before("vllm:tokens", 50)
    shown.engine_ended()
    inner.unregister(second)
    engine().labels("m").inc(10)
    assert 125 == total()


def test_an_engine_s_own_first_token_is_not_counted() -> None:
    """One token read, one generated, one request that ended: ours, at each start, also of those that fail."""
    inner = CollectorRegistry()
    shown = metrics.Continuous(inner)
    counters = [Counter(f"vllm:{name}", "c", ["r"], registry=inner) for name in ("prompt_tokens", "request_success")]
    for _ in range(3):
        shown.engine_starts()

    for asked in (1, 4):
        for counter in counters:
            counter.labels("length").inc(asked)
        seen = {sample.value for each in shown.collect() for sample in each.samples if sample.name.endswith("_total")}
        assert {0.0 if asked == 1 else 4.0} == seen


# GPUs.
HOT = Reading(
    index=1, uuid="GPU-b", name="NVIDIA L4", temperature_celsius=91.0, power_watts=70.5, power_limit_watts=72.0,
    memory_used_bytes=5 << 30, memory_total_bytes=24 << 30, utilization_ratio=0.99,
    throttle_reasons=("sw_power_cap",), ecc_errors={"corrected": 2, "uncorrected": 0}, xids={"79": 1},
)  # fmt: skip
BARE = Reading(index=0, uuid="GPU-a", name="old")


def test_gpus_are_labelled() -> None:
    """One series for each GPU and sensor, and every reason for its clocks as 0 or 1."""
    families = scrape(dataclasses.replace(NOW, gpus=(HOT,)))

    labels = {"gpu": "1", "uuid": "GPU-b", "name": "NVIDIA L4"}
    seen = {
        name.removeprefix("llm_serve_gpu_"): family.samples[0].value
        for name, family in families.items()
        if name.startswith("llm_serve_gpu_") and len(family.samples) == 1
    }
    assert {
        "temperature_celsius": 91.0, "power_watts": 70.5, "power_limit_watts": 72.0, "memory_used_bytes": float(5 << 30),
        "memory_total_bytes": float(24 << 30), "utilization_ratio": 0.99, "xid_errors": 1.0,
    } == seen  # fmt: skip
    assert labels == families["llm_serve_gpu_temperature_celsius"].samples[0].labels
    throttle = {each.labels["reason"]: each.value for each in families["llm_serve_gpu_throttle_reasons"].samples}
    assert {name: float(name == "sw_power_cap") for name in THROTTLE_REASONS} == throttle
    ecc = {each.labels["kind"]: each.value for each in families["llm_serve_gpu_ecc_errors"].samples}
    assert {"corrected": 2.0, "uncorrected": 0.0} == ecc


def test_a_sensor_that_is_not_there_is_absent() -> None:
    """Not zero: a GPU without sensors has no series, and beside another it takes none of its away."""
    assert not [name for name in scrape(dataclasses.replace(NOW, gpus=(BARE,))) if name.startswith("llm_serve_gpu_")]
    both = scrape(dataclasses.replace(NOW, gpus=(BARE, HOT)))
    assert ["1"] == [each.labels["gpu"] for each in both["llm_serve_gpu_temperature_celsius"].samples]


@pytest.mark.prometheus
def test_promtool_finds_nothing_wrong_with_gpus() -> None:
    """Names, units and help texts follow Prometheus's conventions."""
    registry = CollectorRegistry()
    registry.register(metrics.SnapshotCollector(lambda: dataclasses.replace(NOW, gpus=(BARE, HOT))))

    judged = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )

    assert (0, b"", b"") == (judged.returncode, judged.stdout, judged.stderr)
