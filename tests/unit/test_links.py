"""GPUs that cannot reach each other's memory, from the first hang to the next process: the parts together.

The hang, the driver's word and the engine are made up; evidence, verdict, decision and memory are the real ones.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_serve.core import learned
from llm_serve.core.actions import Action, Remember, StartEngine
from llm_serve.core.course import Course, Effective, Floors
from llm_serve.core.events import EngineFailed, EngineReady, HostReady, PauseOver
from llm_serve.core.evidence import Evidence
from llm_serve.core.failures import classify
from llm_serve.core.fallbacks import AUTO_BACKENDS
from llm_serve.core.machine import Situation, step
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import Choices, Limits

PLAN = EnginePlan("m", {"tensor_parallel_size": 2}, {})
TWO_GPUS = Effective(tensor_parallel_size=2, world_size=2)
LIMITS = Limits(restart_limit=8, restart_window_s=3600.0, choices=Choices(Floors(1024, 4), AUTO_BACKENDS))
PAIR = "GPU 0 and 1 (the chipset does not support it)"
KEY = learned.Key("f00", "0.32.0", ("NVIDIA L4 23034 MiB",) * 2, "folder abc")
CURE = ({"tensor_parallel_size": 2, "disable_custom_all_reduce": True}, {"NCCL_P2P_DISABLE": "1"})
HANGS: dict[str, dict[str, Any]] = {
    "stands still": {"phase": "starting the engine's processes", "stalled_for_s": 120.0},
    "takes too long": {"phase": "starting the engine's processes", "timed_out_after_s": 1800.0},
    "is aborted by NCCL": {"exit_codes": {"VllmWorker-1": -6}, "output_tail": ("ProcessGroupNCCL's watchdog",)},
}


class Life:
    """One process: facts go in, orders are kept."""

    def __init__(self, course: Course) -> None:
        self.now, self.clock, self.orders = Situation(LIMITS, Course(PLAN)), 0.0, list[Action]()
        self.tell(HostReady(course))

    def tell(self, event: Any) -> None:
        """A fact, a second after the last one; pauses pass at once."""
        self.clock += 1
        self.now, orders = step(self.now, event, self.clock)
        self.orders += orders
        if isinstance(event, EngineFailed):
            self.tell(PauseOver(self.now.epoch + 1))

    def hang(self, known: dict[str, Any], built: Effective = TWO_GPUS) -> None:
        """The start of the moment fails that way."""
        self.tell(EngineFailed(self.now.epoch, classify(Evidence(**known)), built))

    @property
    def plan(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What the last engine was started with."""
        last = [order.plan for order in self.orders if isinstance(order, StartEngine)][-1]
        return dict(last.arguments), dict(last.env)


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
@pytest.mark.parametrize(("no_p2p", "hangs"), [((PAIR,), 1), ((), 2)], ids=["the driver knows", "the driver does not"])
def test_the_cure_is_tried_told_and_remembered(hang: dict[str, Any], no_p2p: tuple[str, ...], hangs: int) -> None:
    """After one hang where the driver knows of a pair, after two elsewhere; the next process begins with it."""
    life = Life(Course(PLAN))
    for _ in range(hangs):
        assert life.plan == ({"tensor_parallel_size": 2}, {})
        life.hang(hang | {"no_p2p": no_p2p})

    assert life.plan == CURE
    (taken,) = life.now.course.steps
    assert taken.reason.startswith("NCCL_P2P_DISABLE unset -> 1, disable_custom_all_reduce false -> true, because of ")
    assert bool(no_p2p) == (PAIR in taken.reason) == (PAIR in str(life.now.last_failure))

    life.tell(EngineReady(life.now.epoch))
    course = [order.course for order in life.orders if isinstance(order, Remember)][-1]
    on_disk = json.loads(json.dumps(learned.to_json(course, KEY)))
    found = learned.steps_for(on_disk, KEY, PLAN)
    assert (found.steps, found.is_proven) == ((taken,), True)
    assert Life(Course(PLAN, found.steps)).plan == CURE


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_an_engine_on_one_gpu_never_has_the_cure(hang: dict[str, Any]) -> None:
    """Whatever the driver says of the others, and however often it hangs."""
    life = Life(Course(PLAN))
    for _ in range(6):
        life.hang(hang | {"no_p2p": (PAIR,)}, Effective())

    assert [] == [order for order in life.orders if isinstance(order, StartEngine) and order.plan.env]
