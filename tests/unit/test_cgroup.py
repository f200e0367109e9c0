"""Our control group's kills and limits, read from trees like those of real machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.host.cgroup import OomCounter, cpu_limit, memory_limit, task_limit

GIB = 1 << 30
V1_NO_LIMIT = "9223372036854771712\n"
V2_EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 0\n"
V1_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
HYBRID = "12:pids:/ours\n4:cpu,cpuacct:/ours\n3:memory:/ours\n1:name=systemd:/ours\n0::/ours\n"


class Machine:
    """A root folder with a /proc/self and control groups."""

    def __init__(self, root: Path) -> None:
        self.proc, self.v1, self.v2 = root / "proc", root / "memory", root / "unified"
        for folder in (self.proc, self.v1, self.v2):
            folder.mkdir()
        self.mount()

    def mount(self, v1_top: str = "/", v2_top: str = "/", *, has_v1: bool = True, has_v2: bool = True) -> None:
        """Write mountinfo; `top` is the group that stands at the mount point."""
        lines = ["22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
        lines += [f"32 31 0:29 / {self.v1}-cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"]
        lines += [f"35 31 0:32 {v1_top} {self.v1} rw,nosuid shared:12 - cgroup cgroup rw,memory"] if has_v1 else []
        lines += [f"41 31 0:38 {v2_top} {self.v2} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"] if has_v2 else []
        (self.proc / "mountinfo").write_text("\n".join(lines) + "\n")

    def belongs_to(self, lines: str) -> None:
        """Write /proc/self/cgroup."""
        (self.proc / "cgroup").write_text(lines)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with both versions mounted and no group at all."""
    return Machine(tmp_path)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def layout_v2(machine: Machine) -> Path:
    """As systemd sets it up."""
    machine.mount(has_v1=False)
    machine.belongs_to("0::/system.slice/llm-serve@a.service\n")
    return machine.v2 / "system.slice/llm-serve@a.service/memory.events"


def layout_v1(machine: Machine) -> Path:
    """Without version 2."""
    machine.mount(has_v2=False)
    machine.belongs_to("4:memory:/system.slice/a.service\n1:name=systemd:/system.slice/a.service\n")
    return machine.v1 / "system.slice/a.service/memory.oom_control"


def layout_hybrid(machine: Machine) -> Path:
    """Both are mounted; the memory controller is version 1's."""
    machine.belongs_to(HYBRID)
    write(machine.v2 / "ours/cgroup.procs", "1\n")
    return machine.v1 / "ours/memory.oom_control"


def layout_hybrid_without_v1_memory(machine: Machine) -> Path:
    """Both are mounted; the memory controller is version 2's."""
    machine.mount(has_v1=False)
    machine.belongs_to("4:cpu,cpuacct:/ours\n0::/ours\n")
    return machine.v2 / "ours/memory.events"


def layout_container(machine: Machine) -> Path:
    """Our own group is the top of what is mounted, and is called so."""
    machine.mount(has_v1=False)
    machine.belongs_to("0::/\n")
    return machine.v2 / "memory.events"


def layout_old_container(machine: Machine) -> Path:
    """The path is the host's, of which only our part is mounted; we are one group below it."""
    machine.mount(v1_top="/docker/4f2a", has_v2=False)
    machine.belongs_to("3:memory:/docker/4f2a/inner\n")
    return machine.v1 / "inner/memory.oom_control"


def layout_foreign_path(machine: Machine) -> Path:
    """The path leads nowhere: what is mounted is ours."""
    machine.mount(v1_top="/docker/4f2a", has_v2=False)
    machine.belongs_to("3:memory:/kubepods/pod1/77aa\n")
    return machine.v1 / "memory.oom_control"


