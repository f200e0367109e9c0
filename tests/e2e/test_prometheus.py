"""A real Prometheus, and its judgement of our metrics."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.daemon import Daemon, eventually, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.prometheus, pytest.mark.timeout(300)]


def test_prometheus_scrapes_us(shared: Daemon, tmp_path: Path) -> None:
    """The target is up, and our state arrives as a series."""
    config, port = tmp_path / "prometheus.yml", free_port()
    target = f"127.0.0.1:{shared.port}"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: llm-serve, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/db", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        try:

            def value_of(query: str) -> list[str]:
                answer = client.get("/api/v1/query", params={"query": query})
                return [] if answer.status_code != 200 else [one["value"][1] for one in answer.json()["data"]["result"]]

            eventually(lambda: value_of('up{job="llm-serve"}'), lambda seen: seen == ["1"], within_s=30, what="up")
            state = 'llm_serve_state{state="serving"}'
            eventually(lambda: value_of(state), lambda seen: seen == ["1"], within_s=10, what=state)
            eventually(lambda: value_of("vllm:num_requests_running"), lambda seen: seen == ["0"], within_s=10, what="vLLM's own")  # fmt: skip
        finally:
            server.terminate()


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
