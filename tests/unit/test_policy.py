"""What follows from a failure, by kind, by how often it has struck, and by what is left to try."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.course import Course, Effective, Floors, Step
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.fallbacks import AUTO_BACKENDS
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import REFUSED, RESPONSES, Again, Choices, GiveUp, Response, Strike, answer, response

COURSE = Course(EnginePlan("m", {}, {}))
PROVEN = replace(COURSE, is_proven=True)
CHOICES = Choices(Floors(256, 1), AUTO_BACKENDS)
GPU = Effective(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=8192, gpu_memory_utilization=0.9)
SMALLEST = Effective(max_model_len=256, max_num_seqs=1, max_num_batched_tokens=256, enforce_eager=True)
CPU = Effective(device="cpu", max_model_len=8192, max_num_seqs=64, enforce_eager=True)


def struck(kind: Kind, times: int = 1, place: Place = Place.start, built: Effective = GPU, **more: bool) -> Strike:
    """A failure of that kind, for that many times."""
    return Strike(Failure(kind, "it failed.", "Do this.", place), times, built=built, **more)


def test_every_kind_has_a_response() -> None:
    """A new kind without a row would be an error in the middle of a recovery."""
    assert set(Kind) == set(RESPONSES)
    assert all(RESPONSES.values())


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_only_a_person_can_change_is_refused(kind: Kind) -> None:
    """The first start says so with exit 78 and the advice; an engine that has served gets another try."""
    refused = answer(struck(kind), COURSE, CHOICES)

    assert GiveUp(78, f"{kind}: it failed. Do this.") == refused
    assert Again() == answer(struck(kind, has_served=True), COURSE, CHOICES)


@pytest.mark.parametrize("kind", [Kind.device_lost, Kind.unkillable])
def test_a_lost_gpu_ends_the_process(kind: Kind) -> None:
    """No new engine helps: systemd is told, and the next process looks for the GPU again."""
    assert GiveUp(70, f"{kind}: it failed. Do this.") == answer(struck(kind), COURSE, CHOICES)
    assert isinstance(answer(struck(kind, has_served=True), PROVEN, CHOICES), GiveUp)


@pytest.mark.parametrize(
    ("kind", "responses"),
    [
        (Kind.memory_held, ["again", "again", "again", "shrink", "shrink"]),
        (Kind.share_too_large, ["shrink"] * 3),
        (Kind.start_stalled, ["again", "switch", "switch"]),
        (Kind.stalled, ["again", "again", "switch", "switch"]),
        (Kind.killed, ["again"] * 9),
        (Kind.unknown, ["again"] * 9),
        (Kind.out_of_memory, ["shrink"] * 3),
    ],
)
def test_a_response_hangs_on_how_often_it_struck(kind: Kind, responses: list[str]) -> None:
    """The last of a row holds from there on."""
    found = [response(struck(kind).failure, times) for times in range(1, len(responses) + 1)]
    assert [Response(each) for each in responses] == found


def test_a_crash_while_serving_changes_no_plan() -> None:
    """A request may have caused it; at a start the third one is the way of computing."""
    serving, starting = struck(Kind.crashed, place=Place.serving), struck(Kind.crashed, place=Place.warm_up)

    assert {Response.again} == {response(serving.failure, times) for times in range(1, 9)}
    assert Response.switch is response(starting.failure, 3)


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        (Kind.out_of_memory, 1),
        (Kind.kv_cache_too_small, 1),
        (Kind.memory_held, 4),
        (Kind.share_too_large, 1),
        (Kind.attention_backend, 1),
    ],
)
def test_a_change_of_plan_is_one_step(kind: Kind, times: int) -> None:
    """What helps is taken, and says for which failure."""
    strike = struck(kind, times)
    half_free = replace(strike.failure, free_bytes=40 << 30, total_bytes=80 << 30)

    step = answer(replace(strike, failure=half_free), COURSE, CHOICES)

    assert isinstance(step, Step)
    assert step.kind is kind
    assert (kind is not Kind.attention_backend) == step.is_rung


NO_P2P = ("GPU 0 and 1 (not supported)",)
TP2 = replace(GPU, tensor_parallel_size=2, world_size=2)


@pytest.mark.parametrize(
    ("kind", "place", "no_p2p", "times", "expected"),
    [
        (Kind.start_stalled, Place.start, NO_P2P, 1, Step),
        (Kind.start_timeout, Place.profiling, NO_P2P, 1, Step),
        (Kind.communication, Place.start, NO_P2P, 1, Step),
        (Kind.communication, Place.serving, NO_P2P, 1, Again),
        (Kind.communication, Place.serving, NO_P2P, 2, Step),
        (Kind.start_stalled, Place.start, (), 1, Again),
        (Kind.start_stalled, Place.start, (), 2, Step),
        (Kind.crashed, Place.start, NO_P2P, 1, Again),
    ],
)
def test_the_first_hang_of_gpus_without_p2p_is_no_chance(
    kind: Kind, place: Place, no_p2p: tuple[str, ...], times: int, expected: type
) -> None:
    """Where the driver says so, the cure is not kept waiting for a second hang; a death while serving may be chance."""
    strike = struck(kind, times, place, TP2)
    strike = replace(strike, failure=replace(strike.failure, no_p2p=no_p2p))
    found = answer(strike, COURSE, CHOICES)

    assert isinstance(found, expected)
    assert not isinstance(found, Step) or {"NCCL_P2P_DISABLE": "1"} == found.env
    assert isinstance(answer(replace(strike, times=1, built=GPU), COURSE, CHOICES), Again), "an engine on one GPU"


def test_when_gpus_stay_apart_without_p2p_it_goes_on_being_tried() -> None:
    """The cure is taken once; after it the restart limit decides."""
    strike = struck(Kind.communication, built=TP2)
    strike = replace(strike, failure=replace(strike.failure, no_p2p=NO_P2P))
    cure = answer(strike, COURSE, CHOICES)

    assert isinstance(cure, Step)
    assert Again() == answer(strike, COURSE.and_then(cure), CHOICES)


def test_a_kill_for_memory_on_one_numa_node_unbinds() -> None:
    """No smaller plan helps an engine on a GPU, but the other nodes may have memory."""
    bound = struck(Kind.host_out_of_memory, built=replace(GPU, numa_bind=True))
    step = answer(bound, COURSE, CHOICES)

    assert isinstance(step, Step)
    assert {"numa_bind": False, "numa_bind_nodes": None, "numa_bind_cpus": None} == step.arguments
    assert not step.is_rung
    assert Again() == answer(struck(Kind.host_out_of_memory), COURSE, CHOICES)


def test_at_the_floors_a_plan_that_never_held_is_given_up() -> None:
    """Exit 70, so that systemd's limit counts it, with what a person can do."""
    gave_up = answer(struck(Kind.out_of_memory, built=SMALLEST), COURSE, CHOICES)

    # Utilization and chunks can still go down; the ladder's own tests walk it to the end.
    course, built, seen = COURSE, SMALLEST, 0
    while isinstance(gave_up, Step):
        course, seen = course.and_then(gave_up), seen + 1
        built = replace(
            built, **{name: value for name, value in gave_up.arguments.items() if name in Effective.__slots__}
        )
        gave_up = answer(struck(Kind.out_of_memory, built=built), course, CHOICES)
        assert seen < 100
    assert isinstance(gave_up, GiveUp)
    assert gave_up.status == 70
    assert gave_up.why.startswith("out_of_memory: it failed. Do this. ")


