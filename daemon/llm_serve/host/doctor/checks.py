"""Makes every check of the doctor, each with a time-out of its own, so that one that hangs or fails costs no other."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from llm_serve.core.doctor import driver, gpus, limits, machine, tools
from llm_serve.core.doctor.findings import Finding, not_known
from llm_serve.host.doctor import gpus as gpu_looks
from llm_serve.host.doctor import limits as limit_looks
from llm_serve.host.doctor import machine as machine_looks
from llm_serve.host.doctor import tools as tool_looks

LOOK_TIMEOUT_S = 10.0
"""A driver that has to wake its GPUs takes some seconds."""


@dataclass(frozen=True, slots=True)
class Check:
    """One look. `title` is what it looks at, for people; findings that could not be made are called `name`."""

    name: str
    title: str
    look: Callable[[], Iterable[Finding]]
    timeout_s: float = LOOK_TIMEOUT_S


def of_machine(environ: Mapping[str, str] = os.environ) -> tuple[Check, ...]:
    """What is looked at on any machine, in the order in which it is told."""
    places = partial(_places, environ)
    return (
        Check("driver", "Driver", lambda: driver.judge(gpu_looks.driver_facts())),
        Check("gpu", "GPUs", _gpus),
        Check("gpu.p2p", "Between the GPUs", lambda: gpus.judge_pairs(gpu_looks.pair_facts())),
        Check("process", "Processes on the GPUs", lambda: gpus.judge_processes(*gpu_looks.process_facts())),
        Check("tools", "Compilers and kernels", lambda: tools.judge(tool_looks.tool_facts(environ))),
        Check("limits", "Limits", lambda: limits.judge_limits(limit_looks.limits())),
        Check("shm", "Shared memory", lambda: limits.judge_shared_memory(limit_looks.shared_memory())),
        Check("disk", "Disks", places),
        Check("numa", "NUMA nodes", lambda: machine.judge_numa(machine_looks.numa_facts())),
        Check("clock", "Clocks", lambda: machine.judge_clock(machine_looks.clock_facts())),
        Check("systemd", "systemd", lambda: [machine.judge_systemd(machine_looks.systemd_facts())]),
        Check("kernel_log", "Kernel log", lambda: machine.judge_kernel_log(machine_looks.kernel_log_facts())),
    )


def _gpus() -> Iterator[Finding]:
    for gpu in gpu_looks.gpu_facts():
        yield from gpus.judge_gpu(gpu)


def _places(environ: Mapping[str, str]) -> Iterator[Finding]:
    for place in limit_looks.places(environ):
        yield from limits.judge_place(place, limit_looks.user_name())


def run(checks: Sequence[Check]) -> list[tuple[str, list[Finding]]]:
    """The findings of each check under its title, in order; all checks are made at once."""
    answers = [_start(check) for check in checks]
    begun = time.monotonic()
    return [
        (check.title, _wait(check, answer, begun + check.timeout_s - time.monotonic()))
        for check, answer in zip(checks, answers, strict=True)
    ]


_Answer = queue.SimpleQueue[list[Finding]]


def _start(check: Check) -> _Answer:
    answer: _Answer = queue.SimpleQueue()
    # A call into a driver may never return, and a pool's thread would be waited for at the end.
    threading.Thread(target=_look, args=(check, answer), name=f"doctor-{check.name}", daemon=True).start()
    return answer


def _look(check: Check, answer: _Answer) -> None:
    findings: list[Finding] = []
    try:
        findings.extend(check.look())
    except Exception as error:  # noqa: BLE001 - what a look stumbles over is a finding
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        findings.append(not_known(check.name, f"could not be looked at: {why}"))
    answer.put(findings)


def _wait(check: Check, answer: _Answer, timeout_s: float) -> list[Finding]:
    try:
        return answer.get(timeout=max(0.0, timeout_s))
    except queue.Empty:
        means = "Whatever else asks there waits as long."
        return [not_known(check.name, f"no answer within {check.timeout_s:g} s", means)]
