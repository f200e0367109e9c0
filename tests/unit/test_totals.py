"""The metrics of several front ends as those of one instance."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llm_serve.front_ends.totals import Totals, of_this_process


class Process:
    """One front end's registry, with what vLLM and we count there."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("llm_serve_requests", "Requests.", ["outcome"], registry=self.registry)
        self.took = Histogram("vllm:ttft", "Time.", buckets=(1, 2), registry=self.registry)
        self.running = Gauge("vllm:running", "Running.", ["engine"], registry=self.registry)
        self.info = Gauge("vllm:cache_config_info", "Fixed.", ["blocks"], registry=self.registry)
        self.held = Gauge("llm_serve_requests_held", "Held.", registry=self.registry)
        self.rung = Gauge("llm_serve_rung", "Only the supervisor knows.", registry=self.registry)
        self.foreign = Counter("python_gc", "One process's own affair.", registry=self.registry)


def shown(totals: Totals) -> dict[str, float]:
    """Each line of a scrape."""
    lines = generate_latest(totals).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_counters_and_histograms_are_added_up_and_gauges_are_whole() -> None:
    """vLLM's gauges are those of whom the engine has told last, and the supervisor's stay its own."""
    first, second = Process(), Process()
    newest = [0]
    totals = Totals(first.registry, lambda: newest[0])
    first.requests.labels("completed").inc(3)
    second.requests.labels("completed").inc(4)
    second.requests.labels("aborted").inc()
    first.took.observe(0.5)
    second.took.observe(1.5)
    for process, running, held in ((first, 7, 1), (second, 9, 2)):
        process.running.labels("0").set(running)
        process.held.set(held)
        process.rung.set(running)
        process.foreign.inc()
    first.info.labels("100").set(1)
    second.info.labels("None").set(1)
    totals.report(1, of_this_process(second.registry))

    seen = shown(totals)
    newest[0] = 1
    later = shown(totals)

    assert (7, 1) == (
        seen['llm_serve_requests_total{outcome="completed"}'],
        seen['llm_serve_requests_total{outcome="aborted"}'],
    )
    assert (1, 2, 2, 2.0) == tuple(
        seen[f"vllm:ttft_{each}"] for each in ('bucket{le="1.0"}', 'bucket{le="2.0"}', "count", "sum")
    )
    assert (7, 9) == (seen['vllm:running{engine="0"}'], later['vllm:running{engine="0"}'])
    assert (3, 7, 1) == (seen["llm_serve_requests_held"], seen["llm_serve_rung"], seen["python_gc_total"])
    assert ['vllm:cache_config_info{blocks="100"}'] == [name for name in later if "cache_config" in name]


def test_no_count_falls_when_a_front_end_is_replaced() -> None:
    """What the dead one has reported last stays, however often one dies."""
    first = Process()
    totals = Totals(first.registry, lambda: 0)
    name = 'llm_serve_requests_total{outcome="completed"}'
    seen = []
    for _ in range(3):
        one = Process()
        one.requests.labels("completed").inc(5)
        one.took.observe(0.5)
        one.held.set(2)
        totals.report(2, of_this_process(one.registry))
        seen.append(shown(totals)[name])
        totals.ended(2)
        seen.append(shown(totals)[name])
    totals.ended(3)

    assert [5, 5, 10, 10, 15, 15] == seen
    last = shown(totals)
    assert (3, 0) == (last["vllm:ttft_count"], last["llm_serve_requests_held"])


def test_a_scrape_changes_nothing() -> None:
    """The reports are added to what is there, not into it."""
    first, second = Process(), Process()
    second.requests.labels("completed").inc()
    totals = Totals(first.registry, lambda: 1)
    totals.report(1, of_this_process(second.registry))

    assert shown(totals) == shown(totals) == shown(totals)
