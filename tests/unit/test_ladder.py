"""The next smaller plan: what each kind of failure changes, and that a walk down ends, lowers only, and stays valid."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serve.core.course import Course, Effective, Floors, Step
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.ladder import LEAST_BATCHED_TOKENS, LEAST_UTILIZATION, NoStep, next_step
from llm_serve.core.plan import EnginePlan

MIB, GIB = 1 << 20, 1 << 30
FLOORS = Floors(max_model_len=2048, max_num_seqs=4)
BUILT = Effective(
    max_model_len=16384,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    gpu_memory_utilization=0.92,
    device_memory_bytes=24 * GIB,
)
ON_CPU = replace(BUILT, device="cpu", device_memory_bytes=64 * GIB)


def course(arguments: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> Course:
    """Nothing but what the file asks for."""
    return Course(EnginePlan("m", arguments or {}, env or {}))


def fails(kind: Kind, place: Place = Place.start, **numbers: Any) -> Failure:
    """A verdict."""
    return Failure(kind, "it failed.", place=place, **numbers)


def oom(place: Place, **numbers: Any) -> Failure:
    """Memory ran out there."""
    return fails(Kind.out_of_memory, place, **numbers)


def built_with(now: Effective, step: Step) -> Effective:
    """What the next engine is built with: the step's changes on top of what this one was built with."""
    known = {field.name for field in fields(Effective)}
    return replace(now, **{name: value for name, value in step.arguments.items() if name in known})


def walk(at: Course, failure: Failure, now: Effective, most: int = 100, floors: Floors = FLOORS) -> list[Step]:
    """The steps that one failure leads to that no step cures."""
    steps: list[Step] = []
    while isinstance(step := next_step(at, failure, now, floors), Step):
        steps.append(step)
        assert len(steps) <= most, "the ladder does not end"
        at, now = at.and_then(step), built_with(now, step)
    return steps


def changes(steps: list[Step]) -> list[dict[str, Any]]:
    """What each changes."""
    return [dict(step.arguments) for step in steps]


TOO_SMALL = Kind.kv_cache_too_small
NO_CACHE = Kind.no_kv_cache


