"""`llm-serve stress` on real GPUs, and whether what it measures is plausible.

    python -m tests.gpu.stress [--seconds N] [--json FILE] [--png FILE]

The whole command on every GPU with a short load, and then an interrupted one; about 70 seconds. It prints the table of
the first, what was expected, and ends with 1 when something is not as it has to be. Nothing else may use the GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_serve.core.stress import Found, Part, Range, Sample, Sight, Verdict
from llm_serve.core.stress import Row as Judged
from llm_serve.host.nvml import Gpu
from llm_serve.stress.measure import OnGpu, Report
from llm_serve.stress.report import as_text

_DAEMON = Path(__file__).parents[2] / "daemon"
_COMMAND = [sys.executable, "-c", "from llm_serve.cli.main import main; main()", "stress", "--json"]
_LONGEST_S = 100
Check = tuple[str, bool, object]


def start(*arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """The command; its progress goes where ours does, if nowhere else."""
    path = os.pathsep.join([str(_DAEMON), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*_COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def whole(seconds: float, png: Path | None) -> Iterator[Check]:
    """All tests, to their end."""
    began = time.monotonic()
    process = start("--seconds", str(seconds), *(["--png", str(png)] if png else []))
    try:
        out, _ = process.communicate(timeout=_LONGEST_S)
    finally:
        process.kill()
    took = time.monotonic() - began
    told = json.loads(out)
    yield "answer", True, told
    yield "exit status 0", process.returncode == 0 == told["exit_status"], process.returncode
    yield f"ends within {_LONGEST_S} s", took < _LONGEST_S, round(took, 1)
    for gpu in told["gpus"]:
        yield from _of_gpu(gpu, seconds)


def _of_gpu(gpu: dict[str, Any], seconds: float) -> Iterator[Check]:
    rows = {row["part"]: row for row in gpu["tests"]}
    name = f"GPU {gpu['index']}"
    yield f"{name}: all six passed", {"passed"} == {row["verdict"] for row in rows.values()}, [*rows]
    fp16, load, formats = (rows[part]["tflops"] for part in ("matmul", "load", "precision"))
    # From the slowest that is served to the fastest there is; a figure beyond is one of a wrong clock.
    yield f"{name}: fp16 between 20 and 3000 TFLOPS", 20 < fp16["fp16"] < 3000, fp16
    yield f"{name}: full load is 0.7 to 1.1 of it", 0.7 < load["fp16"] / fp16["fp16"] < 1.1, load
    yield f"{name}: fp32 is slower than fp16", 1 < formats["fp32"] < formats["fp16"] / 1.5, formats
    yield f"{name}: tf32 lies between", formats["fp32"] < formats.get("tf32", formats["fp16"] - 1) < formats["fp16"], ""
    memory, allocation = (rows[part]["allocated_bytes"] / 2**30 for part in ("memory", "allocation"))
    yield f"{name}: memory under test, GiB", memory > 0.85 * allocation > 4, (round(memory, 1), round(allocation, 1))
    yield f"{name}: load lasted", seconds <= rows["load"]["seconds"] < seconds + 10, rows["load"]["seconds"]
    celsius, watts = rows["load"]["celsius"], rows["load"]["watts"]
    yield f"{name}: temperature", 15 < celsius["least"] <= celsius["most"] < gpu["limit_celsius"], celsius
    yield f"{name}: power under load above 100 W", watts["most"] > 100, watts
    yield f"{name}: limit of 70 to 100 degrees", 70 <= gpu["limit_celsius"] <= 100, gpu["limit_celsius"]
    under_load = [sample for sample in gpu["samples"] if sample["part"] == "load"]
    yield f"{name}: two samples a second at least", len(under_load) >= 2 * seconds, len(under_load)


def interrupted() -> Iterator[Check]:
    """Ctrl-C under full load."""
    process = start("--tests", "operations,load", "--seconds", "60", stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()
    time.sleep(4)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    took = time.monotonic() - began
    told = json.loads(out)
    row = told["gpus"][0]["tests"][1]
    yield "interrupted: ends within 1.5 s", took < 1.5, round(took, 2)
    yield "interrupted: exit status 130", process.returncode == 130, process.returncode
    yield "interrupted: load had begun", row["iterations"] > 0 and row["verdict"] == "stopped", row["iterations"]


def table(told: dict[str, Any]) -> str:
    """As the command itself prints it."""
    report = Report(told["started"], [], told["seconds"], told["is_interrupted"])
    for gpu in told["gpus"]:
        on = OnGpu(Gpu(gpu["index"], gpu["uuid"], gpu["name"], "", 0), gpu["limit_celsius"])
        on.samples = [Sample(**sample) for sample in gpu["samples"]]
        on.rows = [_row(row) for row in gpu["tests"]]
        report.on.append(on)
    return as_text(report)


def _row(row: dict[str, Any]) -> Judged:
    found = Found(**{name: row[name] for name in Found.__slots__} | {"part": Part(row["part"])})
    sight = Sight(**{name: row[name] for name in Sight.__slots__})
    ranges = Sight(Range(**row["celsius"]), Range(**row["watts"]), sight.slowed_by, sight.xids, sight.ecc_errors)
    return Judged(found, ranges, Verdict(row["verdict"]), row["reason"])


def main() -> None:
    """Run it and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    checks = whole(given.seconds, given.png)
    _, _, told = next(checks)
    assert isinstance(told, dict)
    print(table(told), flush=True)
    if given.json:
        given.json.write_text(json.dumps(told, indent=1))
    is_right = True
    for what, is_so, seen in (*checks, *interrupted()):
        is_right = is_right and is_so
        print(f"{'right' if is_so else 'WRONG'}  {what}: {seen}", flush=True)
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
