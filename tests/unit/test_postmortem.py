"""What is done about a failed engine, and in which order. The engine and the factory are stand-ins that keep a diary:
real ones are hurt in tests/faults."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.core.evidence import Evidence, Holder, Kind, Place
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import StartError
from llm_serve.host.nvml import NoGpus
from llm_serve.host.witnesses import Witnesses
from llm_serve.postmortem import Postmortem

OOM = "torch.OutOfMemoryError"


class _Gpus(NoGpus):
    """No GPU, but one that has something to say."""

    def __init__(self, diary: list[str]) -> None:
        super().__init__("no GPU")
        self._diary = diary
        self.reported: tuple[int, ...] = ()

    def holders(self, indices: Any, *, without: Any) -> tuple[Holder, ...]:
        self._diary.append("witnesses")
        return (Holder(0, 4711, "blender", 5 << 30),)

    def xids(self, indices: Any = None) -> tuple[int, ...]:
        return self.reported

    def forget_xids(self) -> None:
        self._diary.append("forget")


class Weights:
    """Held by nobody, unless a test says who does."""

    def __init__(self, diary: list[str]) -> None:
        self.pids: tuple[int, ...] = ()
        self._diary = diary

    def judge(self, *, has_come_up: bool) -> None:
        """Keep the verdict."""
        self._diary.append("come up" if has_come_up else "not come up")

    def drop(self) -> None:
        """Nobody holds them any more."""
        self._diary.append("drop")
        self.pids = ()


@dataclass
class Scene:
    """One postmortem and what it does to the world."""

    folder: Path
    diary: list[str] = field(default_factory=list)
    collector: Collector = field(default_factory=Collector)
    unkillable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.gpus = _Gpus(self.diary)
        self.postmortem = Postmortem(self, self.collector, Witnesses(self.gpus, ()), self.folder)  # type: ignore[arg-type]
        self.ending = self
        self.weights = Weights(self.diary)
        self.engine: Any = SimpleNamespace(
            exit_codes=lambda: {"EngineCore": -9},
            processes=[SimpleNamespace(pid=7)],
            steps=SimpleNamespace(waiting_for=lambda: "3 requests unfinished"),
        )
        self.diary.clear()

    async def dump_stacks(self) -> None:
        """As the factory's."""
        self.diary.append("stacks")

    async def kill(self, _engine: object) -> None:
        """As the factory's."""
        self.diary.append("kill")

    async def remains(self, _engine: object = None) -> tuple[str, ...]:
        """As the factory's."""
        self.diary.append("remains")
        return self.unkillable

    def pids(self) -> set[int]:
        """As the factory's: asked by the wait for GPU memory."""
        self.diary.append("memory")
        return set()

    def kept(self) -> list[dict[str, Any]]:
        """The failures on disk, newest first."""
        found: list[dict[str, Any]] = json.loads((self.folder / "failures.json").read_text())["value"]["failures"]
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A first failure is about to happen."""
    return Scene(tmp_path)


def oom_record(time: float) -> dict[str, Any]:
    """What a worker logs when memory runs out."""
    error = {"type": OOM, "text": "CUDA out of memory. Tried to allocate 2.00 GiB.", "frames": ["execute_model"]}
    return {
        "message": "failed",
        "level": "ERROR",
        "process": "VllmWorker-0",
        "pid": 7,
        "time": time,
        "exception": error,
    }


def test_evidence_comes_before_the_kill(scene: Scene) -> None:
    """What the machine saw is asked while the dead engine is still there, and memory after it is gone."""
    failure = asyncio.run(scene.postmortem.of_death(scene.engine))

    assert Kind.killed is failure.kind
    assert ["witnesses", "kill", "remains", "memory"] == scene.diary


@pytest.mark.parametrize("comes_after_s", [0.0, 0.05, 60.0])
def test_the_news_of_a_death_is_waited_for_but_not_for_long(
    scene: Scene, comes_after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as it is known how every process ended, or after a while, the next engine can be built."""
    limit_s = 3.0
    monkeypatch.setattr("llm_serve.postmortem._NEWS_S", limit_s)

    async def die() -> float:
        began = asyncio.get_running_loop().time()
        news = record_of_an_end(7)
        asyncio.get_running_loop().call_later(comes_after_s, scene.collector.add_record, news)
        await scene.postmortem.of_death(scene.engine)
        return asyncio.get_running_loop().time() - began

    took_s = asyncio.run(die())

    assert took_s >= limit_s if comes_after_s > limit_s else comes_after_s <= took_s < limit_s


def test_weights_stay_after_a_kill(scene: Scene) -> None:
    """The next engine of the same plan finds them."""
    scene.weights.pids = (42,)

    failure = asyncio.run(scene.postmortem.of_death(scene.engine))

    assert Kind.killed is failure.kind
    assert (42,) == scene.weights.pids
    assert "drop" not in scene.diary


def test_weights_go_where_another_plan_may_follow(scene: Scene) -> None:
    """After all else is gone, and their memory is waited for as well. An engine that has served has not failed to start."""
    scene.weights.pids = (42,)
    scene.collector.add_record(oom_record(time.time()))

    failure = asyncio.run(scene.postmortem.of_death(scene.engine))

    assert Kind.out_of_memory is failure.kind
    assert ["kill", "remains", "memory", "drop", "memory"] == scene.diary[-5:]


