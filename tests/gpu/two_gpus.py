"""Two real GPUs of one host: tensor parallel, two instances side by side, GPUs that never meet, files that ask too much.

    python -m tests.gpu.two_gpus --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

With `numactl` on PATH and more than one NUMA node the first two show a bound engine, and else why it is not.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from llm_serve.host.nvml import open_gpus
from tests.daemon import Daemon, Stream
from tests.gpu.stage import Row, Stage, asked, engine_core, play, story, until_serving

_MEETS = {"start_timeout_s": 400, "stall_timeout_s": 40}
"""Two processes on two GPUs need a moment to meet."""


def tensor_parallel(stage: Stage) -> Row:
    """Two GPUs, one model: a worker killed, EngineCore killed, a worker stopped, each under 16 streams."""
    gpus = open_gpus()
    row: Row = {"without P2P": gpus.without_p2p([gpu.index for gpu in gpus.devices()]), "problems": gpus.problems()}
    gpus.close()
    devices = [address for (address,) in asked("pci.bus_id")][:2]
    with stage.daemon(engine={"tensor_parallel_size": 2}, gpu={"devices": devices}, recovery=_MEETS) as daemon:
        row["start s"] = round(until_serving(daemon, 1, 400), 1)
        row["placed"] = _placed(daemon)
        for name, which, number in (
            ("worker killed", max, signal.SIGKILL), ("EngineCore killed", min, signal.SIGKILL),
            ("worker stopped", max, signal.SIGSTOP),
        ):  # fmt: skip
            status = daemon.status()
            streams = [Stream(daemon.url, 1000) for _ in range(16)]
            for stream in streams:
                stream.wait_for_tokens(5)
            os.kill(int(which(status["engine_pids"])), number)
            seen = sum(len(stream.events) for stream in streams)
            after_s = until_serving(daemon, status["epoch"] + 1)
            for stream in streams:
                stream.wait(200).close()
            row[name] = {
                "processes": len(status["engine_pids"]), "events before": seen, "serving after s": round(after_s, 1),
                "complete": sum(stream.finish_reasons == ["length"] for stream in streams),
                "left": [pid for pid in status["engine_pids"] if Path(f"/proc/{pid}").exists()],
            }  # fmt: skip
        return row | story(daemon)


def two_instances(stage: Stage) -> Row:
    """Two GPUs, an instance on each: one's engine is killed, and a stream of the other goes on without a pause."""
    one, two = [uuid for (uuid,) in asked("uuid")][:2]
    with stage.daemon(gpu={"devices": [one]}) as first, stage.daemon(gpu={"devices": [two]}) as second:
        for each in (first, second):
            until_serving(each, 1, 400)
        used = [mib for (mib,) in asked("memory.used")]
        before = second.status()
        untouched, hurt = Stream(second.url, 4000), Stream(first.url, 500)
        for stream in (untouched, hurt):
            stream.wait_for_tokens(5)
        os.kill(engine_core(first), signal.SIGKILL)
        longest, seen, at, began = 0.0, len(untouched.events), time.monotonic(), time.monotonic()
        while time.monotonic() - began < 15 and untouched.end is None:
            if len(untouched.events) != seen:
                seen, at = len(untouched.events), time.monotonic()
            longest = max(longest, time.monotonic() - at)
            time.sleep(0.005)
        until_serving(first, 2)
        hurt.wait(100)
        after = second.status()
        changed = [name for name in ("epoch", "engine_pids", "failures", "state") if before[name] != after[name]]
        return {"GPU MiB": used, "longest pause of the other s": round(longest, 3), "first": story(first),
                "second": story(second), "complete": hurt.finish_reasons, "changed of the other": changed,
                "UUIDs": [one, two], "first placed": _placed(first), "second placed": _placed(second)}  # fmt: skip


def no_p2p(stage: Stage) -> Row:
    """Two GPUs whose processes never meet (injected: both workers spin, twice): the cure, and who remembers it."""
    fault = stage.folder / "fault.json"
    fault.write_text(json.dumps({"at": "init_device", "do": "spin", "times": 4}))
    row: Row = {}
    with stage.daemon(engine={"tensor_parallel_size": 2}, recovery=_MEETS,
                      environ={"LLM_SERVE_FAULT_FILE": str(fault)}) as daemon:  # fmt: skip
        row["serving after s"] = round(until_serving(daemon, 1, 500), 1)
        row |= story(daemon)
        row["plan"] = {name: daemon.status()["engine_arguments"][name] for name in ("arguments", "env")}
        row["said"] = [line[:400] for line in daemon.log().splitlines() if "engine failed" in line or "P2P" in line]
        daemon.stop()
        began = time.monotonic()
        daemon.start().wait_for_answers()
        until_serving(daemon, 1, 400)
        row["the next process"] = story(daemon) | {"serving after s": round(time.monotonic() - began, 1)}
    return row


def too_many(stage: Stage) -> Row:
    """Files that ask for more GPUs, or other heads, than there are: status 78 and the line, and nothing is loaded."""
    uuid = asked("uuid")[0][0]
    files: dict[str, dict[str, dict[str, Any]]] = {
        "GPUs": {"engine": {"tensor_parallel_size": 64}},
        "devices": {"engine": {"tensor_parallel_size": 2}, "gpu": {"devices": [0]}},
        "heads": {"engine": {"tensor_parallel_size": 2, "hf_overrides": '{"num_attention_heads": 25}'}},
        "twice": {"gpu": {"devices": [0, uuid]}},
    }
    row: Row = {}
    for name, tables in files.items():
        began = time.monotonic()
        try:
            with stage.daemon(**tables) as daemon:
                row[name] = [daemon.wait_for_exit(150), daemon.log().splitlines()[-1][:400]]
        except AssertionError as error:  # it has ended before it answered
            said = str(error).splitlines()
            row[name] = [said[0], said[-1][:400]]
        row[name].append(round(time.monotonic() - began, 1))
    return row


def _placed(daemon: Daemon) -> Row:
    """Where an instance runs: the GPUs that it tells of, and the CPUs and the memory policy of its processes."""
    status = daemon.status()
    words = ("the engine runs on", "NUMA", "numactl", "gpu.devices", "GPU memory is not back")
    processes = {}
    for pid in status["engine_pids"]:
        cpus = next(
            line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Cpus_allowed_list" in line
        )
        maps = Path(f"/proc/{pid}/numa_maps")
        bound = sum(" bind:" in line for line in maps.read_text().splitlines()) if maps.exists() else None
        visible = next(
            (word for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if "CUDA_VISIBLE" in word), ""
        )
        processes[pid] = [cpus.partition(":")[2].strip(), f"{bound} maps bound", visible]
    return {"GPUs": [gpu["uuid"] for gpu in status["gpus"]], "processes": processes,
            "said": [line[:300] for line in daemon.log().splitlines() if any(word in line for word in words)]}  # fmt: skip


SCENES = {scene.__name__: scene for scene in (tensor_parallel, two_instances, no_p2p, too_many)}


if __name__ == "__main__":
    play(SCENES, __doc__)
