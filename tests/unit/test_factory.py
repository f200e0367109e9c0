"""What a factory settles before vLLM is loaded: its fork server's GPUs, what counts as a hang, what is left over."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_serve.core.course import Effective
from llm_serve.core.plan import EnginePlan
from llm_serve.core.progress import FIRST_TOKEN, LAUNCHING, MEETING, Phase
from llm_serve.engine import forkserver
from llm_serve.engine.ending import Places, remove_leftovers
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import Factory, Origin
from llm_serve.host import processes
from llm_serve.host.nvml import Gpu
from llm_serve.host.placement import Placement

UUID = "GPU-0123abcd-0123-0123-0123-0123456789ab"
PLACED = Placement((Gpu(3, UUID, "NVIDIA L4", "00000000:1B:00.0", 24 << 30),))


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    """One that has built nothing yet."""
    receiver: Any = SimpleNamespace(records_socket=tmp_path / "records", output_socket=tmp_path / "output")
    return Factory(Places(tmp_path, tmp_path), Collector(), receiver, Origin("a.toml"))


class ForkServer:
    """Writes down what it is started with."""

    def __init__(self) -> None:
        self.starts: list[str | None] = []
        self.is_alive = False

    def start(self, env: dict[str, str], *_: object) -> int:
        """It runs."""
        self.starts.append(env.get("CUDA_VISIBLE_DEVICES"))
        self.is_alive = True
        return 1

    def stop(self) -> None:
        """It does not."""
        self.is_alive = False

    def is_running(self) -> bool:
        """As left."""
        return self.is_alive


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ForkServer:
    """In place of the real one, which loads vLLM."""
    made = ForkServer()
    for name in ("start", "stop", "is_running"):
        monkeypatch.setattr(forkserver, name, getattr(made, name))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return made


def plan(**env: str) -> EnginePlan:
    """A plan with this environment."""
    return EnginePlan("m", {}, env)


def test_the_drivers_answer_does_not_load_vllm_twice(factory: Factory, server: ForkServer) -> None:
    """An index and the UUID of the same GPU are one: the fork server goes on; one that has died gets the UUID."""
    factory.prepare(plan(CUDA_VISIBLE_DEVICES="3"), [])
    factory.placement = PLACED
    factory.prepare(plan(CUDA_VISIBLE_DEVICES="3"), [])
    assert ["3"] == server.starts

    server.is_alive = False
    factory.prepare(plan(CUDA_VISIBLE_DEVICES="3"), [])
    assert ["3", UUID] == server.starts


def test_after_the_driver_the_fork_server_sees_the_right_gpu(factory: Factory, server: ForkServer) -> None:
    """vLLM asks the first GPU that it sees what it can do while it is loaded."""
    factory.placement = PLACED
    factory.prepare(plan(), [])

    assert [UUID] == server.starts


@pytest.mark.parametrize(
    ("built", "phase", "expected"),
    [
        (Effective(world_size=2), MEETING, True),
        (Effective(world_size=2), LAUNCHING, False),
        (Effective(world_size=2), FIRST_TOKEN, False),
        (Effective(world_size=2), None, False),
        (Effective(world_size=1), MEETING, False),
        (Effective(world_size=2, device="cpu"), MEETING, False),
    ],
)
def test_only_processes_that_meet_on_gpus_spin(
    factory: Factory, built: Effective, phase: Phase | None, expected: bool
) -> None:
    """Everywhere else CPU time is work."""
    factory.built, factory._collector.phase = built, phase

    assert expected is factory._is_meeting


def test_leftovers_of_another_instance_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where its name begins with ours and looks like one of our epochs."""
    runtime, temporary = tmp_path / "qwen", tmp_path / "tmp"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(processes, "strays", lambda _: [])
    ours = ["llm-serve-qwen-e1-abcd1234", "llm-serve-qwen-e12-ab_d1234"]
    others = ["llm-serve-qwen-e5-e1-abcd1234", "llm-serve-qwen7b-e1-abcd1234", "llm-serve-qwen-ex-abcd1234", "other"]
    for folder in (runtime, *(temporary / name for name in (*ours, *others))):
        folder.mkdir(parents=True)

    remove_leftovers(Places(runtime, runtime))

    assert sorted(others) == sorted(path.name for path in temporary.iterdir())