def test_weights_are_judged_by_a_start_that_fails(scene: Scene) -> None:
    """Whatever its kind: even a kill may have been the kernel's for memory that they hold."""
    scene.weights.pids = (42,)

    asyncio.run(scene.postmortem.of_start(StartError(Evidence(exit_codes={"EngineCore": -9}))))

    assert ["not come up", "drop", "memory"] == scene.diary[-3:]


def test_what_cannot_be_killed_is_the_failure(scene: Scene) -> None:
    """Its memory is not waited for: it will not come back."""
    scene.unkillable = ("VLLM::EngineCore (pid 7): D (disk sleep), waits in uvm_va_space_destroy",)
    failure = asyncio.run(scene.postmortem.of_death(scene.engine))

    assert Kind.unkillable is failure.kind
    assert ["witnesses", "kill", "remains"] == scene.diary
    assert scene.kept()[0]["evidence"]["unkillable"] == [*scene.unkillable]


def record_of_an_end(pid: int) -> dict[str, Any]:
    """What the fork server tells of a process that was killed."""
    return {"message": "has ended", "level": "WARNING", "process": "MainProcess", "pid": 1, "ended": [pid, -9]}


def test_stacks_come_first_of_all(scene: Scene) -> None:
    """A hang leaves nothing else to learn from."""
    with structlog.testing.capture_logs() as said:
        failure = asyncio.run(scene.postmortem.of_stall(scene.engine, 21.04))

    assert Kind.stalled is failure.kind
    assert "3 requests unfinished" in failure.detail
    assert ["stacks", "witnesses", "kill", "remains", "memory"] == scene.diary
    assert ("the engine stands still", 21.0) == (said[0]["event"], said[0]["seconds"])


def test_an_old_error_does_not_explain_a_death(scene: Scene) -> None:
    """An engine gets over many errors that it logs; one of yesterday is not the cause of today's SIGKILL."""
    scene.collector.add_record(oom_record(time=1.0))

    assert Kind.killed is asyncio.run(scene.postmortem.of_death(scene.engine)).kind


def test_one_entry_tells_it_all(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict and what led to it are one log entry, one value of /status and one of the state folder."""
    monkeypatch.setattr("time.time", lambda: 1000.0)
    scene.collector.add_record(oom_record(time=999.0))
    scene.collector.add_output("a last line")
    scene.gpus.reported = (31,)

    with structlog.testing.capture_logs() as said:
        failure = asyncio.run(scene.postmortem.of_death(scene.engine))

    assert (Kind.out_of_memory, Place.serving) == (failure.kind, failure.place)
    entry = next(each for each in said if each["event"] == "engine failed")
    assert {
        "kind": "out_of_memory",
        "place": "serving",
        "xids": "31",
        "exit_codes": "EngineCore -9",
        "gpu_holders": "blender (pid 4711) holds 5.0 GiB of GPU 0",
        "output": "a last line",
    }.items() <= entry.items()
    assert "execute_model" in entry["errors"]
    assert "kernel_log" not in entry, "what is empty is left out"
    assert "out_of_memory" == scene.postmortem.last[0]["failure"]["kind"] == scene.kept()[0]["failure"]["kind"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError([Problem("a.toml", 3, "engine.max_model_len", "It is too long.")]), Kind.configuration),
        (HostError("There is no space left on the device that holds /var/lib."), Kind.host_limit),
        (StartError(Evidence(exit_codes={"EngineCore": -9})), Kind.killed),
        (RuntimeError("vLLM's handlers do not take it"), Kind.crashed),
    ],
)
def test_a_failed_start_is_told_apart(scene: Scene, error: Exception, kind: Kind) -> None:
    """By what the factory raised; nothing is killed here any more."""
    assert kind is asyncio.run(scene.postmortem.of_start(error)).kind
    assert "kill" not in scene.diary


def test_the_last_ten_are_kept_newest_first(scene: Scene) -> None:
    """In memory as on disk."""
    for number in range(12):
        problem = Problem("a.toml", number, "model", f"failure {number}")
        asyncio.run(scene.postmortem.of_start(ConfigError([problem])))

    for entries in (list(scene.postmortem.last), scene.kept()):
        assert 10 == len(entries)
        assert "failure 11" in entries[0]["failure"]["detail"]


def test_a_full_disk_costs_the_copy_only(tmp_path: Path) -> None:
    """The verdict is given, with one warning more."""
    (tmp_path / "state").write_text("a file, where a folder should be")
    scene = Scene(tmp_path / "state")

    with structlog.testing.capture_logs() as said:
        assert Kind.killed is asyncio.run(scene.postmortem.of_death(scene.engine)).kind
    assert "warning" == said[-1]["log_level"]


def test_a_new_engine_answers_for_itself(scene: Scene) -> None:
    """Xids of the last one are forgotten when the next begins."""
    scene.postmortem.begin()

    assert ["forget"] == scene.diary
