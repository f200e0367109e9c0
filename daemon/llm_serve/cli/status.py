"""`status`: asks running instances, over their control sockets, how they are."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from llm_serve.cli import control

_COLUMNS = ("instance", "state", "for", "starts", "in flight", "held", "model")


def status(name: str | None, json_output: bool) -> int:
    """Print one instance whole, or a line for each. Returns 0, or 75 when there is nobody to ask."""
    sockets = {name: found} if name and (found := control.find(name)) else {} if name else control.find_all()
    asked = {each: control.ask(path, "/status") for each, path in sorted(sockets.items())}
    answers = {each: answer for each, answer in asked.items() if answer is not None}
    if not answers:
        who = f"{name} does" if name else "no instance does"
        print(f"llm-serve: {who} not run here, or not for this user.", file=sys.stderr)
        return 75
    if json_output:
        print(json.dumps(answers[name] if name else list(answers.values()), indent=2))
    elif name:
        _print_one(answers[name])
    else:
        _print_table(list(answers.values()))
    return 0


def _print_one(now: dict[str, Any]) -> None:
    print(f"{now['instance']}: {now['state']} for {_age(now['since'])}: {now['why']}")
    rows = {
        "model": now["model"],
        "listens on": now["listen"],
        "engine": f"start {now['engine_starts']}, rung {now['rung']}, "
        f"vLLM {now['vllm_version']}, pids {now['engine_pids']}",
        "plan": f"max_model_len {now['max_model_len']}, max_num_seqs {now['max_num_seqs']}",
        "requests": f"{now['requests_in_flight']} in flight, {now['requests_held']} held",
        "start": f"{now['phase']} ({now['progress']:.0%})",
        "last failure": now["last_failure"] or "none",
        "daemon": f"pid {now['pid']}, {now['memory_bytes'] >> 20} MiB, up {_age(now['started'])}",
        "admission": "stopped by hand" if now["is_drained"] else now["too_hot"] or "open",
        "last reload": f"failed: {now['reload_failed']}" if now["reload_failed"] else "none failed",
        "file": now["source"],
    }
    for label, value in rows.items():
        print(f"  {label:13} {value}")
    for gpu in now.get("gpus", ()):
        print(f"  {'GPU ' + str(gpu['index']):13} {_gpu(gpu)}")
        for each in gpu["processes"]:
            print(f"  {'':13} {each['name']} (pid {each['pid']}): {each['used_bytes'] / 2**30:.1f} GiB")
    for number, reason in enumerate(now["steps"], 1):
        print(f"  step {number:<8} {reason}")
    for each in now["failures"]:
        failure = each["failure"]
        print(f"  {_age(each['time'])} ago: {failure['kind']}: {failure['detail']}")


def _gpu(gpu: dict[str, Any]) -> str:
    """One line; what the device does not tell is left out."""
    power, limit = gpu["power_watts"], gpu["power_limit_watts"]
    used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
    said = {
        f"{gpu['temperature_celsius'] or 0:.0f} °C": gpu["temperature_celsius"] is not None,
        f"{power or 0:.0f} W" + (f" of {limit:.0f}" if limit else ""): power is not None,
        f"{(used or 0) / 2**30:.1f} of {(total or 0) / 2**30:.1f} GiB": used is not None,
        f"{gpu['utilization_ratio'] or 0:.0%} busy": gpu["utilization_ratio"] is not None,
        "slowed down by: " + ", ".join(gpu["slowed_by"]): bool(gpu["slowed_by"]),
        "Xids: " + ", ".join(f"{xid} ({count}x)" for xid, count in gpu["xids"].items()): bool(gpu["xids"]),
    }
    return ", ".join([gpu["name"], *(words for words, is_known in said.items() if is_known)])


def _print_table(all_of_them: list[dict[str, Any]]) -> None:
    rows = [_COLUMNS, *map(_row, all_of_them)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(now: dict[str, Any]) -> tuple[str, ...]:
    counts = (now["engine_starts"], now["requests_in_flight"], now["requests_held"])
    return (now["instance"], now["state"], _age(now["since"]), *map(str, counts), now["model"])


def _age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