LAYOUTS = [
    layout_v2,
    layout_v1,
    layout_hybrid,
    layout_hybrid_without_v1_memory,
    layout_container,
    layout_old_container,
    layout_foreign_path,
]
Layout = Callable[[Machine], Path]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__.removeprefix("layout_"))
def events(request: pytest.FixtureRequest, machine: Machine) -> tuple[Path, str]:
    """The file of our group that counts kills, and its text."""
    layout: Layout = request.param
    file = layout(machine)
    return file, V2_EVENTS if file.name == "memory.events" else V1_CONTROL


# Kills.
def test_kills_are_counted_from_the_beginning_on(machine: Machine, events: tuple[Path, str]) -> None:
    """What was before does not count, wherever our group is."""
    file, text = events
    write(file, text.format(4))
    counter = OomCounter(machine.proc)

    assert (True, 0) == (counter.is_readable, counter.kills())
    file.write_text(text.format(6))

    assert 2 == counter.kills()
    assert 0 == OomCounter(machine.proc).kills()


def test_version_1_counts_below_itself(machine: Machine) -> None:
    """There, each group counts its own; one that goes takes its count along, and that is not negative."""
    file = layout_v1(machine)
    write(file, V1_CONTROL.format(1))
    below = file.parent / "engine/memory.oom_control"
    write(below, V1_CONTROL.format(1))
    counter = OomCounter(machine.proc)

    below.write_text(V1_CONTROL.format(3))
    assert 2 == counter.kills()

    below.unlink()
    assert (0, True) == (counter.kills(), counter.is_readable)


@pytest.mark.parametrize("layout", [layout_v1, layout_v2])
def test_the_neighbours_are_none_of_ours(machine: Machine, layout: Layout) -> None:
    """A kill in another service's group is not counted."""
    file = layout(machine)
    text = V2_EVENTS if file.name == "memory.events" else V1_CONTROL
    write(file, text.format(0))
    write(file.parent.parent / "b.service" / file.name, text.format(0))
    counter = OomCounter(machine.proc)

    write(file.parent.parent / "b.service" / file.name, text.format(9))

    assert 0 == counter.kills()


def test_at_the_top_of_version_1_nobody_else_s_are_counted(machine: Machine) -> None:
    """A process in no group of its own has all services below it, which are not its own."""
    machine.mount(has_v2=False)
    machine.belongs_to("3:memory:/\n")
    write(machine.v1 / "memory.oom_control", V1_CONTROL.format(0))
    write(machine.v1 / "other/memory.oom_control", V1_CONTROL.format(0))
    counter = OomCounter(machine.proc)

    write(machine.v1 / "other/memory.oom_control", V1_CONTROL.format(1))

    assert 0 == counter.kills()


@pytest.mark.parametrize(
    "text",
    [None, "", "low 0\n\n", "oom_kill\n", "oom_kill many\n", "oom_kill_disable 0\nunder_oom 0\n"],
    ids=["absent", "empty", "blank", "no number", "no count", "old kernel"],
)
def test_what_cannot_be_read_counts_nothing(machine: Machine, events: tuple[Path, str], text: str | None) -> None:
    """No such file, or none that tells: 0, and it says so; the answer never turns into all that ever was."""
    file, real = events
    if text is not None:
        write(file, text)
    counter = OomCounter(machine.proc)

    assert (False, 0) == (counter.is_readable, counter.kills())
    write(file, real.format(7))
    assert (False, 0) == (counter.is_readable, counter.kills())


def test_without_proc_there_is_nothing(tmp_path: Path) -> None:
    """Where /proc is hidden, neither kills nor limits are known."""
    counter = OomCounter(tmp_path)

    assert (False, 0, None) == (counter.is_readable, counter.kills(), memory_limit(tmp_path))


