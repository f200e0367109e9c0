"""Limits of the process and its control group, memory, and the places that are written to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_serve.core.doctor.findings import Finding, gib, good, not_known, note, problem

LEAST_FREE_BYTES = 64 << 20
"""As of host/boot.py, which refuses a start under it."""
_ROOM_FOR_CACHES = 10 << 30
_LEAST_SHARED_BYTES = 256 << 20
"""A worker's message queue takes 160 MiB (10 chunks of 16) for each group of processes."""
_FILES, _FEW_FILES = 65536, 4096
_FEW_TASKS = 1024
_LITTLE_LOCKED = 1 << 20
"""Since Linux 5.16 the usual limit is 8 MiB."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is written to: `name` is the variable that sets it, `error` why it cannot be written."""

    name: str
    path: str
    exists: bool = True
    error: str = ""
    unseen_by: str = ""
    """The user who cannot tell, since it is not his folder; empty where it was looked at."""
    free_bytes: int | None = None
    free_inodes: int | None = None
    is_noexec: bool = False
    holds_programs: bool = False
    """Compiled kernels are loaded from there."""


def judge_place(place: Place, user: str) -> Iterator[Finding]:
    """Whether there is room, and the right to use it."""
    check = f"disk.{place.name}"
    if place.unseen_by:
        found = f"{place.unseen_by} cannot tell whether {place.path} can be written by the service"
        yield not_known(check, found, cure="sudo llm-serve doctor NAME")
        return
    if place.error:
        means = "A start is refused (exit 78)."
        cure = f"chown {user} {place.path}, or set {place.name} to a folder that {user} can write to"
        yield problem(check, f"{user} cannot write to {place.path}: {place.error}", means, cure)
        return
    if place.is_noexec and place.holds_programs:
        means = "Compiled kernels cannot be loaded from there (`failed to map segment from shared object`)."
        cure = f"mount -o remount,exec the disk of {place.path}, or set {place.name} to a folder on another"
        yield problem(f"{check}.noexec", f"{place.path} is mounted noexec", means, cure)
    if place.free_bytes is None:
        yield not_known(check, f"how much is free at {place.path}")
    elif place.free_bytes < LEAST_FREE_BYTES or place.free_inodes == 0:
        room = "no inode" if place.free_inodes == 0 else f"only {gib(place.free_bytes)}"
        means = "A start is refused (exit 75), and what is compiled or learned is lost."
        yield problem(
            check, f"{room} is free at {place.path}", means, f"Free some, or set {place.name} to another disk."
        )
    elif place.free_bytes < _ROOM_FOR_CACHES and place.holds_programs:
        means = "Models and compiled kernels are kept there; most models are larger."
        yield note(
            check, f"{gib(place.free_bytes)} are free at {place.path}", means, f"Set {place.name} to a larger disk."
        )
    else:
        yield good(
            check, f"{gib(place.free_bytes)} are free at {place.path}" + ("" if place.exists else ", yet to be made")
        )


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Bytes of /dev/shm, or why it cannot be used."""

    total_bytes: int = 0
    free_bytes: int = 0
    error: str = ""
    left_over_bytes: int = 0
    """In files of Python's that no process has mapped any more."""


def judge_shared_memory(memory: SharedMemory) -> Iterator[Finding]:
    """Room for the queues between an engine's processes."""
    cure = "rm what nobody uses there; mount -o remount,size=8G /dev/shm; docker run --shm-size 8g (or --ipc=host)"
    if memory.error:
        yield problem("shm", f"no use of /dev/shm: {memory.error}", "An engine's processes cannot talk.", cure)
        return
    found = f"{gib(memory.free_bytes)} of {gib(memory.total_bytes)} are free in /dev/shm"
    if memory.free_bytes < LEAST_FREE_BYTES:
        yield problem("shm", found, "A start fails for want of shared memory, or dies with SIGBUS.", cure)
    elif memory.free_bytes < _LEAST_SHARED_BYTES:
        yield note("shm", found, "Too little for tensor parallel (message queues, NCCL).", cure)
    else:
        yield good("shm", found)
    if memory.left_over_bytes >= LEAST_FREE_BYTES:
        means = "Left by processes that were killed. An instance removes its own at its next start."
        found = f"{gib(memory.left_over_bytes)} in /dev/shm belong to nobody that runs"
        yield note(
            "shm.left_over", found, means, "lsof /dev/shm, then rm the psm_* and sem.mp-* files that nobody has open"
        )


