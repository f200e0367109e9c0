"""The shipped rules: each alert fires when it should and not a little before, and says what to do in words that work."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from llm_serve import metrics
from llm_serve.cli.main import app
from llm_serve.core.states import State
from llm_serve.core.status import Snapshot
from llm_serve.core.telemetry import Reading
from tests.promql import PROMETHEUS, RULES, Selector, alerts, asked_of_a_daemon, records, selectors, unanswered

HERE = {"job": "llm-serve", "host": "gpu1", "instance": "qwen7b"}
GPU = {**HERE, "gpu": "0", "uuid": "GPU-a", "name": "NVIDIA L4"}
ENGINE = {**HERE, "model_name": "m", "engine": "0"}
WHERE = "qwen7b on gpu1"
CARD = "GPU 0 (NVIDIA L4) on gpu1"


def series(metric: str, labels: Mapping[str, str], **more: str) -> str:
    """A series in promtool's notation."""
    words = ",".join(f'{name}="{value}"' for name, value in {**labels, **more}.items())
    return f"{metric}{{{words}}}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One alert: series by minutes that make it fire from minute `at` on, and others that nearly do.

    `labels` are those that it has besides its severity, `summary` what is read first.
    """

    alert: str
    at: int
    fires: Mapping[str, str]
    quiet: Mapping[str, str]
    labels: Mapping[str, str]
    summary: str


def one(  # noqa: PLR0917 - a row of a table
    alert: str, at: int, what: str, fires: str, quiet: str, summary: str, **labels: str
) -> Case:
    """A case of one series, whose labels the alert has, but for those in `labels`."""
    own = dict(re.findall(r'(\w+)="([^"]*)"', what)) | labels
    return Case(alert, at, {what: fires}, {what: quiet}, {name: value for name, value in own.items() if value}, summary)


STARTING, RECOVERING = (series("llm_serve_state", HERE, state=state) for state in ("starting", "recovering"))
RECOVERIES = series("llm_serve_recovery_seconds_count", HERE)
SHORT_ONES, ALL_OF_THEM = (series("llm_serve_recovery_seconds_bucket", HERE, le=le) for le in ("120.0", "+Inf"))
HELD, CAP = series("llm_serve_requests_held", HERE), series("llm_serve_max_queued", HERE)
KV, PREEMPTIONS = series("vllm:kv_cache_usage_perc", ENGINE), series("vllm:num_preemptions_total", ENGINE)
XID = series("llm_serve_gpu_xid_errors_total", GPU, xid="79")
CASES = [
    one("LlmServeInstanceDown", 8, series("up", HERE), "1x5 0x9", "1x6 0 1x9",
        f"{WHERE} does not answer Prometheus"),
    Case("LlmServeNoInstances", 10, {series("up", {"job": "node"}): "1x20"}, {series("up", HERE): "0x20"},
         {"job": "llm-serve"}, "Prometheus knows of no instance of llm-serve"),
    one("LlmServeDaemonRestarting", 22, series("process_start_time_seconds", HERE), "1x10 2x10 3x40", "1x10 2x50",
        f"{WHERE}: the daemon was started 2 times in two hours"),
    Case("LlmServeNotServing", 18, {STARTING: "0x2 1x5 0x20", RECOVERING: "0x8 1x20"},
         {STARTING: "0x2 1x5 0x20", RECOVERING: "0x9 1x20"}, HERE, f"{WHERE} has not served for 15 minutes"),
    one("LlmServeAdmissionStopped", 34, series("llm_serve_state", HERE, state="drained"), "0x3 1x40", "0x10 1x40",
        f"{WHERE} lets no request in", state=""),
    one("LlmServeEngineRestarting", 10, series("llm_serve_engine_failures_total", HERE, kind="killed"), "0x9 1x9", "4x20",
        f"{WHERE}: an engine failed (killed)"),
    one("LlmServeEngineFailsOften", 44, series("llm_serve_engine_failures_total", HERE, kind="crashed"),
        "0x10 1x10 2x10 3x10 4x20", "0x10 1x10 2x10 3x40", f"{WHERE}: 4 engines failed in an hour", kind=""),
    one("LlmServeSmallerPlan", 9, series("llm_serve_rung", HERE), "0x3 1x10", "0x3 1x2 0x10",
        f"{WHERE} runs 1 step(s) below what its file asks for"),
    one("LlmServeEngineStalled", 2, series("llm_serve_engine_stalled_seconds", HERE), "0 15 75", "0 0 60",
        f"{WHERE}: no engine step for 75 s"),
    Case("LlmServeRecoverySlow", 10, {RECOVERIES: "0x9 1x99", SHORT_ONES: "0x200", ALL_OF_THEM: "0x9 1x99"},
         {RECOVERIES: "1x9 2x99", SHORT_ONES: "0x9 1x99", ALL_OF_THEM: "1x9 2x99"}, HERE, f"{WHERE}: a recovery took longer than 2 minutes"),
    Case("LlmServeQueueNearCap", 6, {HELD: "0x3 205x10", CAP: "250x20"}, {HELD: "0x3 200x10", CAP: "250x20"}, HERE,
         f"{WHERE}: the queue is 82% full"),
    one("LlmServeRefusing", 6, series("llm_serve_refusals_total", HERE, reason="full"), "0+5x20", "5x20",
        f"{WHERE} refuses requests (full)"),
    Case("LlmServeKvCacheFull", 6, {KV: "0.97x20", PREEMPTIONS: "0+3x20"}, {KV: "0.97x20", PREEMPTIONS: "3x20"},
         ENGINE, f"{WHERE}: the KV cache is full, and requests are computed again"),
    one("LlmServeGpuHot", 9, series("llm_serve_gpu_temperature_celsius", GPU), "60x3 91x10", "60x3 87x10",
        f"{CARD} has 91 °C"),
    one("LlmServeGpuThrottled", 9, series("llm_serve_gpu_throttle_reasons", GPU, reason="hw_thermal_slowdown"),
        "_x4 1x20", "0 1 0 1 0 1 0 1 0 1 0 1", f"{CARD} is slowed down: hw_thermal_slowdown"),
    one("LlmServeGpuXid", 18, XID, "_x18 1x9", "1x30", f"{CARD}: Xid 79"),
    one("LlmServeGpuEccErrors", 10, series("llm_serve_gpu_ecc_errors_total", GPU, kind="uncorrected"), "7x9 8x9", "7x30",
        f"{CARD}: memory errors that ECC could not correct"),
]  # fmt: skip
ALSO = [
    Case("LlmServeGpuXid", 21, {XID: "1x20 2x20"}, {XID: "1x40"}, {**GPU, "xid": "79"}, f"{CARD}: Xid 79"),
    Case("LlmServeKvCacheFull", 6, {KV: "0.97x20", PREEMPTIONS: "0+3x20"}, {KV: "0.8x20", PREEMPTIONS: "0+3x20"},
         ENGINE, f"{WHERE}: the KV cache is full, and requests are computed again"),
    one("LlmServeRefusing", 6, series("llm_serve_refusals_total", HERE, reason="late"), "0+1x20", "0x20",
        f"{WHERE} refuses requests (late)"),
]  # fmt: skip
"""What counts in a second way."""
NEVER = {
    "LlmServeInstanceDown": series("up", {"job": "node"}) + " 0x40",
    "LlmServeDaemonRestarting": series("process_start_time_seconds", {"job": "node"}) + " 1+1x40",
    "LlmServeAdmissionStopped": series("llm_serve_state", HERE, state="serving") + " 1x40",
    "LlmServeGpuThrottled": series("llm_serve_gpu_throttle_reasons", GPU, reason="sw_power_cap") + " 1x40",
    "LlmServeGpuEccErrors": series("llm_serve_gpu_ecc_errors_total", GPU, kind="corrected") + " 0+9x40",
    "LlmServeRefusing": series("llm_serve_refusals_total", HERE, reason="stopping") + " 0+9x40",
    "LlmServeNotServing": series("llm_serve_state", HERE, state="serving") + " 1x40",
    "LlmServeQueueNearCap": series("llm_serve_requests_held", HERE) + " 9x40",
}
"""Usual things that look like trouble."""


def firing(case: Case) -> dict[str, Any]:
    """The alert as it reaches a person: its labels, and its texts with everything filled in."""
    rule = alerts()[case.alert]
    said = {name: _rendered(text, case.labels) for name, text in rule["annotations"].items() if name != "summary"}
    return {
        "exp_labels": {**case.labels, **rule["labels"]},
        "exp_annotations": {"summary": case.summary, **said},
    }


def _rendered(text: str, labels: Mapping[str, str]) -> str:
    """`{{ $labels.x }}` filled in; a label that the alert does not have is a mistake in the text."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)