@pytest.mark.parametrize(
    ("failure", "now", "expected"),
    [
        pytest.param(fails(TOO_SMALL, fitting_model_len=9360), BUILT, {"max_model_len": 9344}, id="kv cache: estimate"),
        pytest.param(fails(TOO_SMALL, fitting_model_len=9375), BUILT, {"max_model_len": 9344}, id="kv cache: whole blocks"),
        pytest.param(fails(TOO_SMALL, fitting_model_len=9360), replace(BUILT, block_size=128), {"max_model_len": 9216}, id="kv cache: larger blocks"),
        pytest.param(fails(TOO_SMALL, fitting_model_len=2050), BUILT, {"max_model_len": 2048}, id="kv cache: the floor still fits"),
        pytest.param(fails(TOO_SMALL), BUILT, {"max_model_len": 8192}, id="kv cache: no estimate"),
        pytest.param(fails(TOO_SMALL, fitting_model_len=20000), BUILT, {"max_model_len": 8192}, id="kv cache: estimate above the plan"),
        pytest.param(fails(TOO_SMALL, fitting_model_len=9360), Effective(), {"max_model_len": 9344}, id="kv cache: nothing known"),
        pytest.param(fails(NO_CACHE), BUILT, {"max_num_batched_tokens": 1024}, id="no kv cache"),
        pytest.param(fails(NO_CACHE), replace(BUILT, max_num_batched_tokens=512), {"max_num_seqs": 128}, id="no kv cache: smallest step"),
        pytest.param(oom(Place.profiling), BUILT, {"max_num_batched_tokens": 1024}, id="profiling"),
        pytest.param(oom(Place.profiling), replace(BUILT, max_num_batched_tokens=700), {"max_num_batched_tokens": 512}, id="profiling: down to 512"),
        pytest.param(oom(Place.profiling), replace(BUILT, max_num_seqs=600, max_num_batched_tokens=1000), {"max_num_batched_tokens": 600}, id="profiling: a token of each sequence"),
        pytest.param(oom(Place.profiling), replace(BUILT, max_num_batched_tokens=512), {"max_num_seqs": 128}, id="profiling: smallest step"),
        pytest.param(oom(Place.profiling), replace(BUILT, max_num_batched_tokens=16384, chunked_prefill=False), {"max_num_seqs": 128}, id="profiling: a whole prompt in one step"),
        pytest.param(oom(Place.warm_up), BUILT, {"max_num_seqs": 128}, id="warm-up"),
        pytest.param(oom(Place.warm_up), replace(BUILT, max_num_seqs=4), {"gpu_memory_utilization": 0.89}, id="warm-up: fewest sequences"),
        pytest.param(oom(Place.capture), BUILT, {"gpu_memory_utilization": 0.9}, id="capture"),
        pytest.param(oom(Place.kv_cache), BUILT, {"gpu_memory_utilization": 0.89}, id="kv cache allocation"),
        pytest.param(oom(Place.kv_cache, tried_bytes=GIB), BUILT, {"gpu_memory_utilization": 0.85}, id="kv cache allocation: what was tried"),
        pytest.param(oom(Place.start), BUILT, {"gpu_memory_utilization": 0.89}, id="nobody knows where"),
        pytest.param(oom(Place.serving), BUILT, {"gpu_memory_utilization": 0.9, "max_num_seqs": 128}, id="serving"),
        pytest.param(oom(Place.serving, tried_bytes=2 * GIB), BUILT, {"gpu_memory_utilization": 0.8, "max_num_seqs": 128}, id="serving: what was tried"),
        pytest.param(oom(Place.serving, tried_bytes=2 * GIB, total_bytes=24 * GIB), replace(BUILT, device_memory_bytes=None), {"gpu_memory_utilization": 0.8, "max_num_seqs": 128}, id="serving: the failure knows the device"),
        pytest.param(oom(Place.serving, tried_bytes=2 * GIB), replace(BUILT, device_memory_bytes=None), {"gpu_memory_utilization": 0.87, "max_num_seqs": 128}, id="serving: unknown device"),
        pytest.param(oom(Place.serving), Effective(device_memory_bytes=24 * GIB), {"gpu_memory_utilization": 0.88}, id="serving: nothing known"),
        pytest.param(fails(Kind.too_many_sequences, fitting_num_seqs=100), BUILT, {"max_num_seqs": 100}, id="sequences"),
        pytest.param(fails(Kind.too_many_sequences), BUILT, {"max_num_seqs": 128}, id="sequences: no number"),
        pytest.param(fails(Kind.memory_held, free_bytes=12 * GIB, total_bytes=24 * GIB), BUILT, {"gpu_memory_utilization": 0.49}, id="held"),
        pytest.param(fails(Kind.memory_held, free_bytes=30, total_bytes=100), replace(BUILT, gpu_memory_utilization=0.31), NoStep, id="held: too little"),
        pytest.param(fails(Kind.memory_held, free_bytes=31, total_bytes=100), BUILT, {"gpu_memory_utilization": 0.3}, id="held: just enough"),
        pytest.param(fails(Kind.share_too_large, free_bytes=99, total_bytes=100), replace(BUILT, gpu_memory_utilization=0.999), {"gpu_memory_utilization": 0.98}, id="more than there is"),
        pytest.param(fails(Kind.memory_held, free_bytes=95, total_bytes=100), BUILT, NoStep, id="held: it would have fitted"),
        pytest.param(fails(Kind.memory_held), BUILT, NoStep, id="held: no numbers"),
        pytest.param(fails(Kind.host_out_of_memory, Place.serving), BUILT, NoStep, id="host memory on a GPU"),
        pytest.param(fails(Kind.host_out_of_memory, Place.serving), ON_CPU, {"gpu_memory_utilization": 0.69, "max_num_seqs": 128}, id="host memory on a CPU"),
        pytest.param(fails(Kind.host_out_of_memory, Place.loading), ON_CPU, NoStep, id="host memory while loading"),
        pytest.param(oom(Place.loading), BUILT, NoStep, id="weights"),
        pytest.param(fails(Kind.weights_do_not_fit, Place.loading), BUILT, NoStep, id="weights do not fit"),
    ],
)  # fmt: skip
def test_one_failure_is_one_rung(failure: Failure, now: Effective, expected: Any) -> None:
    """Each kind and place has its lever, down to its floor."""
    step = next_step(course(), failure, now, FLOORS)

    assert expected == (dict(step.arguments) if isinstance(step, Step) else type(step))


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        pytest.param(
            oom(Place.capture),
            [{"gpu_memory_utilization": 0.9}, {"gpu_memory_utilization": 0.88}, {"max_num_seqs": 128}, {"enforce_eager": True}],
            id="capture: room, room, fewer graphs, none",
        ),
        pytest.param(
            fails(NO_CACHE),
            [
                {"max_num_batched_tokens": 1024}, {"max_num_batched_tokens": 512}, {"max_num_seqs": 128}, {"enforce_eager": True},
                {"max_num_seqs": 64}, {"max_num_seqs": 32}, {"max_num_seqs": 16}, {"max_num_seqs": 8}, {"max_num_seqs": 4},
            ],
            id="no kv cache: every step above eager first",
        ),
        pytest.param(
            oom(Place.kv_cache),
            [{"gpu_memory_utilization": share} for share in (0.89, 0.83, 0.71, 0.47, 0.3)],
            id="kv cache: twice as much each time",
        ),
        pytest.param(
            oom(Place.serving),
            [
                {"gpu_memory_utilization": 0.9, "max_num_seqs": 128},
                {"gpu_memory_utilization": 0.88, "max_num_seqs": 64, "max_num_batched_tokens": 1024},
                {"gpu_memory_utilization": 0.86, "max_num_seqs": 32, "max_model_len": 8192, "max_num_batched_tokens": 512},
            ],
            id="serving: sequences, then steps, then length",
        ),
        pytest.param(
            fails(Kind.too_many_sequences, fitting_num_seqs=3),
            [],
            id="sequences: under the floor",
        ),
    ],
)  # fmt: skip
def test_the_same_failure_again_walks_on(failure: Failure, expected: list[dict[str, Any]]) -> None:
    """The rungs come in their order; the first of them are these, and after the last there is none."""
    steps = changes(walk(course(), failure, BUILT))

    assert expected == steps[: len(expected)]
    assert len(expected) == len(steps) or failure.place is Place.serving


