"""Our own control group: whom the kernel has killed in it for memory, and how much there may be."""

from __future__ import annotations

import contextlib
from pathlib import Path

_HUGE = 1 << 60


class OomCounter:
    """Counts the kernel's kills for memory in this process's control group, from the moment it is made."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._file = _events_file(proc)
        self._before = self._read()

    @property
    def is_readable(self) -> bool:
        """False where there is no memory controller to ask."""
        return self._read() is not None

    def kills(self) -> int:
        """Processes killed since; 0 where that cannot be read."""
        now = self._read()
        return max(0, now - (self._before or 0)) if now is not None else 0

    def _read(self) -> int | None:
        if self._file is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            lines = (line.split() for line in self._file.read_text().splitlines())
            return next((int(words[1]) for words in lines if words[0] == "oom_kill"), None)
        return None


def memory_limit(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that this group and those above it may use, the tightest of them; None without a limit."""
    found = _groups(proc)
    if found is None:
        return None
    root, folder, is_v2 = found
    name = "memory.max" if is_v2 else "memory.limit_in_bytes"
    limits = []
    for each in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((each / name).read_text()))
        if each == root:
            break
    tightest = min(limits, default=_HUGE)
    return tightest if tightest < _HUGE else None


def _events_file(proc: Path) -> Path | None:
    found = _groups(proc)
    if found is None:
        return None
    _, folder, is_v2 = found
    return folder / ("memory.events" if is_v2 else "memory.oom_control")


def _groups(proc: Path) -> tuple[Path, Path, bool] | None:
    """(mount point of the memory controller, our folder below it, is it version 2), or None."""
    mounts = _mounts(proc)
    with contextlib.suppress(OSError):
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        for _, controllers, path in memberships:
            if "memory" in controllers.split(",") and "memory" in mounts:
                return mounts["memory"], _below(mounts["memory"], path), False
        for number, controllers, path in memberships:
            if number == "0" and not controllers and "" in mounts:
                return mounts[""], _below(mounts[""], path), True
    return None


def _below(mount: Path, path: str) -> Path:
    """Our folder. In a container whose own group is mounted as the root, the path does not exist below it."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _mounts(proc: Path) -> dict[str, Path]:
    """Mount points: "memory" for version 1's controller, "" for version 2."""
    found: dict[str, Path] = {}
    with contextlib.suppress(OSError, IndexError):
        for line in (proc / "mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, options = right.split()[0], right.split()[-1].split(",")
            if kind == "cgroup2":
                found.setdefault("", Path(left.split()[4]))
            elif kind == "cgroup" and "memory" in options:
                found.setdefault("memory", Path(left.split()[4]))
    return found
