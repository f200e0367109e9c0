"""A real Prometheus with the shipped configuration, and its judgement of our metrics."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import Daemon, eventually, free_port
from tests.promql import PROMETHEUS, RULES, asked_of_a_daemon, rules, unanswered

pytestmark = [pytest.mark.vllm, pytest.mark.prometheus, pytest.mark.timeout(300)]


@pytest.fixture
def prometheus(shared: Daemon, tmp_path: Path) -> Iterator[httpx.Client]:
    """One with the shipped files, told of the daemon by `llm-serve targets`; it looks every second."""
    for file in RULES:
        (tmp_path / file.name).write_text(file.read_text())
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = ["targets*.json"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    targets = shared.llm_serve("targets", "--folder", str(shared.folder), "--output", str(tmp_path / "targets.json"))
    assert (0, "", "") == (targets.returncode, targets.stdout, targets.stderr)
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/db", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        try:
            yield client
        finally:
            server.terminate()


def test_prometheus_finds_and_scrapes_us(prometheus: httpx.Client) -> None:
    """The target is up under its name, our state and vLLM's own arrive, and the shipped rules are in order."""

    def value_of(query: str) -> list[str]:
        answer = prometheus.get("/api/v1/query", params={"query": query})
        return [] if answer.status_code != 200 else [one["value"][1] for one in answer.json()["data"]["result"]]

    def loaded() -> list[dict[str, Any]]:
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    eventually(
        lambda: value_of('up{job="llm-serve",instance="tiny"}'), lambda seen: seen == ["1"], within_s=30, what="up"
    )
    for query, value in (
        ('llm_serve_state{state="serving"}', "1"),
        ("vllm:num_requests_running", "0"),
        ("instance:llm_serve_serving:bool", "1"),
    ):
        eventually(lambda: value_of(query), lambda seen: seen == [value], within_s=15, what=query)  # noqa: B023 - called at once
    judged = eventually(loaded, lambda seen: all(rule["health"] == "ok" for rule in seen), within_s=15, what="rules")
    assert len(rules()) == len(judged)
    firing = {rule["name"] for rule in judged if rule["type"] == "alerting" and rule["state"] == "firing"}
    # Tests before this one may have filled the queue, and killed engines.
    assert firing <= {"LlmServeEngineRestarting", "LlmServeEngineFailsOften", "LlmServeSmallerPlan"}


def exported(daemon: Daemon) -> list[Metric]:
    """What it exports after a request."""
    daemon.chat(max_tokens=2)
    return list(text_string_to_metric_families(daemon.http.get("/metrics").text))


def test_a_daemon_exports_what_rules_and_dashboard_ask_for(shared: Daemon) -> None:
    """Each metric with the labels that are asked for; GPUs, which are not here, are asked of in tests/unit/test_alerts.py."""
    asked = [each for each in asked_of_a_daemon() if not each.metric.startswith("llm_serve_gpu_")]
    samples = [sample for family in exported(shared) for sample in family.samples]

    assert {"vllm:kv_cache_usage_perc", "llm_serve_rung"} < {each.metric for each in asked}
    assert [] == unanswered(asked, samples)


def test_every_metric_says_what_it_is(shared: Daemon) -> None:
    """vLLM's as well as ours have a type and a help text."""
    families = exported(shared)

    assert len(families) > 60
    assert [] == [each.name for each in families if not each.documentation.strip() or each.type == "unknown"]


def test_promtool_finds_nothing_wrong_with_our_metrics(shared: Daemon) -> None:
    """Names, units and help texts follow Prometheus's conventions."""
    shared.chat(max_tokens=1)
    lines = shared.http.get("/metrics").text.splitlines()
    ours = [line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("llm_serve_")]

    judged = subprocess.run(
        ["promtool", "check", "metrics"], input="\n".join(ours) + "\n", capture_output=True, text=True, check=False
    )

    assert len(ours) > 30
    assert (0, "", "") == (judged.returncode, judged.stdout, judged.stderr)


@pytest.mark.parametrize(
    "name",
    ["info", "state", "rung", "plan_max_model_len", "plan_max_num_seqs", "engine_starts_total", "requests_held",
     "requests_total", "start_progress_ratio", "recovery_seconds_bucket"],
)  # fmt: skip
def test_each_metric_of_the_contract_is_there(shared: Daemon, name: str) -> None:
    """Dashboards and alerts count on these names."""
    lines = shared.http.get("/metrics").text.splitlines()

    assert any(line.startswith((f"llm_serve_{name}{{", f"llm_serve_{name} ")) for line in lines)