def test_the_estimate_cures_it_in_one_restart() -> None:
    """What is asked for next is a block under what vLLM says would fit, so that its own check passes."""
    step = next_step(course({"max_model_len": 32768}), fails(TOO_SMALL, fitting_model_len=9360), BUILT, FLOORS)

    assert isinstance(step, Step)
    assert 9360 - 2 * 16 < step.arguments["max_model_len"] <= 9360 - 16
    assert "max_model_len 16384 -> 9344" in step.reason
    assert "9360" in step.reason


def test_a_pool_that_differs_from_start_to_start_costs_no_second_surprise() -> None:
    """Where the estimate was not enough, the next rung is a sixteenth under the new one."""
    at, failure = course(), fails(TOO_SMALL, fitting_model_len=9360)
    first = next_step(at, failure, BUILT, FLOORS)
    assert isinstance(first, Step)

    second = next_step(at.and_then(first), replace(failure, fitting_model_len=9200), built_with(BUILT, first), FLOORS)

    assert isinstance(second, Step)
    assert {"max_model_len": 9200 * 15 // 16 // 16 * 16 - 16} == second.arguments


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        pytest.param(fails(TOO_SMALL, fitting_model_len=1000), ("1000 tokens fit", "2048", "0.92", "fp8", "quantised"), id="kv cache"),
        pytest.param(fails(Kind.too_many_sequences, fitting_num_seqs=3), ("only 3 sequences", "floor_max_num_seqs is 4"), id="sequences"),
        pytest.param(fails(Kind.memory_held, free_bytes=GIB, total_bytes=24 * GIB), ("1.00 GiB of 24.00 GiB", "stop"), id="held"),
        pytest.param(fails(Kind.memory_held), ("Stop what holds",), id="held: no numbers"),
        pytest.param(fails(Kind.host_out_of_memory), ("MemoryMax", "MAX_JOBS"), id="host"),
        pytest.param(oom(Place.loading), ("quantised", "cpu_offload_gb"), id="weights"),
        pytest.param(fails(Kind.weights_do_not_fit), ("quantised", "cpu_offload_gb"), id="weights do not fit"),
        pytest.param(fails(Kind.toolchain), ("No smaller plan",), id="no matter of size"),
    ],
)  # fmt: skip
def test_where_no_smaller_plan_helps_a_person_is_told_what_does(failure: Failure, words: tuple[str, ...]) -> None:
    """The advice has the numbers that are known and the names of the settings."""
    answer = next_step(course(), failure, BUILT, FLOORS)

    assert isinstance(answer, NoStep)
    assert [] == [word for word in words if word not in answer.advice]


