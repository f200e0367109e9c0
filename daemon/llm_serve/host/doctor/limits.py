"""Limits of this process and its control group, main memory, and the folders that an engine writes to."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from llm_serve.core.doctor.limits import LimitFacts, Place, SharedMemory
from llm_serve.host import boot, cgroup, processes

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the place itself, no temporary file
_WITHOUT_PROGRAMS = ("HF_HOME", "STATE_DIRECTORY")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ANSWER_TIMEOUT_S = 5.0


def user_name() -> str:
    """Who asks."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return f"user {os.geteuid()}"


def places(environ: Mapping[str, str]) -> Iterator[Place]:
    """The folders that a daemon with this environment writes to, as this user."""
    named = boot.cache_folders(environ) | {"TMPDIR": Path(tempfile.gettempdir())}
    for name, folder in named.items():
        yield place(name, folder)


def place(name: str, path: Path, user: str = "") -> Place:
    """One folder, or where it would be made; for another user where this one is root."""
    nearest = next(each for each in (path, *path.parents) if each.is_dir())
    error = _error_as(nearest, user) if user else _error(nearest)
    with contextlib.suppress(OSError):
        disk = os.statvfs(nearest)
        return Place(
            name=name,
            path=str(path),
            exists=nearest == path,
            error=error,
            free_bytes=shutil.disk_usage(nearest).free,
            free_inodes=disk.f_favail if disk.f_files else None,
            is_noexec=bool(disk.f_flag & os.ST_NOEXEC),
            holds_programs=name not in _WITHOUT_PROGRAMS,
        )
    return Place(name, str(path), error=error)


def _error(folder: Path) -> str:
    """Why this user cannot make a file there. What is tried leaves nothing behind; a full disk is told elsewhere."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return "" if error.errno in _FULL else error.strerror or str(error)


def _error_as(folder: Path, user: str) -> str:
    """The same for another user, which only root can ask."""
    try:
        entry = pwd.getpwnam(user)
        groups = os.getgrouplist(user, entry.pw_gid)
        may = subprocess.run(
            ["test", "-w", folder, "-a", "-x", folder],
            user=entry.pw_uid, group=entry.pw_gid, extra_groups=groups, cwd="/", timeout=_ANSWER_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, KeyError, subprocess.SubprocessError) as error:
        return str(error)
    return "Permission denied" if may.returncode else ""


def may_read(path: Path, user: str) -> bool:
    """True when that user can read the file or folder; asked by root for another, else about this one."""
    if not user:
        return os.access(path, os.R_OK)
    entry = pwd.getpwnam(user)
    groups = os.getgrouplist(user, entry.pw_gid)
    asked = subprocess.run(
        ["test", "-r", path],
        user=entry.pw_uid, group=entry.pw_gid, extra_groups=groups, cwd="/", timeout=_ANSWER_TIMEOUT_S, check=False,
    )  # fmt: skip
    return asked.returncode == 0


def shared_memory(folder: Path = _SHARED_MEMORY) -> SharedMemory:
    """How much there is in /dev/shm, and what lies there unused."""
    try:
        disk = shutil.disk_usage(folder)
        error = _error(folder)
    except OSError as gone:
        return SharedMemory(error=gone.strerror or str(gone))
    left_over = 0
    for path in processes.orphaned_shared_memory(without=()) if folder == _SHARED_MEMORY else ():
        with contextlib.suppress(OSError):
            left_over += path.stat().st_blocks * 512
    return SharedMemory(disk.total, disk.free, error, left_over)


def limits(proc: Path = Path("/proc")) -> LimitFacts:
    """What this process may use."""
    files, hard = map(_limit, resource.getrlimit(resource.RLIMIT_NOFILE))
    memory = psutil.virtual_memory()
    return LimitFacts(
        open_files=files,
        open_files_hard=hard,
        locked_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        processes=_limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]) if os.geteuid() else None,
        group_bytes=cgroup.memory_limit(proc / "self"),
        group_tasks=cgroup.task_limit(proc / "self"),
        group_cpus=cgroup.cpu_limit(proc / "self"),
        cpus=len(os.sched_getaffinity(0)),
        total_bytes=memory.total,
        available_bytes=memory.available,
        swap_bytes=psutil.swap_memory().total,
        is_overcommit_strict=_number(proc / "sys/vm/overcommit_memory") == 2,
        is_numa_balanced=bool(_number(proc / "sys/kernel/numa_balancing")),
    )


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
