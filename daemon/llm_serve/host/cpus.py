"""Which CPU a command takes beside an engine that computes on CPUs and never lets go of those it is bound to.

torch's MKL counts the cores by going to each of them. On Linux 6.18 a visitor was given 8 ms a minute on a CPU where a
thread of such an engine spins; a process that may use one CPU only goes to no other. vLLM leaves the last one free, or,
where the two hardware threads of one core are all there is, the first.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROC = Path("/proc")
_PATIENT = 10
"""Beside a thread that has not stepped back, such a one gets a tenth of a CPU."""


def step_back() -> None:
    """Let the calling thread, and those that it starts, compute mostly while nobody else wants the CPU."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PATIENT)


def keep_to_a_free_one(pid: int = 0) -> None:
    """Let this process (0: the caller) run on one CPU only. Where a sandbox forbids that, it runs where it may."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(pid, {freest(os.sched_getaffinity(pid), _bindings())})


def freest(allowed: set[int], bindings: Iterable[set[int]]) -> int:
    """The allowed CPU to which the fewest threads are bound, each of `bindings` being one's CPUs; of several, the last.

    A thread that may run on all of ours is not bound: the kernel moves it out of the way.
    """
    bound = Counter(cpu for cpus in bindings if not allowed <= cpus for cpu in cpus)
    return max(allowed, key=lambda cpu: (-bound[cpu], cpu))


def _bindings() -> Iterator[set[int]]:
    """The CPUs of every thread of every program; the kernel's own threads are no programs, and do not spin."""
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (process / "cmdline").read_bytes():
                for task in (process / "task").iterdir():
                    yield os.sched_getaffinity(int(task.name))