@pytest.mark.parametrize("place", [place for place in Place if place is not Place.loading])
def test_at_the_bottom_the_advice_names_the_floors(place: Place) -> None:
    """After the last rung for memory, both floors are named with their settings."""
    bottom = replace(
        BUILT, max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=512, gpu_memory_utilization=0.3, enforce_eager=True
    )  # fmt: skip
    answer = next_step(course(), oom(place), bottom, FLOORS)

    assert isinstance(answer, NoStep)
    assert "2048 tokens and 4 sequences" in answer.advice


def test_a_wish_below_the_floor_is_the_floor() -> None:
    """What the file itself asks for is never too small, and never lowered."""
    asked = course({"max_model_len": 1024, "max_num_seqs": 2})
    now = replace(BUILT, max_model_len=1024, max_num_seqs=2, max_num_batched_tokens=512, gpu_memory_utilization=0.3)

    assert isinstance(next_step(asked, oom(Place.serving), now, FLOORS), NoStep)
    assert isinstance(next_step(asked, fails(TOO_SMALL, fitting_model_len=1000), now, FLOORS), NoStep)


@pytest.mark.parametrize(
    ("failure", "now", "expected"),
    [
        pytest.param(oom(Place.serving), BUILT, 8 * GIB - 8 * GIB // 20, id="a twentieth"),
        pytest.param(oom(Place.serving, tried_bytes=GIB), BUILT, 8 * GIB - GIB * 5 // 4 - 256 * MIB, id="what was tried"),
        pytest.param(oom(Place.serving, tried_bytes=32 * GIB), BUILT, 4 * GIB, id="never more than half"),
        pytest.param(oom(Place.capture), BUILT, 8 * GIB - 8 * GIB // 20, id="capture"),
        pytest.param(fails(Kind.host_out_of_memory, Place.serving), ON_CPU, 6 * GIB, id="a quarter where nobody says how much"),
    ],
)  # fmt: skip
def test_a_fixed_pool_gives_up_bytes_instead_of_a_share(failure: Failure, now: Effective, expected: int) -> None:
    """Utilization does nothing then, and stays as it is."""
    now = replace(now, kv_cache_memory_bytes=8 * GIB)
    step = next_step(course({"kv_cache_memory_bytes": 8 * GIB}), failure, now, FLOORS)

    assert isinstance(step, Step)
    assert expected == pytest.approx(step.arguments["kv_cache_memory_bytes"], abs=1)
    assert "gpu_memory_utilization" not in step.arguments


def test_the_last_rung_of_a_fixed_pool_is_the_eighth_itself() -> None:
    """Half of what is left would be less than that."""
    now = replace(BUILT, kv_cache_memory_bytes=40 * MIB)
    step = next_step(course({"kv_cache_memory_bytes": 256 * MIB}), oom(Place.kv_cache), now, FLOORS)

    assert isinstance(step, Step)
    assert {"kv_cache_memory_bytes": 32 * MIB} == step.arguments


def test_a_prompt_that_is_not_cut_still_fits_into_one_step() -> None:
    """Without chunked prefill a step gets smaller with the longest request, in one rung."""
    now = replace(BUILT, max_num_batched_tokens=16384, chunked_prefill=False)
    steps = walk(course(), oom(Place.serving), now)

    assert [(None, None), (None, None), (8192, 8192), (4096, 4096), (2048, 2048)] == [
        (step.arguments.get("max_model_len"), step.arguments.get("max_num_batched_tokens")) for step in steps[:5]
    ]


def test_a_fixed_pool_stops_at_an_eighth() -> None:
    """It is halved three times at the most, and from there on only the rest of the plan gets smaller."""
    asked = course({"kv_cache_memory_bytes": 256 * MIB})
    steps = walk(asked, oom(Place.serving), replace(BUILT, kv_cache_memory_bytes=256 * MIB))

    sizes = [step.arguments["kv_cache_memory_bytes"] for step in steps if "kv_cache_memory_bytes" in step.arguments]
    assert [128 * MIB, 64 * MIB, 32 * MIB] == sizes


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        pytest.param({}, {"VLLM_CPU_KVCACHE_SPACE": "8"}, id="of the file"),
        pytest.param({}, {}, id="of the daemon"),
        pytest.param({"kv_cache_memory_bytes": GIB}, {"VLLM_CPU_KVCACHE_SPACE": "8"}, id="above the argument"),
    ],
)
def test_a_pool_of_the_environment_is_lowered_there(arguments: dict[str, Any], env: dict[str, str]) -> None:
    """vLLM's CPU platform reads whole GiB from it and forgets the argument."""
    now = replace(ON_CPU, kv_cache_memory_bytes=8 * GIB)
    step = next_step(course(arguments, env), oom(Place.serving), now, FLOORS)

    assert isinstance(step, Step)
    assert (7 * GIB, {"VLLM_CPU_KVCACHE_SPACE": "7"}) == (step.arguments["kv_cache_memory_bytes"], step.env)


def test_the_last_gib_of_the_environment_stays() -> None:
    """0 would be no KV cache at all, so only the sequences get fewer."""
    now = replace(ON_CPU, kv_cache_memory_bytes=GIB)
    step = next_step(course(env={"VLLM_CPU_KVCACHE_SPACE": "1"}), oom(Place.serving), now, FLOORS)

    assert isinstance(step, Step)
    assert ({"max_num_seqs": 128}, {}) == (step.arguments, step.env)


def test_a_fixed_pool_of_a_cpu_fits_beside_what_others_hold() -> None:
    """There the pool itself is compared with what is free."""
    now = replace(ON_CPU, kv_cache_memory_bytes=8 * GIB)
    held = fails(Kind.memory_held, free_bytes=4 * GIB, total_bytes=64 * GIB)
    step = next_step(course({"kv_cache_memory_bytes": 8 * GIB}), held, now, FLOORS)

    assert isinstance(step, Step)
    assert {"kv_cache_memory_bytes": 4 * GIB // 100 * 95} == step.arguments


@pytest.mark.parametrize(("env", "expected"), [({}, {}), ({"VLLM_ENABLE_STARTUP_PLAN": "0"}, {}), ({"VLLM_ENABLE_STARTUP_PLAN": "1"}, {"VLLM_ENABLE_STARTUP_PLAN": "0"})], ids=["not set", "off", "on"])  # fmt: skip
def test_a_remembered_pool_is_not_applied_again(env: dict[str, str], expected: dict[str, str]) -> None:
    """vLLM's start-up plan would bring back the size that failed, for it does not look at the utilization."""
    step = next_step(course(env=env), oom(Place.serving), BUILT, FLOORS)

    assert isinstance(step, Step)
    assert expected == step.env


@pytest.mark.parametrize(
    ("failure", "arguments", "expected"),
    [
        pytest.param(oom(Place.warm_up), {"max_num_active_seqs": 200}, {"max_num_seqs": 128, "max_num_active_seqs": 128}, id="active sequences"),
        pytest.param(oom(Place.warm_up), {"max_num_active_seqs": 100}, {"max_num_seqs": 128}, id="active sequences are few enough"),
        pytest.param(fails(TOO_SMALL), {"long_prefill_token_threshold": 9000}, {"max_model_len": 8192, "long_prefill_token_threshold": 8192}, id="long prefill"),
        pytest.param(oom(Place.profiling), {"disable_chunked_mm_input": True}, {"max_num_seqs": 128}, id="whole images"),
        pytest.param(oom(Place.profiling), {"speculative_config": {"num_speculative_tokens": 4}}, {"max_num_batched_tokens": 1280}, id="drafted tokens"),
    ],
)  # fmt: skip
def test_what_vllm_checks_against_a_lowered_value_follows(
    failure: Failure, arguments: dict[str, Any], expected: Any
) -> None:
    """A rung that vLLM refuses as a contradiction would end the service with exit 78."""
    step = next_step(course(arguments), failure, BUILT, FLOORS)

    assert isinstance(step, Step)
    assert expected == step.arguments


def test_many_sequences_are_cut_to_where_the_graphs_get_fewer() -> None:
    """Above 256 sequences vLLM captures the same graphs, so a half of 1024 would be a start for nothing."""
    steps = walk(course(), oom(Place.capture), replace(BUILT, max_num_seqs=1024))

    assert [{"max_num_seqs": 128}] == [change for change in changes(steps) if "max_num_seqs" in change]


def test_no_eager_on_a_cpu() -> None:
    """There are no graphs whose memory it could give back."""
    steps = walk(course(), fails(NO_CACHE), ON_CPU)

    assert [] == [change for change in changes(steps) if "enforce_eager" in change]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in {
    Kind.kv_cache_too_small, Kind.no_kv_cache, Kind.out_of_memory, Kind.too_many_sequences, Kind.memory_held,
    Kind.share_too_large,
}])  # fmt: skip
def test_what_is_no_matter_of_size_has_no_rung(kind: Kind) -> None:
    """On a GPU only the six kinds of memory have rungs; every other kind has advice."""
    answers = [next_step(course(), fails(kind, place), BUILT, FLOORS) for place in Place]

    assert [] == [answer for answer in answers if not (isinstance(answer, NoStep) and answer.advice)]


