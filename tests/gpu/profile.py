"""Where the seconds of a rebuild go on a real GPU: every thread of every process, sampled while EngineCore is killed.

    python -m tests.gpu.profile --model FOLDER --samples FOLDER [--variant NAME] [--kills N]

Prints, for each kill and each process that had a part in it, how long its busiest thread was in which function.
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

from tests.daemon import Daemon
from tests.gpu.speed import VARIANTS
from tests.gpu.stage import Stage, engine_core, until_serving

_HERE = Path(__file__).parent


def main() -> None:
    """Kill the engine, the first time with whatever is not in the caches yet, and tell of each rebuild."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--variant", choices=list(VARIANTS), default="as it is")
    parser.add_argument("--kills", type=int, default=2)
    given = parser.parse_args()
    given.samples.mkdir(parents=True, exist_ok=True)
    variant = VARIANTS[given.variant]
    env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | variant.get("env", {})
    path = f"{_HERE / 'sample'}:{_HERE.parents[1] / 'daemon'}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(given.model, Path(folder), given.samples / "log.txt")
        environ = {"LLM_SERVE_SAMPLES": str(given.samples), "PYTHONPATH": path}
        with stage.daemon(env=env, engine=variant.get("engine", {}), environ=environ) as daemon:
            until_serving(daemon, 1, 300)
            kills = [_killed(daemon) for _ in range(given.kills)]
    for number, (began, ended) in enumerate(kills, 1):
        print(f"kill {number}: answered after {ended - began:.2f} s")
        for file in sorted(given.samples.glob("*.jsonl")):
            _tell(file, began, ended)


def _killed(daemon: Daemon) -> tuple[float, float]:
    """When the engine was killed, and when the next answer was there."""
    began = time.time()
    os.kill(engine_core(daemon), signal.SIGKILL)
    assert daemon.chat(max_tokens=1).status_code == 200
    return began, time.time()


def _tell(file: Path, began: float, ended: float) -> None:
    """The functions of vLLM or of ours in which the busiest thread was longest, with when it was there first."""
    lines = file.read_text().splitlines()
    samples = [json.loads(line) for line in lines if began <= float(line[1 : line.index(",")]) <= ended]
    if not samples:
        return
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
