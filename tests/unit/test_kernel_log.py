"""The kernel's log: what counts, what does not, and how it is read, with a pipe or a file in the device's place."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.host.kernel_log import KernelLog

OOM = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=llm-serve@a.service,mems_allowed=0,"
    "oom_memcg=/system.slice/llm-serve@a.service,task_memcg=/system.slice/llm-serve@a.service,"
    "task=VLLM::EngineCor,pid=4242,uid=998"
)
KILLED = "Out of memory: Killed process 4242 (VLLM::EngineCor) total-vm:81263964kB, anon-rss:3910652kB, file-rss:4kB"
XID_79 = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
XID_31 = (
    "NVRM: Xid (PCI:0000:af:00): 31, pid=4242, name=VLLM::EngineCor, channel 0x00000008, intr 00000000. MMU Fault: "
    "ENGINE GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f2c_a0000000. Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_READ"
)
XID_154 = "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
TELLING = {
    "oom": KILLED,
    "oom of a group": "Memory cgroup out of memory: Killed process 4242 (python3) total-vm:8kB, anon-rss:3kB, UID:998",
    "oom of an allocating task": "Out of memory (oom_kill_allocating_task): Killed process 7 (a) total-vm:1kB",
    "oom-kill": OOM,
    "xid": XID_79,
    "xid of an older driver": "NVRM: Xid (0000:03:00): 13, Graphics Exception: ESR 0x404490=0x80000001",
    "bus": "NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.",
    "mismatch": "NVRM: API mismatch: the client has the version 580.95.05, but this kernel module has the version 570.1",
    "segfault": "python3[4242]: segfault at 0 ip 00007f2c5f1d2a3b sp 00007ffd3c error 4 in libc.so.6[7f2c5f000000+1]",
    "protection": "traps: python3[4242] general protection fault ip:7f2c5f1d2a3b sp:7ffd3c8 error:0 in libcuda.so.1",
    "opcode": "traps: VLLM::Worker_TP[77] trap invalid opcode ip:7f1 sp:7f2 error:0 in _C.abi3.so[7f1+2]",
    "machine check": "mce: [Hardware Error]: Machine check events logged",
    "bad memory": "mce: Uncorrected hardware memory error in user-access at 2f3d4a000",
    "ecc": "EDAC MC0: 1 UE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0 (channel:1 slot:0 page:0x2f3d4a)",
}
SILENT = {
    "corrected ecc": "EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0 (channel:1 slot:0)",
    "driver loads": "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025",
    "oom score": "python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
    "network": "eth0: link becomes ready",
    "empty": "",
}


class Device:
    """A pipe that is written as the kernel writes /dev/kmsg."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._number = 0

    def log(self, text: str, *, priority: int = 4) -> None:
        """Add a record."""
        self._number += 1
        os.write(self._end, f"{priority},{self._number},{self._number * 1000},-;{text}\n".encode())

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._end)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """The kernel's log, with nothing in it."""
    with contextlib.closing(Device(tmp_path / "kmsg")) as found:
        yield found


# What counts.
@pytest.mark.parametrize("line", TELLING.values(), ids=TELLING)
def test_lines_that_explain_a_death_are_kept(device: Device, line: str) -> None:
    """The message alone, without the record's prefix."""
    log = KernelLog(device.path)
    device.log(line)

    assert (line,) == log.lines_since_start()


@pytest.mark.parametrize("line", SILENT.values(), ids=SILENT)
def test_other_lines_are_not(device: Device, line: str) -> None:
    """The log is full of what explains nothing."""
    log = KernelLog(device.path)
    device.log(line)
    device.log(KILLED)

    assert (KILLED,) == log.lines_since_start()


def test_what_belongs_to_a_record_is_not_a_line(device: Device) -> None:
    """The device's names follow a record, indented; they may hold anything."""
    log = KernelLog(device.path)
    device.log(f"{XID_79}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:3b:00.0 segfault at")

    assert (XID_79,) == log.lines_since_start()


def test_xids_are_read_in_order(device: Device) -> None:
    """The number after the address, as often as it was reported."""
    log = KernelLog(device.path)
    for line in (XID_31, KILLED, XID_79, XID_154, XID_79):
        device.log(line)

    assert (31, 79, 154, 79) == log.xids()
    assert 5 == len(log.lines_since_start())


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((), (31, 79, 154)),
        (("00000000:3B:00.0",), (79, 154)),
        (("0000:af:00",), (31,)),
        (("00000000:3B:00.0", "00000000:AF:00.0"), (31, 79, 154)),
        (("00000001:3B:00.0",), ()),
    ],
    ids=["all", "as NVML writes it", "as the kernel writes it", "two", "another domain"],
)
def test_other_gpus_are_none_of_ours(device: Device, ours: tuple[str, ...], expected: tuple[int, ...]) -> None:
    """A GPU that another service uses may die without ours; what is no GPU's stays."""
    log = KernelLog(device.path, pci_bus_ids=ours)
    for line in (XID_31, KILLED, XID_79, XID_154):
        device.log(line)

    assert expected == log.xids()
    assert KILLED in log.lines_since_start()
    assert len(expected) + 1 == len(log.lines_since_start())