MEMORY_KINDS = (*[Kind.out_of_memory] * 3, Kind.kv_cache_too_small, Kind.no_kv_cache, Kind.too_many_sequences, Kind.memory_held, Kind.share_too_large, Kind.host_out_of_memory)  # fmt: skip
AMOUNTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes")


@st.composite
def engines(draw: st.DrawFn) -> Effective:
    """What vLLM may be built with: values that it takes together, some of them unknown."""
    length = draw(st.integers(1, 1 << 20))
    seqs = draw(st.integers(1, 2048))
    chunked = draw(st.booleans())
    least = max(seqs, 1 if chunked else length)
    size = draw(st.sampled_from((None, 1, 200 * MIB, 8 * GIB, 100 * GIB)))
    whole = Effective(
        device=draw(st.sampled_from(("cuda", "cpu"))),
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(least, least + (1 << 17))),
        block_size=draw(st.sampled_from((16, 128, 1056))),
        gpu_memory_utilization=draw(st.floats(0.01, 1.0)),
        kv_cache_memory_bytes=size,
        device_memory_bytes=draw(st.sampled_from((None, 16 * GIB, 141 * GIB))),
        enforce_eager=draw(st.booleans()),
        chunked_prefill=chunked,
    )
    unknown = draw(st.sets(st.sampled_from(AMOUNTS), max_size=2))
    nothing: dict[str, Any] = dict.fromkeys(unknown)
    return replace(whole, **nothing)


