"""`status`: asks running instances, over their control sockets, how they are."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llm_serve.cli import control
from llm_serve.cli.reports import OF_ALL_TIMEOUT_S, Watch, names, twice, with_units
from llm_serve.core.errors import ConfigError
from llm_serve.core.report import Report
from llm_serve.core.terminal import words
from llm_serve.core.terminal.cells import plain
from llm_serve.core.terminal.overview import overview
from llm_serve.core.vitals import Vitals
from llm_serve.host.names import instance_path

RATES_FROM_S = 0.5
"""How far apart the two looks are that rates are told from."""


def status(target: str | None, json_output: bool) -> int:
    """Print one instance whole, or a line for each.

    Returns 0, 75 when there is nobody to ask, 78 for what names no instance.
    """
    if target is None:
        return _all(json_output)
    try:
        name = instance_path(target).stem
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    (report,) = twice([Watch(name)], RATES_FROM_S)
    if report.status is None:
        (report,) = (each for each in with_units([report]) if each.instance == name)
        print(f"llm-serve: {name} {_absence(report)}", file=sys.stderr)
        return control.TRY_AGAIN
    if json_output:
        print(json.dumps(report.to_json(), indent=2))
    else:
        for line in _whole(report, time.time()):
            print(line)
    return 0


def _all(json_output: bool) -> int:
    reports = with_units(twice([Watch(name, OF_ALL_TIMEOUT_S) for name in names()], RATES_FROM_S))
    if not reports:
        print("llm-serve: no instance runs or is configured here, or not for this user.", file=sys.stderr)
        return control.TRY_AGAIN
    if json_output:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(*overview(reports, time.time(), width), sep="\n")
    return 0


def _absence(report: Report) -> str:
    """Why there is nothing to show of it, for `NAME ...`."""
    if report.why.endswith("."):
        return report.why
    return f"does not run: {plain(report.why)}. `systemctl status llm-serve@{report.instance}` shows more."


def _whole(report: Report, now: float) -> Iterator[str]:
    """All of one instance; what others have written, models' names and errors, stays on its line."""
    status, vitals = report.status or {}, report.vitals or Vitals()
    yield plain(f"{report.instance}: {report.state} for {words.age(now - status['since'])}: {report.why}")
    for label, value in _rows(status, vitals, now):
        yield f"  {label:13} {plain(str(value))}"
    for gpu in status["gpus"]:
        yield f"  {'GPU ' + str(gpu['index']):13} {plain(_gpu(gpu))}"
        for each in gpu["processes"]:
            yield f"  {'':13} {plain(each['name'])} (pid {each['pid']}): {each['used_bytes'] / 2**30:.1f} GiB"
    for number, reason in enumerate(status["steps"], 1):
        yield f"  step {number:<8} {plain(reason)}"
    for each in status["failures"]:
        failure = each["failure"]
        yield "  " + plain(f"{words.age(now - each['time'])} ago: {failure['kind']}: {failure['detail']}")


def _rows(status: Mapping[str, Any], vitals: Vitals, now: float) -> Iterator[tuple[str, object]]:
    yield "model", status["model"]
    yield "listens on", status["listen"]
    engine = f"start {status['engine_starts']}, rung {status['rung']}, vLLM {status['vllm_version']}"
    yield "engine", f"{engine}, pids {status['engine_pids']}"
    if status.get("weight_pids"):
        yield "weights", f"stay in GPU memory between engines, pids {status['weight_pids']}"
    yield "plan", f"max_model_len {status['max_model_len']}, max_num_seqs {status['max_num_seqs']}"
    yield "requests", f"{status['requests_in_flight']} in flight, {status['requests_held']} held"
    yield from _load(vitals)
    yield "start", f"{status['phase']} ({status['progress']:.0%})"
    yield "last failure", status["last_failure"] or "none"
    yield "daemon", f"pid {status['pid']}, {status['memory_bytes'] >> 20} MiB, up {words.age(now - status['started'])}"
    yield "admission", "stopped by hand" if status["is_drained"] else status["too_hot"] or "open"
    yield "network", f"of the engine's processes: {status['engine_network']}"
    yield "last reload", f"failed: {status['reload_failed']}" if status["reload_failed"] else "none failed"
    yield "file", status["source"]


def _load(vitals: Vitals) -> Iterator[tuple[str, object]]:
    """What the engine tells; nothing before there has been one."""
    if vitals.running is None:
        return
    yield "batch", f"{words.whole(vitals.running)} running, {words.whole(vitals.waiting)} waiting in the engine"
    cache = f"{words.share(vitals.kv_cache_usage)} full, {words.whole(vitals.preemptions)} preemptions"
    yield "KV cache", f"{cache}, prefix cache: {words.share(vitals.prefix_cache_hits)} of prompt tokens found"
    if vitals.generated_per_s is not None:
        speed = (
            f"{words.number(vitals.generated_per_s)} generated and {words.number(vitals.prompt_per_s)} prompt tokens/s"
        )
        yield "speed", speed
    if vitals.limit is not None:
        evidence = "; ".join(vitals.limit.evidence)
        yield "limit", f"{vitals.limit.limit.value}: {evidence}. {vitals.limit.advice}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    """One line; what the device does not tell is left out."""
    power, limit = gpu["power_watts"], gpu["power_limit_watts"]
    used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
    said = {
        f"{gpu['temperature_celsius'] or 0:.0f} °C": gpu["temperature_celsius"] is not None,
        f"{power or 0:.0f} W" + (f" of {limit:.0f}" if limit else ""): power is not None,
        words.gib(used, total): used is not None,
        f"{gpu['utilization_ratio'] or 0:.0%} busy": gpu["utilization_ratio"] is not None,
        "slowed down by: " + ", ".join(gpu["slowed_by"]): bool(gpu["slowed_by"]),
        "Xids: " + ", ".join(f"{xid} ({count}x)" for xid, count in gpu["xids"].items()): bool(gpu["xids"]),
    }
    return ", ".join([gpu["name"], *(text for text, is_known in said.items() if is_known)])