def test_at_the_floors_a_plan_that_has_held_is_tried_again() -> None:
    """What has served may serve again when somebody lets go of the memory; the restart limit ends it."""
    course = replace(PROVEN, steps=())
    built = replace(SMALLEST, device="cpu")

    assert Again() == answer(struck(Kind.kv_cache_too_small, built=built), course, CHOICES)


def test_without_another_way_of_computing_a_person_is_asked() -> None:
    """When every backend fell, it is exit 78; a hang may also be chance, and goes on being tried."""
    backends = Choices(Floors(256, 1), ())
    eager = replace(GPU, enforce_eager=True)

    gave_up = answer(struck(Kind.compilation, built=eager), COURSE, backends)
    assert isinstance(gave_up, GiveUp)
    assert gave_up.status == 78
    assert Again() == answer(struck(Kind.stalled, 3, built=replace(CPU)), COURSE, backends)


@given(
    kind=st.sampled_from(Kind),
    place=st.sampled_from(Place),
    times=st.integers(1, 20),
    has_served=st.booleans(),
    is_proven=st.booleans(),
    built=st.sampled_from([Effective(), GPU, SMALLEST, CPU]),
)
def test_every_failure_has_an_answer(
    *, kind: Kind, place: Place, times: int, has_served: bool, is_proven: bool, built: Effective
) -> None:
    """Total; what has served is given up only with its device, and each step respects the floors."""
    strike = struck(kind, times, place, built, has_served=has_served)
    course = replace(COURSE, is_proven=is_proven or has_served)

    found = answer(strike, course, CHOICES)

    if isinstance(found, GiveUp):
        assert found.status in {70, 78}
        assert not course.is_proven or kind in {Kind.device_lost, Kind.unkillable} or kind in REFUSED
        assert not (has_served and found.status == 78)
    elif isinstance(found, Step):
        assert found.arguments or found.env
        assert found.arguments.get("max_model_len", 256) >= 256
        assert found.arguments.get("max_num_seqs", 1) >= 1
