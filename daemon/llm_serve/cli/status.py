"""`status`: asks running instances, over their control sockets, how they are."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

_TIMEOUT_S = 5.0
_COLUMNS = ("instance", "state", "for", "starts", "in flight", "held", "model")


def status(name: str | None, json_output: bool) -> int:
    """Print one instance whole, or a line for each. Returns 0, or 75 when there is nobody to ask."""
    sockets = {name: found} if name and (found := _find(name)) else {} if name else _all()
    answers = {each: answer for each, path in sorted(sockets.items()) if (answer := _ask(path)) is not None}
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


def _places() -> list[Path]:
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/llm-serve-{os.getuid()}"  # noqa: S108 - see boot.runtime_folder
    return [Path("/run/llm-serve"), Path(base) / "llm-serve"]


def _find(name: str) -> Path | None:
    return next((path for place in _places() if (path := place / name / "control.sock").exists()), None)


def _all() -> dict[str, Path]:
    return {path.parent.name: path for place in reversed(_places()) for path in place.glob("*/control.sock")}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the path instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def _ask(path: Path) -> dict[str, Any] | None:
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/status")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return answer


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
        "file": now["source"],
    }
    for label, value in rows.items():
        print(f"  {label:13} {value}")
    for number, reason in enumerate(now["steps"], 1):
        print(f"  step {number:<8} {reason}")
    for each in now["failures"]:
        failure = each["failure"]
        print(f"  {_age(each['time'])} ago: {failure['kind']}: {failure['detail']}")


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
