"""Where processes stand, seen on real ones."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from llm_serve.host import stacks
from tests.patience import patient

WAIT_S = 10.0
HANDLER = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)\n"
SLEEP = """
import sys, time
SECRET = "Zanzibar" + "quux"
def where_it_stands():
    print(1, flush=True)
    time.sleep(600)
where_it_stands()
"""
THREADS = """
import sys, threading, time
for _ in range(int(sys.argv[1])):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program, wait for its line, and end it after the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert started[-1].stdout
        assert "1\n" == started[-1].stdout.readline()
        eventually(psutil.Process(started[-1].pid), psutil.STATUS_SLEEPING)
        return started[-1]

    yield start_one
    for each in started:
        each.kill()
        each.communicate()


def of(*children: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(child.pid) for child in children]


def arrived(child: subprocess.Popen[str]) -> str:
    """What has come through stderr so far."""
    assert child.stderr
    ready, _, _ = select.select([child.stderr], [], [], 0)
    return os.read(child.stderr.fileno(), 1 << 16).decode() if ready else ""


def eventually(process: psutil.Process, status: str) -> None:
    """Assert that a process comes to this state."""
    deadline = time.monotonic() + WAIT_S
    while process.status() != status:
        assert time.monotonic() < deadline, process.status()
        time.sleep(0.01)


async def test_who_can_writes_its_own_stack(start: Start) -> None:
    """A process with faulthandler has written it by the time that `dump` returns, and lives on."""
    child = start(HANDLER + SLEEP)

    lines = await stacks.dump(of(child), wait_s=1.0)

    assert "in where_it_stands" in arrived(child)
    assert child.poll() is None
    assert any(f"(pid {child.pid}): S (sleeping), waits in " in line for line in lines)


async def test_who_cannot_is_left_alone(start: Start) -> None:
    """SIGUSR1 would end a process that does not handle it; nobody is waited for."""
    child, ignoring = start(SLEEP), start("import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)" + SLEEP)
    began = time.monotonic()

    lines = await stacks.dump(of(child, ignoring), wait_s=600)

    assert time.monotonic() - began < patient(WAIT_S)
    assert [None, None] == [child.poll(), ignoring.poll()]
    assert all(any(f"(pid {each.pid}): S" in line for line in lines) for each in (child, ignoring))


async def test_a_stopped_process_is_told_and_not_signalled(start: Start) -> None:
    """The signal would wait until it goes on: no stack is written then."""
    child = start(HANDLER + SLEEP)
    os.kill(child.pid, signal.SIGSTOP)
    eventually(psutil.Process(child.pid), psutil.STATUS_STOPPED)
    began = time.monotonic()

    lines = await stacks.dump(of(child), wait_s=600)

    assert time.monotonic() - began < patient(WAIT_S)
    assert any(f"(pid {child.pid}): T (stopped)" in line for line in lines)
    os.kill(child.pid, signal.SIGCONT)
    await asyncio.sleep(0.2)
    assert "" == arrived(child)


async def test_one_that_can_is_enough_to_wait(start: Start) -> None:
    """All that can are asked, whoever stands beside them."""
    children = [start(HANDLER + SLEEP), start(SLEEP), start(HANDLER + SLEEP)]

    await stacks.dump(of(*children), wait_s=1.0)

    assert [True, False, True] == ["in where_it_stands" in arrived(child) for child in children]


@pytest.mark.parametrize(("count", "told", "more"), [(0, 0, False), (3, 3, False), (16, 16, False), (19, 16, True)])
async def test_threads_are_told_up_to_a_bound(start: Start, count: int, told: int, more: bool) -> None:
    """Each with its state and where it waits; of many, how many are left out."""
    child = start(THREADS + SLEEP, str(count))

    lines = await stacks.dump(of(child))

    threads = [line for line in lines if f"(pid {child.pid}): thread " in line]
    assert told == len(threads)
    assert all(re.search(r"thread python\S* \(\d+\): [SRD] \(\w+\), waits in \w+", line) for line in threads)
    assert more == any(line.endswith(f"(pid {child.pid}): {count - 16} more threads") for line in lines)


async def test_a_thread_that_does_something_comes_first(start: Start) -> None:
    """Of many threads, the one that spins is the one to know."""
    spinning = "import threading; threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
    child = start(THREADS + spinning + SLEEP, "20")

    states: list[str] = []
    for _ in range(50):  # it shares the interpreter's lock, and so sleeps at times
        lines = await stacks.dump(of(child))
        states.append(next(line for line in lines if "thread" in line))
    assert any(": R (running)" in state for state in states), states[-1]


async def test_nothing_of_its_memory_is_told(start: Start) -> None:
    """Neither arguments nor values: they may be somebody's prompt."""
    child = start(THREADS + SLEEP, "2", "Zanzibarquux")

    text = "\n".join(await stacks.dump(of(child)))

    assert str(child.pid) in text
    assert "Zanzibar" not in text


async def test_who_is_gone_is_no_error(start: Start) -> None:
    """Processes end while they are looked at: one that is reaped says nothing, a zombie that it is one."""
    reaped, zombie = start(SLEEP), start(HANDLER + SLEEP)
    both = of(reaped, zombie)
    for child in (reaped, zombie):
        child.kill()
    reaped.wait()
    eventually(both[1], psutil.STATUS_ZOMBIE)

    lines = await stacks.dump(both, wait_s=600)

    assert not any(str(reaped.pid) in line for line in lines)
    assert any(f"(pid {zombie.pid}): Z (zombie)" in line for line in lines)


async def test_nobody_is_nothing() -> None:
    """Without processes there are no lines, at once."""
    assert () == await stacks.dump([], wait_s=600)
