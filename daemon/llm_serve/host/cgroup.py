"""Our own control group: whom the kernel has killed in it for memory, and what it may use.

Version 2 counts a kill in the group and in all above it; version 1 in the victim's group alone, so that those below
ours are added up. Where both are mounted, a controller belongs to one of them, and that one is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HUGE = 1 << 60
"""Version 1 has no word for "no limit", but a number of about 2**63."""


class OomCounter:
    """Counts the kernel's kills for memory in this process's control group and below, from the moment it is made."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._group = _group_of("memory", proc)
        self._before = self._read()

    @property
    def is_readable(self) -> bool:
        """False where there is no memory controller to ask."""
        return self._before is not None and self._read() is not None

    def kills(self) -> int:
        """Processes killed since; 0 where that cannot be read."""
        now = self._read()
        return 0 if now is None or self._before is None else max(0, now - self._before)

    def _read(self) -> int | None:
        if self._group is None:
            return None
        counts = [_oom_kills(file) for file in self._group.event_files()]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


def memory_limit(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that this group and those above it may use, the tightest of them; None without a limit."""
    return _tightest("memory", "memory.limit_in_bytes", "memory.max", proc)


def task_limit(proc: Path = Path("/proc/self")) -> int | None:
    """Processes and threads that there may be at once; None without a limit."""
    return _tightest("pids", "pids.max", "pids.max", proc)


def cpu_limit(proc: Path = Path("/proc/self")) -> float | None:
    """How many CPUs' time this group and those above it may take; None without a quota."""
    group = _group_of("cpu", proc)
    quotas = [quota for folder in group.folders() if (quota := _cpus(folder)) is not None] if group else []
    return min(quotas, default=None)


def _tightest(controller: str, name_v1: str, name_v2: str, proc: Path) -> int | None:
    group = _group_of(controller, proc)
    if group is None:
        return None
    limits = []
    for folder in group.folders():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and the topmost group has no such file
            limits.append(int((folder / (name_v2 if group.is_v2 else name_v1)).read_text()))
    tightest = min(limits, default=_HUGE)
    return tightest if tightest < _HUGE else None


def _cpus(folder: Path) -> float | None:
    """The quota over its period, in microseconds: one file in version 2, two in version 1, where -1 is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None


@dataclass(frozen=True, slots=True)
class _Mount:
    """Where a hierarchy of groups can be seen, and which of its groups stands at that place."""

    point: Path
    top: str

    def folder(self, group: str) -> Path:
        """The group's folder. A container may see its own group as the top, under a path that says otherwise."""
        below = group.removeprefix(self.top) if self.top != "/" and f"{group}/".startswith(f"{self.top}/") else group
        folder = self.point / below.lstrip("/")
        with contextlib.suppress(OSError):
            return folder if folder.is_dir() else self.point
        return self.point


@dataclass(frozen=True, slots=True)
class _Group:
    """Our place in the hierarchy that has a controller."""

    mount: Path
    folder: Path
    is_v2: bool

    def event_files(self) -> Iterator[Path]:
        """The files that count kills: one tells all in version 2."""
        if self.is_v2:
            yield self.folder / "memory.events"
            return
        yield self.folder / "memory.oom_control"
        if self.folder != self.mount:  # below the topmost one may be everything else on the machine
            with contextlib.suppress(OSError):  # a group may go while we look
                yield from self.folder.rglob("*/memory.oom_control")

    def folders(self) -> Iterator[Path]:
        """Our folder first, then those of the groups above that can be seen."""
        for each in (self.folder, *self.folder.parents):
            yield each
            if each == self.mount:
                return


def _oom_kills(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _group_of(controller: str, proc: Path) -> _Group | None:
    """Our group of version 1's controller, or else of version 2; None where neither is mounted."""
    v1, v2 = _mounts(controller, proc)
    for controllers, path in _memberships(proc):
        if v1 and controller in controllers:
            return _Group(v1.point, v1.folder(path), is_v2=False)
    for controllers, path in _memberships(proc):
        if v2 and controllers == [""]:
            return _Group(v2.point, v2.folder(path), is_v2=True)
    return None


def _memberships(proc: Path) -> list[tuple[list[str], str]]:
    """(controllers, path) of each hierarchy, from lines as "4:memory:/ours"; version 2 names no controllers."""
    with contextlib.suppress(OSError, ValueError):
        lines = (proc / "cgroup").read_text(errors="replace").splitlines()
        return [(controllers.split(","), path) for _, controllers, path in (line.split(":", 2) for line in lines)]
    return []


def _mounts(controller: str, proc: Path) -> tuple[_Mount | None, _Mount | None]:
    """Where version 1's controller and version 2 are mounted: the first of each."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (proc / "mountinfo").read_text(errors="replace").splitlines()
    v1 = v2 = None
    for line in lines:
        match line.split():
            case [_, _, _, top, point, *_, "-", "cgroup2", _, _]:
                v2 = v2 or _Mount(Path(point), top)
            case [_, _, _, top, point, *_, "-", "cgroup", _, options] if controller in options.split(","):
                v1 = v1 or _Mount(Path(point), top)
    return v1, v2
