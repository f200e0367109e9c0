"""A memory control group of a test's own, in which the kernel kills for memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import eventually


class Group:
    """A control group with a memory limit, version 1 or 2, whichever this machine has."""

    def __init__(self) -> None:
        first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self._is_v2 = not first.exists()
        self.folder = (second if self._is_v2 else first) / f"llm-serve-test-{os.getpid()}"
        self.folder.mkdir()

    def add(self, pid: int) -> None:
        """Put a process into it; its later children are born there."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def used(self) -> int:
        """Bytes in use."""
        return int((self.folder / ("memory.current" if self._is_v2 else "memory.usage_in_bytes")).read_text())

    def limit(self, size: int) -> None:
        """From now on no more than this."""
        (self.folder / ("memory.max" if self._is_v2 else "memory.limit_in_bytes")).write_text(str(size))

    def kills(self) -> int:
        """Processes that the kernel has killed here."""
        name = "memory.events" if self._is_v2 else "memory.oom_control"
        return int(dict(line.split() for line in (self.folder / name).read_text().splitlines())["oom_kill"])

    def close(self) -> None:
        """Remove it, with what is still in it."""
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        eventually(
            (self.folder / "cgroup.procs").read_text,
            lambda left: not left,
            within_s=10,
            what="an empty group",
        )
        self.folder.rmdir()


@contextlib.contextmanager
def memory_group() -> Iterator[Group]:
    """A control group, gone afterwards; skips the test where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("making a control group needs root")
    try:
        made = Group()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        yield made
    finally:
        made.close()