# How it is read.
def test_what_was_before_is_not_read(tmp_path: Path) -> None:
    """It begins at the end, and goes on from where it was; what it has read it keeps."""
    file = tmp_path / "kmsg"
    file.write_text(f"4,1,1,-;{KILLED}\n")
    log = KernelLog(file)

    assert () == log.lines_since_start()
    for number, line in enumerate((XID_79, OOM), start=2):
        with file.open("a") as more:
            more.write(f"4,{number},1,-;{line}\n")
        log.lines_since_start()

    assert (XID_79, OOM) == log.lines_since_start()


def test_it_never_grows_beyond_a_hundred_lines(tmp_path: Path) -> None:
    """The last ones are kept."""
    file = tmp_path / "kmsg"
    file.touch()
    log = KernelLog(file)
    with file.open("a") as more:
        more.writelines(f"4,{number},1,-;Killed process {number} (a)\n" for number in range(300))

    found = log.lines_since_start()

    assert [f"Killed process {number} (a)" for number in range(200, 300)] == list(found)


def test_an_overrun_is_survived(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel overwrote before it was read is lost; the next record is read."""
    log = KernelLog(device.path)
    device.log(KILLED)
    overruns = iter([BrokenPipeError(errno.EPIPE, "Broken pipe")] * 2)
    read = os.read

    def read_or_fail(fd: int, size: int) -> bytes:
        for error in overruns:
            raise error
        return read(fd, size)

    monkeypatch.setattr(os, "read", read_or_fail)

    assert (KILLED,) == log.lines_since_start()
    assert next(overruns, None) is None


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, errno.EAGAIN])
def test_a_read_that_fails_ends_the_reading_for_now(
    device: Device, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """No error gets out; the next time it is tried again."""
    log = KernelLog(device.path)
    device.log(KILLED)
    with monkeypatch.context() as patched:

        def fail(fd: int, size: int) -> bytes:
            raise OSError(error, os.strerror(error))

        patched.setattr(os, "read", fail)
        assert () == log.lines_since_start()

    assert (KILLED,) == log.lines_since_start()


def test_a_log_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    """Nothing is found there, and nothing is raised."""
    log = KernelLog(tmp_path / "none")

    assert f"{tmp_path}/none: No such file or directory" == log.reason
    assert ((), ()) == (log.lines_since_start(), log.xids())
    log.close()


def test_after_closing_what_was_read_stays(device: Device) -> None:
    """Closing twice is no error."""
    log = KernelLog(device.path)
    device.log(XID_79)
    log.lines_since_start()
    log.close()
    log.close()
    device.log(KILLED)

    assert ((XID_79,), (79,), "") == (log.lines_since_start(), log.xids(), log.reason)


def open_files() -> set[str]:
    """This process's file descriptors, but for the one that reads them."""
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.exists()}


def test_one_that_is_forgotten_is_closed(device: Device) -> None:
    """Each engine has its own: a daemon that restarts one for weeks does not run out of files."""
    gc.collect()
    before = open_files()
    for _ in range(3):
        KernelLog(device.path)
    gc.collect()

    assert before == open_files()


@given(records=st.lists(st.binary(max_size=80), max_size=10))
def test_no_record_is_an_error(tmp_path_factory: pytest.TempPathFactory, records: list[bytes]) -> None:
    """Whatever bytes come, the lines are text, without line breaks, and those that tell."""
    file = tmp_path_factory.mktemp("log") / "kmsg"
    file.touch()
    log = KernelLog(file)
    file.write_bytes(b"\n".join([*records, f"4,1,1,-;{KILLED}".encode()]))

    found = log.lines_since_start()

    assert KILLED == found[-1]
    assert all(line == line.strip() and "\n" not in line for line in found)


SEGFAULT = "import ctypes, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); ctypes.string_at(0)"


def test_the_real_kernel_tells_of_a_real_crash() -> None:
    """A process that reads address 0 is found in the log of this machine, where that may be read and is written."""
    log = KernelLog()
    if log.reason:
        pytest.skip(log.reason)
    setting = Path("/proc/sys/debug/exception-trace")
    if not setting.exists() or setting.read_text().strip() == "0":
        pytest.skip("this kernel does not log crashes")
    child = subprocess.Popen([sys.executable, "-c", SEGFAULT], stderr=subprocess.DEVNULL)

    assert -11 == child.wait(20)
    deadline = time.monotonic() + 5
    while not any(f"[{child.pid}]: segfault at 0" in line for line in log.lines_since_start()):
        assert time.monotonic() < deadline, log.lines_since_start()
        time.sleep(0.01)
