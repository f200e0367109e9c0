"""Finding, measuring and ending processes, with real ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from llm_serve.host import processes

WAIT_S = 10.0
SLEEPER = "import sys, time; print(1, flush=True); time.sleep(600)"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program; whatever is left of it is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str = SLEEPER, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout
        started[-1].stdout.readline()
        return started[-1]

    yield start_one
    for each in started:
        each.kill()
        if each.stdin and not each.stdin.closed:
            each.communicate()


def eventually(is_so: Callable[[], object], what: str) -> None:
    """Assert that something becomes so."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S} s"
        time.sleep(0.01)


# Finding.
def test_descendants_are_children_and_their_children(start: Start) -> None:
    """Everything below this process is found, except what is named."""
    code = (
        "import subprocess, sys\n"
        "with subprocess.Popen(['sleep', '600'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:\n"
        "    print(1, flush=True); sys.stdin.read(); child.kill()"
    )
    parent, other = start(code), start()
    below = [child.pid for child in psutil.Process(parent.pid).children()]

    found = {process.pid for process in processes.descendants(without=[other.pid])}
    parent.communicate("")

    assert 1 == len(below)
    assert {parent.pid, *below} <= found
    assert other.pid not in found


def test_python_s_resource_tracker_is_nobody(start: Start) -> None:
    """The tracker of multiprocessing belongs to the daemon, not to an engine."""
    tracker = start(SLEEPER, "from multiprocessing.resource_tracker import main;main(3)")

    assert tracker.pid not in {process.pid for process in processes.descendants()}


ORPHAN = """
import os, sys
pid = os.fork()
if pid:
    print(pid, flush=True)
    os._exit(0)
os.setsid()
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
exec(sys.argv[1])
import time
time.sleep(600)
"""
Strand = Callable[..., psutil.Process]


@pytest.fixture
def strand() -> Iterator[Strand]:
    """Start a process that nobody below this one has started any more, with these variables; it is ended after it."""
    stranded: list[psutil.Process] = []

    def strand_one(code: str = "", **variables: str) -> psutil.Process:
        command = [sys.executable, "-c", ORPHAN, code]
        parent = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True)
        stranded.append(psutil.Process(int(parent.stdout)))
        return stranded[-1]

    yield strand_one
    for each in stranded:
        with contextlib.suppress(psutil.Error):
            each.kill()


def test_leftovers_of_an_earlier_life_are_found(strand: Strand, tmp_path: Path) -> None:
    """By the mark in their environment, whoever their parent is now; a stopped one, too; none of another instance."""
    mark = str(tmp_path)
    ours, stopped = strand(**{processes.MARKER: mark}), strand(**{processes.MARKER: mark})
    strand(**{processes.MARKER: f"{mark}-b"})
    strand(OTHER=mark)
    stopped.suspend()
    eventually(lambda: stopped.status() == psutil.STATUS_STOPPED, "the process is stopped")

    assert {ours, stopped} == set(processes.strays(mark))
    assert [ours] == processes.strays(mark, without=[stopped.pid])
    assert [] == processes.strays(mark[:-1])


