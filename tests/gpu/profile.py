"""Where the seconds of a rebuild go on a real GPU: every thread of every process, sampled while EngineCore is killed.

    python -m tests.gpu.profile --model FOLDER --samples FOLDER [--variant NAME]

Prints, for each process that had a part in it, how long its busiest thread was in which function.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import signal
import tempfile
import time
from pathlib import Path

from tests.gpu import recovery

_HERE = Path(__file__).parent
_KILLS = 2


def main() -> None:
    """Kill the engine twice, and keep the samples of the second rebuild."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--variant", choices=list(recovery.VARIANTS), default="as it is")
    given = parser.parse_args()
    given.samples.mkdir(parents=True, exist_ok=True)
    variant = recovery.VARIANTS[given.variant]
    env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | variant.get("env", {})
    path = f"{_HERE / 'sample'}:{_HERE.parents[1] / 'daemon'}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        stage = recovery.Stage(given.model, Path(folder), given.samples / "log.txt")
        environ = {"LLM_SERVE_SAMPLES": str(given.samples), "PYTHONPATH": path}
        with stage.daemon(env=env, engine=variant.get("engine", {}), environ=environ) as daemon:
            recovery.until_serving(daemon, 1, 300)
            for _ in range(_KILLS):
                began = time.time()
                os.kill(recovery.engine_core(daemon), signal.SIGKILL)
                answer = daemon.chat(max_tokens=1)
                ended = time.time()
                print(json.dumps({"answered": answer.status_code, "after s": round(ended - began, 2)}), flush=True)
    for file in sorted(given.samples.glob("*.jsonl")):
        _cut(file, began, ended)
        _tell(file, began)


def _cut(file: Path, began: float, ended: float) -> None:
    """Keep what was seen between these two moments."""
    lines = [line for line in file.read_text().splitlines() if began <= float(line[1 : line.index(",")]) <= ended]
    file.write_text("\n".join(lines)) if lines else file.unlink()


def _tell(file: Path, began: float) -> None:
    """The functions of vLLM or of ours in which the busiest thread was longest, with when it was there first."""
    if not file.exists():
        return
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    busiest, _ = collections.Counter(thread for _, thread, _ in samples).most_common(1)[0]
    own = [(moment, frames) for moment, thread, frames in samples if thread == busiest]
    seconds: collections.Counter[str] = collections.Counter()
    first: dict[str, float] = {}
    for (moment, frames), (until, _) in itertools.pairwise(own):
        for name in {":".join(frame.split(":")[:2]) for frame in frames}:
            seconds[name] += until - moment
            first.setdefault(name, moment - began)
    print(f"{file.name}: {len(own)} samples, {own[0][0] - began:.2f} to {own[-1][0] - began:.2f} s")
    for name, total in sorted(seconds.items(), key=lambda each: first[each[0]]):
        if total >= 0.1:
            print(f"  {first[name]:6.2f}  {total:6.2f} s  {name}")


if __name__ == "__main__":
    main()