@st.composite
def asked_for(draw: st.DrawFn, now: Effective) -> Course:
    """A file that says some of it."""
    said = {name: value for name in AMOUNTS if (value := getattr(now, name)) is not None and draw(st.booleans())}
    env = draw(st.sampled_from(({}, {"VLLM_ENABLE_STARTUP_PLAN": "1"}, {"VLLM_CPU_KVCACHE_SPACE": "8"})))
    return course(said, env)


failures = st.builds(
    Failure,
    kind=st.sampled_from(MEMORY_KINDS),
    detail=st.just("it failed."),
    place=st.sampled_from(Place),
    tried_bytes=st.one_of(st.none(), st.integers(0, 200 * GIB)),
    fitting_model_len=st.one_of(st.none(), st.integers(0, 1 << 20)),
    fitting_num_seqs=st.one_of(st.none(), st.integers(0, 3000)),
    free_bytes=st.one_of(st.none(), st.integers(0, 24 * GIB)),
    total_bytes=st.one_of(st.none(), st.integers(24 * GIB, 141 * GIB)),
)
floors_of_a_file = st.builds(Floors, st.integers(1, 1 << 16), st.integers(1, 512))

LONGEST_WALK = 120
"""Halves of 2^20 tokens, 2^18 in a step and 2^11 sequences, 31 shares of 0.02, 42 twentieths of a pool, and eager."""