@dataclass(frozen=True, slots=True)
class LimitFacts:
    """Limits of this process; None is unlimited, or not told. `cpus` is how many CPUs' time its group may take."""

    open_files: int | None = None
    open_files_hard: int | None = None
    locked_bytes: int | None = None
    processes: int | None = None
    group_bytes: int | None = None
    group_tasks: int | None = None
    group_cpus: float | None = None
    cpus: int = 1
    total_bytes: int = 0
    available_bytes: int = 0
    swap_bytes: int = 0
    is_overcommit_strict: bool = False
    is_numa_balanced: bool = False


def judge_limits(facts: LimitFacts) -> Iterator[Finding]:
    """This shell's limits; the unit's are its own (systemctl show llm-serve@NAME)."""
    yield _files(facts)
    tasks = min((each for each in (facts.processes, facts.group_tasks) if each is not None), default=None)
    if tasks is not None and tasks < _FEW_TASKS:
        means = "An engine has some hundred threads: it fails with `Resource temporarily unavailable`."
        yield problem(
            "limits.processes",
            f"{tasks} processes and threads are allowed",
            means,
            "ulimit -u, TasksMax=infinity; docker --pids-limit -1",
        )
    else:
        yield good("limits.processes", f"{tasks or 'any number of'} processes and threads are allowed")
    if facts.locked_bytes is not None and facts.locked_bytes < _LITTLE_LOCKED:
        means = "RDMA between machines cannot be used. The shipped unit has no limit."
        yield note(
            "limits.memlock", f"{facts.locked_bytes >> 10} KiB of memory may be locked", means, "ulimit -l unlimited"
        )
    yield _memory(facts)
    yield _cpus(facts)
    if facts.is_overcommit_strict:
        means = "Engines reserve far more addresses than they use: large ones are refused, and forks fail."
        yield note("memory.overcommit", "vm.overcommit_memory is 2", means, "sysctl vm.overcommit_memory=0")
    if facts.is_numa_balanced:
        means = "The kernel moves pages between nodes while an engine uses them: steps take uneven time."
        yield note("memory.numa_balancing", "kernel.numa_balancing is on", means, "sysctl kernel.numa_balancing=0")


def _files(facts: LimitFacts) -> Finding:
    limit = facts.open_files
    if limit is None or limit >= _FILES:
        return good("limits.files", f"{limit or 'any number of'} open files are allowed")
    means = "Each client takes one. The shipped unit allows 65536; this is what a daemon in this shell would have."
    cure = f"ulimit -n {min(_FILES, facts.open_files_hard or _FILES)}; LimitNOFILE=65536 in a unit"
    if limit < _FEW_FILES:
        if facts.open_files_hard is not None and facts.open_files_hard < _FEW_FILES:
            cure = "docker --ulimit nofile=65536; /etc/security/limits.conf; LimitNOFILE=65536 in a unit"
            return problem("limits.files", f"{limit} open files are allowed, and no more can be asked for", means, cure)
        return note("limits.files", f"{limit} open files are allowed", means, cure)
    return good("limits.files", f"{limit} open files are allowed")


def _memory(facts: LimitFacts) -> Finding:
    found = f"{gib(facts.available_bytes)} of {gib(facts.total_bytes)} of main memory are available"
    swap = f", {gib(facts.swap_bytes)} of swap" if facts.swap_bytes else ", no swap"
    if facts.group_bytes is not None and facts.group_bytes < facts.total_bytes:
        means = "The kernel kills an engine that goes beyond, even where the machine has more."
        cure = "MemoryMax= of the unit, or --memory of the container"
        return note("memory", f"{found}{swap}; this control group may use {gib(facts.group_bytes)}", means, cure)
    return good("memory", found + swap)


def _cpus(facts: LimitFacts) -> Finding:
    if facts.group_cpus is not None and facts.group_cpus < facts.cpus:
        means = "The daemon and its engine share them; under the quota they are paused, and steps take uneven time."
        found = f"{facts.cpus} CPUs, of which this control group may use {facts.group_cpus:g}"
        return note("cpus", found, means, "CPUQuota= of the unit, or --cpus of the container")
    return good("cpus", f"{facts.cpus} CPUs")
