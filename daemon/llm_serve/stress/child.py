"""Run as a program: the parts of a stress test on one GPU, in a process that may die of them.

It reads its job as one line of JSON on stdin, and prints a line of JSON for each piece of progress. When stdin ends, by
an order or because the parent is gone, it stops with what it has.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace

import torch

from llm_serve.core.stress import Found, Part, Progress, Sizes
from llm_serve.stress.memory import allocation, memory
from llm_serve.stress.operations import operations
from llm_serve.stress.products import load, matmul, precision
from llm_serve.stress.rig import Rig

_PATIENCE_S = 5.0
_LONGEST_WORDS = 300
PARTS: Mapping[Part, Callable[[Rig], Found]] = {
    Part.operations: operations,
    Part.allocation: allocation,
    Part.matmul: matmul,
    Part.memory: memory,
    Part.precision: precision,
    Part.load: load,
}


def main() -> None:
    """Do the job on stdin. Everything that libraries print goes to stderr."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()

    def send(progress: Progress) -> None:
        print(json.dumps(asdict(progress)), file=answers, flush=True)

    rig = Rig(torch.device(job["device"]), Sizes(**job["sizes"]), send, stop.is_set)
    run([Part(name) for name in job["parts"]], rig)
    os._exit(0)  # what torch would clear up takes seconds, and the system does it as well


def _wait_for_end(stop: threading.Event) -> None:
    while sys.stdin.readline():
        pass
    stop.set()
    time.sleep(_PATIENCE_S)
    os._exit(1)  # the main thread is somewhere in the driver, and nobody waits for it any more


def run(parts: Iterable[Part], rig: Rig) -> None:
    """One part after the other, until there is a stop or the device is dead."""
    for part in parts:
        if rig.is_stopped():
            return
        rig.send(Progress(0.0, Found(part)))
        found = attempt(part, rig)
        rig.send(Progress(1.0, found, is_over=True))
        if found.error and rig.is_dead():
            return


def attempt(part: Part, rig: Rig) -> Found:
    """What a part finds; an error of it is found, too."""
    told = [Found(part)]
    send = rig.send

    def keep(progress: Progress) -> None:
        told.append(progress.found)
        send(progress)

    began = time.monotonic()
    try:
        rig.synchronize()  # the first one wakes CUDA, and says why it cannot
        found = PARTS[part](replace(rig, send=keep))
    except Exception as error:  # noqa: BLE001 - whatever it is, the part has failed of it
        found = replace(told[-1], error=_words(error))
    return replace(found, seconds=round(time.monotonic() - began, 6))


def _words(error: BaseException) -> str:
    """Its first line: what CUDA adds is advice for programmers."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_WORDS]


if __name__ == "__main__":
    main()