@settings(max_examples=300)
@given(st.data(), engines(), floors_of_a_file)
def test_every_walk_ends_and_every_rung_is_smaller_and_valid(st_data: Any, now: Effective, floors: Floors) -> None:
    """Whatever fails in whatever order: nothing is raised, no floor is crossed, each plan is new, and it comes to an end."""
    at = st_data.draw(asked_for(now))
    faults = st_data.draw(st.lists(failures, min_size=1, max_size=4))
    count = 0
    for failure in [*faults, *faults]:
        while isinstance(step := next_step(at, failure, now, floors), Step):
            after = at.and_then(step)
            count += 1
            assert count <= LONGEST_WALK
            assert_smaller(step, now, floors)
            assert_valid(built_with(now, step))
            assert step.is_rung
            assert at.plan.fingerprint() != after.plan.fingerprint()
            at, now = after, built_with(now, step)
            if st_data.draw(st.booleans()):
                break


def assert_smaller(step: Step, now: Effective, floors: Floors) -> None:
    """Every value is under the one before and not under its floor, and the reason has both."""
    least = {
        "max_model_len": floors.max_model_len,
        "max_num_seqs": floors.max_num_seqs,
        "max_num_batched_tokens": LEAST_BATCHED_TOKENS,
        "gpu_memory_utilization": LEAST_UTILIZATION,
        "kv_cache_memory_bytes": 0,
    }
    for name, value in step.arguments.items():
        assert name in step.reason
        if name == "enforce_eager":
            assert (False, True) == (now.enforce_eager, value)
            continue
        before = getattr(now, name)
        assert least[name] <= value
        assert before is None or value < before
        assert name == "kv_cache_memory_bytes" or f"-> {value:g}" in step.reason or f"-> {value}" in step.reason
        assert before is None or name == "kv_cache_memory_bytes" or f"{before:g} ->" in step.reason or f"{before} ->" in step.reason  # fmt: skip


def assert_valid(built: Effective) -> None:
    """What vLLM checks: a step holds a token of each sequence, and a whole prompt where prompts are not cut."""
    batch = built.max_num_batched_tokens
    if batch is not None:
        assert batch >= (built.max_num_seqs or 0)
        assert built.chunked_prefill or batch >= (built.max_model_len or 0)