# Limits.
@pytest.mark.parametrize(
    ("own", "slice_", "expected"),
    [
        ("max\n", "max\n", None),
        (f"{8 * GIB}\n", "max\n", 8 * GIB),
        (f"{8 * GIB}\n", f"{4 * GIB}\n", 4 * GIB),
        ("max\n", f"{4 * GIB}\n", 4 * GIB),
        ("nonsense\n", f"{4 * GIB}\n", 4 * GIB),
    ],
)
def test_the_tightest_limit_on_the_way_up_counts(machine: Machine, own: str, slice_: str, expected: int | None) -> None:
    """A slice's limit binds its services; "max" is none, and the topmost group has no file."""
    folder = layout_v2(machine).parent
    write(folder / "memory.max", own)
    write(folder.parent / "memory.max", slice_)
    write(machine.v2.parent / "memory.max", "1\n")

    assert expected == memory_limit(machine.proc)


@pytest.mark.parametrize(("own", "expected"), [(V1_NO_LIMIT, None), (f"{6 * GIB}\n", 6 * GIB)], ids=["none", "6 GiB"])
def test_version_1_says_no_limit_by_a_huge_number(machine: Machine, own: str, expected: int | None) -> None:
    """About 2**63 is no limit."""
    folder = layout_v1(machine).parent
    write(folder / "memory.limit_in_bytes", own)
    write(machine.v1 / "memory.limit_in_bytes", V1_NO_LIMIT)

    assert expected == memory_limit(machine.proc)


@pytest.mark.parametrize(
    ("own", "slice_", "expected"),
    [("max 100000\n", "max 100000\n", None), ("150000 100000\n", "400000 100000\n", 1.5), ("max 100000\n", "50000 100000\n", 0.5), ("?\n", "?\n", None)],
)  # fmt: skip
def test_the_tightest_quota_of_cpus_counts(machine: Machine, own: str, slice_: str, expected: float | None) -> None:
    """As CPUQuota= of a service and of its slice."""
    folder = layout_v2(machine).parent
    write(folder / "cpu.max", own)
    write(folder.parent / "cpu.max", slice_)

    assert expected == cpu_limit(machine.proc)


@pytest.mark.parametrize(("quota", "expected"), [("-1\n", None), ("200000\n", 2.0)])
def test_version_1_keeps_quota_and_period_apart(machine: Machine, quota: str, expected: float | None) -> None:
    """In the hierarchy of the cpu controller, whichever has memory's; -1 is none."""
    machine.belongs_to(HYBRID)
    folder = machine.v1.with_name("memory-cpu") / "ours"
    write(folder / "cpu.cfs_quota_us", quota)
    write(folder / "cpu.cfs_period_us", "100000\n")

    assert expected == cpu_limit(machine.proc)


@pytest.mark.parametrize(
    ("own", "slice_", "expected"), [("max\n", "max\n", None), ("max\n", "4915\n", 4915), ("64\n", "4915\n", 64)]
)
def test_the_tightest_limit_of_tasks_counts(machine: Machine, own: str, slice_: str, expected: int | None) -> None:
    """As TasksMax= of a service and of its slice."""
    folder = layout_v2(machine).parent
    write(folder / "pids.max", own)
    write(folder.parent / "pids.max", slice_)

    assert expected == task_limit(machine.proc)


# Any machine.
TEXTS = st.text(st.sampled_from("0:/ memory,cgroup2-rw\n"), max_size=60) | st.text(max_size=40)


@given(cgroup=TEXTS, mountinfo=TEXTS)
def test_no_text_of_proc_is_an_error(tmp_path_factory: pytest.TempPathFactory, cgroup: str, mountinfo: str) -> None:
    """Whatever stands in the two files, the answers are values."""
    proc = tmp_path_factory.mktemp("proc")
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo)

    assert 0 == OomCounter(proc).kills()
    assert (None, None, None) == (memory_limit(proc), task_limit(proc), cpu_limit(proc))


def test_this_machine_answers() -> None:
    """The real /proc of wherever this runs: no kill since a moment ago, and a limit that is one."""
    counter, limit = OomCounter(), memory_limit()

    assert counter.is_readable in (True, False)
    assert 0 == counter.kills()
    assert limit is None or limit > 0
