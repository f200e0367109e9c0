"""The CPU on which a command does not wait for an engine that spins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llm_serve.host import cpus
from llm_serve.host.cpus import freest, keep_to_a_free_one

TABLE = {
    "nobody is bound": ({0, 1, 2}, [{0, 1, 2}], 2),
    "an engine on all but the last": ({0, 1, 2, 3}, [{0}, {1}, {2}, {0, 1, 2, 3}], 3),
    "an engine on the last: one core with two hardware threads": ({0, 1}, [{0, 1}, {1}, {1}], 0),
    "two engines, one thread on what is left": ({0, 1}, [{0}, {0}, {1}], 1),
    "a thread that may run elsewhere too is not bound": ({2, 3}, [{0, 1, 2, 3}, {3}], 2),
    "a thread on CPUs that are not ours": ({0, 1}, [{4}, {5, 1}], 0),
}


@pytest.mark.parametrize(("allowed", "bindings", "cpu"), TABLE.values(), ids=TABLE)
def test_the_freest_is_taken(allowed: set[int], bindings: list[set[int]], cpu: int) -> None:
    assert cpu == freest(allowed, bindings)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that only waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_a_process_keeps_to_one_of_its_own(child: subprocess.Popen[bytes]) -> None:
    """Also another process than the caller, whose own CPUs stay as they were."""
    mine = os.sched_getaffinity(0)

    keep_to_a_free_one(child.pid)

    kept = os.sched_getaffinity(child.pid)
    assert 1 == len(kept)
    assert kept <= mine
    assert mine == os.sched_getaffinity(0)


def test_a_program_that_is_bound_is_seen(child: subprocess.Popen[bytes]) -> None:
    """As the kernel tells of it, threads and all."""
    last = {max(os.sched_getaffinity(0))}
    before = sum(each == last for each in cpus._bindings())

    os.sched_setaffinity(child.pid, last)

    assert before < sum(each == last for each in cpus._bindings())


def test_a_process_that_is_gone_is_nobody_s_error() -> None:
    """As where a sandbox forbids it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    keep_to_a_free_one(gone.pid)