def group(
    name: str, values: Mapping[str, str], alert: str, expected: Mapping[int, list[dict[str, Any]]]
) -> dict[str, Any]:
    """One test in promtool's form; `expected` by minute."""
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": each, "values": given} for each, given in values.items()],
        "alert_rule_test": [
            {"eval_time": f"{at}m", "alertname": alert, "exp_alerts": exactly} for at, exactly in expected.items()
        ],
    }


def promtool(folder: Path, tests: list[dict[str, Any]]) -> tuple[int, str]:
    """The exit status and the words of `promtool test rules`."""
    order = [group["name"] for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    whole = {
        "rule_files": list(map(str, RULES)),
        "evaluation_interval": "1m",
        "group_eval_order": order,
        "tests": tests,
    }
    (folder / "tests.yml").write_text(yaml.safe_dump(whole))
    command = ["promtool", "test", "rules", str(folder / "tests.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_alert_has_its_case() -> None:
    """A rule that nobody has seen firing is a hope."""
    assert list(alerts()) == [case.alert for case in CASES]
    assert set(alerts()) >= set(NEVER)


@pytest.mark.prometheus
def test_alerts_fire_and_do_not(tmp_path: Path) -> None:
    """With their labels and texts; and none a little below its threshold, or a minute before its time."""
    tests = [
        each
        for case in [*CASES, *ALSO]
        for each in (
            group(f"{case.alert} fires", case.fires, case.alert, {case.at - 1: [], case.at: [firing(case)]}),
            group(f"{case.alert} does not", case.quiet, case.alert, {case.at: []}),
        )
    ]
    tests += [
        group(f"{alert} is not for this", dict([usual.rsplit(" ", 1)]), alert, {40: []})
        for alert, usual in NEVER.items()
    ]

    status, said = promtool(tmp_path, tests)

    assert 0 == status, said


@pytest.mark.prometheus
@pytest.mark.parametrize("side", ["fires", "quiet"])
def test_promtool_tells_when_an_alert_is_wrong(tmp_path: Path, side: str) -> None:
    """A case whose series and expectation are exchanged fails, in both directions."""
    case = CASES[0]
    expected = [] if side == "fires" else [firing(case)]

    status, said = promtool(tmp_path, [group("exchanged", getattr(case, side), case.alert, {case.at: expected})])

    assert (1, True) == (status, "name: exchanged" in said), said


RECORDED: Mapping[str, tuple[Mapping[str, str], float]] = {
    "instance:llm_serve_serving:bool": (
        {series("llm_serve_state", HERE, state="serving"): "1x20", series("llm_serve_state", HERE, state="failed"): "0x20"}, 1),
    "instance:llm_serve_queue:ratio": ({HELD: "64x20", CAP: "256x20"}, 0.25),
    "instance:llm_serve_requests:rate5m": (
        {series("llm_serve_requests_total", HERE, outcome=name): "0+60x20" for name in ("completed", "rejected")}, 2),
    "instance:llm_serve_requests_failed:ratio_rate5m": (
        {series("llm_serve_requests_total", HERE, outcome=name): "0+60x20"
         for name in ("completed", "rejected", "resumed", "poisoned")}, 0.5),
    "instance:vllm_generation_tokens:rate5m": ({series("vllm:generation_tokens_total", ENGINE): "0+600x20"}, 10),
    "instance:vllm_prompt_tokens:rate5m": ({series("vllm:prompt_tokens_total", ENGINE): "0+120x20"}, 2),
    **{
        f"instance:vllm_{name}:p99_5m": (
            {series(f"vllm:{name}_bucket", ENGINE, le=le): f"0+{count}x20" for le, count in (("0.5", 0), ("1.0", 100), ("+Inf", 100))},
            0.995)
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
    },
}  # fmt: skip
"""Series that go in, and the value that comes out at minute 10."""


@pytest.mark.prometheus
def test_recorded_values_are_right(tmp_path: Path) -> None:
    """Every recording rule, with a value that can be worked out by hand."""
    assert records().keys() == RECORDED.keys()
    tests = [
        {
            "name": record,
            "interval": "1m",
            "input_series": [{"series": each, "values": given} for each, given in values.items()],
            "promql_expr_test": [
                {"expr": record, "eval_time": "10m", "exp_samples": [{"labels": series(record, HERE), "value": value}]}
            ],
        }
        for record, (values, value) in RECORDED.items()
    ]

    status, said = promtool(tmp_path, tests)

    assert 0 == status, said


@pytest.mark.prometheus
@pytest.mark.parametrize("with_key", [False, True])
def test_promtool_takes_the_configuration(tmp_path: Path, with_key: bool) -> None:
    """As it is shipped, and with the lines about a key switched on."""
    for file in PROMETHEUS.glob("*.yml"):
        (tmp_path / file.name).write_text(file.read_text())
    config = tmp_path / "prometheus.yml"
    if with_key:
        config.write_text(re.sub(r"# (authorization:|  credentials_file:)", r"\1", config.read_text()))
        (tmp_path / "llm-serve.key").write_text("first-key-0001")
        assert yaml.safe_load(config.read_text())["scrape_configs"][0]["authorization"]

    command = ["promtool", "check", "config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert f"SUCCESS: {len(alerts())} rules found" in done.stdout
    assert f"SUCCESS: {len(records())} rules found" in done.stdout


# What a person reads.
SEVERITIES = {"critical", "warning", "info"}
PROGRAMS = ("llm-serve", "systemctl", "journalctl", "nvidia-smi")
FIELDS = {"STATE"}
VERBS = {"status", "start", "stop", "restart", "reload", "reset-failed"}
UNITS = {path.name for path in (PROMETHEUS.parents[1] / "systemd").glob("llm-serve*")}
QUERIES = {"TEMPERATURE", "PERFORMANCE", "POWER", "ECC", "ROW_REMAPPER", "PAGE_RETIREMENT"}


def commands(alert: str) -> list[list[str]]:
    """The lines of a runbook that are to be typed, for an instance called demo."""
    labels = dict.fromkeys(("instance", "host", "kind", "reason", "xid", "name"), "demo") | {
        "gpu": "0",
        "state": "starting",
    }
    lines = _rendered(alerts()[alert]["annotations"]["runbook"], labels).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(PROGRAMS)]


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_says_what_to_do(alert: str) -> None:
    """Severity, what is wrong, what it means, and commands; only labels are filled in, in all but the summary."""
    rule = alerts()[alert]

    assert rule["labels"]["severity"] in SEVERITIES
    assert {"summary", "description", "runbook"} == set(rule["annotations"])
    assert commands(alert)
    assert "$value" not in rule["annotations"]["description"] + rule["annotations"]["runbook"]


@pytest.mark.parametrize("alert", alerts())
def test_the_commands_of_a_runbook_exist(alert: str) -> None:
    """As their own parsers see it where these are ours, and as names that are known where they are not."""
    for program, *words in commands(alert):
        match program:
            case "llm-serve":
                _parse(words)
            case "systemctl":
                verb, unit = words
                assert verb in VERBS
                assert re.sub(r"@\w+$", "@.service", unit) in UNITS
            case "journalctl":
                options = [word for word in words if word.startswith("-")]
                assert set(options) <= {"-u", "-k", "-n", "-p", "-g"}
                assert {word.split("=")[0] for word in words if "=" in word} <= FIELDS
                assert all(word.split("=")[1] in set(State) for word in words if "=" in word)
            case "nvidia-smi":
                asked = words[words.index("-d") + 1].split(",") if "-d" in words else []
                assert set(asked) <= QUERIES
                assert ["-i", "0"] == words[words.index("-i") :][:2]


USAGE_ERROR = typer.BadParameter.__mro__[1]
"""click's, of which typer may bring its own copy."""


def _parse(words: list[str]) -> None:
    """Let the command line of llm-serve read these words, without doing what they say."""
    group: Any = typer.main.get_command(app)
    name, *rest = words
    assert name in group.commands, words
    group.commands[name].make_context(name, rest)


def test_a_command_that_is_none_is_noticed() -> None:
    """Or the test above would pass on anything."""
    for words in (["statsu", "demo"], ["status", "demo", "--colour"], ["reset"]):
        with pytest.raises((AssertionError, USAGE_ERROR)):
            _parse(words)


# What is asked for is there.
NOW = Snapshot(
    instance="qwen7b", model="m", state="serving", why="w", since=0.0, started=0.0, uptime_s=1.0, phase="serving",
    progress=1.0, version="1", vllm_version="0.32.0", pid=1, listen="127.0.0.1:8000", source="x", max_model_len=1,
    max_num_seqs=1, seconds_since_engine_step=0.0,
    gpus=(
        Reading(
            index=0, uuid="GPU-a", name="NVIDIA L4", temperature_celsius=50.0, power_watts=70.5, power_limit_watts=72.0,
            memory_used_bytes=1, memory_total_bytes=2, utilization_ratio=0.5, throttle_reasons=(),
            ecc_errors={"corrected": 0, "uncorrected": 0}, xids={"79": 1},
        ),
    ),
)  # fmt: skip


def exported() -> list[Sample]:
    """All of ours, from a machine with a GPU that has every sensor: a hand-made reading, since there is none here."""
    registry = CollectorRegistry()
    registry.register(metrics.SnapshotCollector(lambda: NOW))
    texts = (metrics.render(registry), metrics.render(REGISTRY))
    return [
        sample for text in texts for each in text_string_to_metric_families(text.decode()) for sample in each.samples
    ]


def test_everything_of_ours_that_is_asked_for_is_exported() -> None:
    """Names, and the values of labels; what vLLM exports is asked of a real daemon, in tests/e2e."""
    asked = [each for each in asked_of_a_daemon() if not each.metric.startswith("vllm:")]

    assert len(asked) > 40
    assert [] == unanswered(asked, exported())


@pytest.mark.parametrize(
    "expression",
    ["llm_serve_rungs", 'llm_serve_state{state="awake"}', 'llm_serve_refusals_total{reason=~"fall|lite"}',
     'rate(llm_serve_recovery_seconds_bucket{le="121.0"}[5m])', 'llm_serve_gpu_ecc_errors_total{sort="uncorrected"}'],
)  # fmt: skip
def test_what_nobody_exports_is_noticed(expression: str) -> None:
    """A name, or the value of a label, that is wrong by one letter."""
    asked = list(selectors(expression))

    assert asked == unanswered(asked, exported())


def test_a_selector_is_read_whole() -> None:
    """Also in ranges, below functions, and on both sides."""
    found = list(selectors('sum(rate(a{x!="1",job="j"}[5m])) / on (y) b offset 5m or absent(c{z!~"q|r"})'))

    assert [
        Selector("a", (("x", "!=", "1"), ("job", "=", "j"))),
        Selector("b", ()),
        Selector("c", (("z", "!~", "q|r"),)),
    ] == [Selector(each.metric, tuple(sorted(each.conditions, reverse=True))) for each in found]
    assert found[0].matches(Sample("a", {"x": "2"}, 0))
    assert not found[0].matches(Sample("a", {"x": "1"}, 0))
    assert not found[2].matches(Sample("c", {"z": "r"}, 0))