def test_what_is_below_this_process_is_no_stray(
    strand: Strand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither this process, nor its children and theirs, are left over, whatever mark they carry."""
    code = (
        "import subprocess, sys\n"
        "with subprocess.Popen(['sleep', '600'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:\n"
        "    print(child.pid, flush=True); sys.stdin.read(); child.kill()"
    )
    monkeypatch.setenv(processes.MARKER, str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        stray = strand()
        try:
            below = [psutil.Process(parent.pid), child]
            assert all(str(tmp_path) == each.environ()[processes.MARKER] for each in (*below, stray))
            assert [stray] == processes.strays(str(tmp_path))
        finally:
            parent.communicate("")


def test_a_stray_that_ended_is_none(strand: Strand, tmp_path: Path) -> None:
    """What is gone is not found."""
    stray = strand(**{processes.MARKER: str(tmp_path)})
    assert [stray] == processes.strays(str(tmp_path))

    stray.kill()

    eventually(lambda: [] == processes.strays(str(tmp_path)), "it is gone")


TITLED = "import setproctitle; setproctitle.setproctitle('VLLM::EngineCore')"


def test_a_stray_is_found_by_its_mark_though_it_has_named_itself(strand: Strand, tmp_path: Path) -> None:
    """setproctitle, which vLLM uses, writes over the environment that others see, unless SPT_NOENV is set."""
    pytest.importorskip("setproctitle")
    titled = strand(TITLED, SPT_NOENV="1", **{processes.MARKER: str(tmp_path)})

    eventually(lambda: titled.cmdline()[0].startswith("VLLM::EngineCore"), "it has its title")

    assert [titled] == processes.strays(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_another_user_s_process_is_no_stray(strand: Strand, tmp_path: Path) -> None:
    """A mark that somebody else has set does not get his processes killed, nor ours."""
    theirs = strand("os.setuid(65534)", **{processes.MARKER: str(tmp_path)})

    eventually(lambda: 65534 == theirs.uids().effective, "it is another user's")

    assert str(tmp_path) == theirs.environ()[processes.MARKER]
    assert [] == processes.strays(str(tmp_path))


# Ending.
async def test_all_are_killed(start: Start) -> None:
    """Whatever they do about signals, they are gone on return, a stopped one included."""
    deaf = start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER)
    stopped = start()
    os.kill(stopped.pid, signal.SIGSTOP)
    victims = [psutil.Process(each.pid) for each in (deaf, stopped)]
    eventually(lambda: victims[1].status() == psutil.STATUS_STOPPED, "the process is stopped")

    left = await processes.kill_all(victims, timeout_s=WAIT_S)

    assert [] == left
    assert [-9, -9] == [deaf.wait(WAIT_S), stopped.wait(WAIT_S)]


async def test_those_who_are_gone_already_are_no_error(start: Start) -> None:
    """A process that ended by itself, reaped or not, counts as gone."""
    reaped, zombie = start(), start()
    victims = [psutil.Process(each.pid) for each in (reaped, zombie)]
    reaped.kill()
    reaped.wait()
    zombie.kill()
    eventually(lambda: victims[1].status() == psutil.STATUS_ZOMBIE, "the process is a zombie")

    assert [] == await processes.kill_all([*victims, *victims], timeout_s=0.0)
    assert [False, False] == [processes.is_alive(each) for each in victims]


async def test_those_who_stay_are_returned(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the kernel does not let go of is named, after the time-out and not later."""
    stuck = psutil.Process(start().pid)
    monkeypatch.setattr(stuck, "kill", lambda: None)

    assert [stuck] == await processes.kill_all([stuck], timeout_s=0.05)


ORPHANAGE = """
import asyncio, os, psutil, subprocess, sys
from llm_serve.engine.forkserver import adopt_orphans
from llm_serve.host import processes
adopt_orphans()
CHILD = "import os, time; pid = os.fork(); print(pid, flush=True) if pid else time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
orphan = psutil.Process(int(child.stdout.readline()))
child.wait()
found = processes.descendants()
left = asyncio.run(processes.kill_all(found, timeout_s=10))
print(orphan in found, left, processes.is_alive(orphan))
"""


def test_an_orphaned_grandchild_is_found_and_killed() -> None:
    """A worker whose parent died is given to the daemon, which adopts orphans, and goes with the rest."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", ORPHANAGE], env=environment, capture_output=True, text=True, timeout=30, check=True
    )

    assert "True [] False" == done.stdout.strip()


# Measuring.
def test_shared_memory_is_found_and_removed() -> None:
    """Segments that a process has mapped are found by their files, and are gone after unlink_all."""
    segment = shared_memory.SharedMemory(create=True, size=4096)
    path = Path("/dev/shm") / segment.name
    try:
        found = processes.shared_memory_of([psutil.Process()])

        assert path in found
        assert [path] == processes.unlink_all([path, path, Path("/dev/shm/llm-serve-was-never-there")])
        assert not path.exists()
    finally:
        path.touch()
        segment.close()
        segment.unlink()


def test_an_orphan_is_what_nobody_maps() -> None:
    """Not what a living process maps, nor what was there before, nor what Python did not make."""
    segment = shared_memory.SharedMemory(create=True, size=4096)
    mapped = Path("/dev/shm") / segment.name
    names = ("psm_llm_serve_test", "sem.mp-llm-serve-test", "psm_llm_serve_old", "llm-serve-other")
    orphan, semaphore, old, other = paths = [Path("/dev/shm", name) for name in names]
    try:
        for path in paths:
            path.touch()

        found = processes.orphaned_shared_memory({old})

        assert {orphan, semaphore} == found & {mapped, *paths}
        assert {mapped, orphan, semaphore, old} == processes.shared_memory_of_python() & {mapped, *paths}
        assert other not in processes.orphaned_shared_memory(())
    finally:
        processes.unlink_all(paths)
        segment.close()
        segment.unlink()


@pytest.mark.parametrize(
    ("name", "is_so"),
    [
        ("/dev/shm/psm_1", True),
        ("/dev/shm/a/b", False),
        ("/dev/shm/", False),
        ("/dev/shm/../etc", False),
        ("/tmp/dev/shm/x", False),
        ("", False),
    ],
)
def test_only_files_directly_in_shared_memory_are_taken_for_it(name: str, is_so: bool) -> None:
    """A name that is read from a file must not lead anywhere else."""
    assert is_so == processes.is_shared_memory(name)


def test_a_process_that_is_gone_has_no_shared_memory(start: Start) -> None:
    """Looking into a process that has ended finds nothing and raises nothing."""
    child = start()
    ended = psutil.Process(child.pid)
    child.kill()
    child.wait()

    assert frozenset() == processes.shared_memory_of([ended])


def test_work_changes_the_mark_and_sleep_does_not(start: Start) -> None:
    """CPU time is progress; waiting is none."""
    busy = start("import sys; print(1, flush=True)\nwhile True: pass")
    asleep = [psutil.Process(start().pid)]
    working = [psutil.Process(busy.pid)]
    before, resting = processes.progress_mark(working), processes.progress_mark(asleep)

    eventually(lambda: processes.progress_mark(working) != before, "the mark changes")

    assert resting == processes.progress_mark(asleep)


def test_a_process_that_is_gone_makes_no_progress(start: Start) -> None:
    """It counts for nothing."""
    child = start()
    ended = psutil.Process(child.pid)
    child.kill()
    child.wait()

    assert (0.0, 0) == processes.progress_mark([ended])


def test_the_holder_of_a_port_is_named() -> None:
    """Who listens is told by name and pid; nobody is None."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        assert f"{psutil.Process().name()} (pid {os.getpid()})" == processes.holder_of_port(port)
    assert processes.holder_of_port(port) is None


def test_memory_is_measured_in_bytes() -> None:
    """A Python process has some megabytes."""
    assert 5 << 20 < processes.resident_bytes() < 64 << 30
