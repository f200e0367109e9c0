"""Another way of computing: which is next for each failure, each once, and what a person is told after the last."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serve.core.course import Course, Effective, Step
from llm_serve.core.evidence import Failure, Kind, Place
from llm_serve.core.fallbacks import AUTO_BACKENDS, MLA_BACKENDS, next_step
from llm_serve.core.ladder import NoStep
from llm_serve.core.plan import EnginePlan

BUILT = Effective()
TP2 = Effective(tensor_parallel_size=2, world_size=2)
PP2 = Effective(world_size=2)
BOUND = Effective(numa_bind=True)
ON_CPU = Effective(device="cpu")

EAGER: tuple[dict[str, Any], dict[str, str]] = ({"enforce_eager": True}, {})
NO_GRAPHS: tuple[dict[str, Any], dict[str, str]] = ({"compilation_config": {"cudagraph_mode": "NONE"}}, {})
NO_CACHE: tuple[dict[str, Any], dict[str, str]] = ({}, {"VLLM_DISABLE_COMPILE_CACHE": "1"})
NO_SAMPLER: tuple[dict[str, Any], dict[str, str]] = ({}, {"VLLM_USE_FLASHINFER_SAMPLER": "0"})
NO_P2P: tuple[dict[str, Any], dict[str, str]] = ({"disable_custom_all_reduce": True}, {"NCCL_P2P_DISABLE": "1"})
UNBOUND: tuple[dict[str, Any], dict[str, str]] = (
    {"numa_bind": False, "numa_bind_nodes": None, "numa_bind_cpus": None},
    {},
)
NO_CUSTOM: tuple[dict[str, Any], dict[str, str]] = ({"disable_custom_all_reduce": True}, {})


def backend(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """That attention backend."""
    return {"attention_backend": name}, {}


# vLLM has chosen the first, as far as anybody knows.
OTHERS = [backend(name) for name in ("FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "FLASH_ATTN")]


def course(arguments: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> Course:
    """Nothing but what the file asks for."""
    return Course(EnginePlan("m", arguments or {}, env or {}))


def fails(kind: Kind, place: Place = Place.start, detail: str = "it failed.") -> Failure:
    """A verdict."""
    return Failure(kind, detail, place=place)


def unlinked(kind: Kind, place: Place = Place.start) -> Failure:
    """A verdict on GPUs that cannot reach each other's memory, as the driver says."""
    return replace(fails(kind, place), no_p2p=("GPU 0 and 1 (the chipset does not support it)",))


def built_with(now: Effective, step: Step) -> Effective:
    """What the next engine is built with: the step's changes on top of what this one was built with."""
    known = {field.name for field in fields(Effective)}
    return replace(now, **{name: value for name, value in step.arguments.items() if name in known})


def walk(at: Course, failure: Failure, now: Effective, backends: tuple[str, ...] = AUTO_BACKENDS) -> list[Step]:
    """The steps that one failure leads to that no step cures."""
    steps: list[Step] = []
    while isinstance(step := next_step(at, failure, now, backends), Step):
        steps.append(step)
        assert len(steps) <= len(backends) + 4, "there is always one more"
        at, now = at.and_then(step), built_with(now, step)
    return steps


def changes(steps: list[Step]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """What each changes."""
    return [(dict(step.arguments), dict(step.env)) for step in steps]


SLOW_OR_STUCK = (Kind.start_timeout, Kind.start_stalled)


@pytest.mark.parametrize(
    ("failure", "now", "expected"),
    [
        pytest.param(fails(Kind.attention_backend, Place.warm_up), BUILT, OTHERS, id="attention"),
        pytest.param(fails(Kind.flashinfer, Place.profiling), BUILT, [NO_SAMPLER, backend("FLASH_ATTN"), backend("TRITON_ATTN"), backend("FLEX_ATTENTION")], id="flashinfer: its sampler, then another backend"),
        pytest.param(fails(Kind.compilation, Place.profiling), BUILT, [NO_CACHE, EAGER], id="compilation: its cache, then none"),
        pytest.param(fails(Kind.compilation, Place.profiling), ON_CPU, [NO_CACHE, EAGER], id="compilation on a CPU"),
        pytest.param(fails(Kind.compilation, Place.profiling), replace(BUILT, enforce_eager=True), [], id="compilation: it is off"),
        pytest.param(fails(Kind.graph_capture, Place.capture), BUILT, [NO_GRAPHS, EAGER], id="graphs: none, then eager"),
        pytest.param(fails(Kind.graph_capture, Place.capture), replace(BUILT, enforce_eager=True), [], id="graphs: they are off"),
        pytest.param(fails(Kind.communication), TP2, [NO_P2P], id="communication"),
        pytest.param(fails(Kind.communication), PP2, [NO_P2P], id="communication, a pipeline"),
        pytest.param(fails(Kind.communication), BUILT, [], id="communication, one GPU"),
        pytest.param(unlinked(Kind.communication), BUILT, [], id="communication, one GPU of two without P2P"),
        *[pytest.param(fails(kind), TP2, [NO_P2P], id=f"{kind} at once, two GPUs") for kind in SLOW_OR_STUCK],
        *[pytest.param(fails(kind), BUILT, [], id=f"{kind} at once, one GPU") for kind in SLOW_OR_STUCK],
        *[pytest.param(fails(kind, Place.loading), TP2, [], id=f"{kind} loading") for kind in SLOW_OR_STUCK],
        *[pytest.param(fails(kind, place), BUILT, OTHERS, id=f"{kind} {place}") for kind in SLOW_OR_STUCK for place in (Place.profiling, Place.kv_cache, Place.warm_up, Place.serving)],
        *[pytest.param(fails(kind, Place.capture), BUILT, [NO_GRAPHS, EAGER], id=f"{kind} capture") for kind in SLOW_OR_STUCK],
        *[pytest.param(fails(kind, Place.profiling), TP2, [*OTHERS, NO_P2P], id=f"{kind} profiling, two GPUs") for kind in SLOW_OR_STUCK],
        *[pytest.param(unlinked(kind, Place.profiling), TP2, [NO_P2P, *OTHERS], id=f"{kind} profiling, no P2P") for kind in SLOW_OR_STUCK],
        *[pytest.param(fails(kind, Place.capture), TP2, [NO_GRAPHS, EAGER, NO_P2P], id=f"{kind} capture, two GPUs") for kind in SLOW_OR_STUCK],
        *[pytest.param(unlinked(kind, Place.capture), TP2, [NO_P2P, NO_GRAPHS, EAGER], id=f"{kind} capture, no P2P") for kind in SLOW_OR_STUCK],
        *[pytest.param(unlinked(kind, Place.loading), TP2, [], id=f"{kind} loading, no P2P") for kind in SLOW_OR_STUCK],
        pytest.param(unlinked(Kind.stalled, Place.serving), TP2, [NO_P2P, EAGER, *OTHERS], id="stalled, no P2P"),
        pytest.param(unlinked(Kind.device_error), TP2, [NO_P2P, EAGER, *OTHERS], id="device error, no P2P"),
        pytest.param(unlinked(Kind.crashed), TP2, [NO_P2P, EAGER, *OTHERS], id="crashed, no P2P"),
        pytest.param(fails(Kind.host_out_of_memory, Place.loading), BOUND, [UNBOUND], id="one NUMA node is full"),
        pytest.param(fails(Kind.host_out_of_memory, Place.loading), BUILT, [], id="the host is full"),
        pytest.param(fails(Kind.stalled, Place.serving), TP2, [NO_CUSTOM, EAGER, *OTHERS], id="stalled, two GPUs"),
        pytest.param(fails(Kind.stalled, Place.serving), BUILT, [EAGER, *OTHERS], id="stalled, one GPU"),
        pytest.param(fails(Kind.device_error, Place.serving), BUILT, [EAGER, *OTHERS], id="device error"),
        pytest.param(fails(Kind.crashed, Place.warm_up), BUILT, [EAGER, *OTHERS], id="crashed"),
        pytest.param(fails(Kind.crashed, Place.warm_up), replace(BUILT, enforce_eager=True), OTHERS, id="crashed, eager"),
    ],
)  # fmt: skip
def test_the_ways_are_gone_in_their_order(failure: Failure, now: Effective, expected: list[Any]) -> None:
    """The mildest first, each once, and after the last there is advice."""
    assert expected == changes(walk(course(), failure, now))


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.compilation])
def test_on_a_cpu_nothing_but_compiling_can_be_done_in_another_way(kind: Kind) -> None:
    """There is one backend, and there are no graphs."""
    assert [] == [place for place in Place if walk(course(), fails(kind, place), ON_CPU)]


OTHER_KINDS = [kind for kind in Kind if kind not in {
    Kind.attention_backend, Kind.flashinfer, Kind.compilation, Kind.graph_capture, Kind.communication,
    Kind.start_timeout, Kind.start_stalled, Kind.stalled, Kind.device_error, Kind.crashed,
}]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_no_way_of_computing_causes_has_no_other(kind: Kind) -> None:
    """Memory, settings, the host: another backend would not help, and each kind has its advice."""
    answers = [next_step(course(), fails(kind, place), TP2, AUTO_BACKENDS) for place in Place]

    assert [] == [answer for answer in answers if not (isinstance(answer, NoStep) and answer.advice)]


@pytest.mark.parametrize(
    ("arguments", "at_hand", "expected"),
    [
        pytest.param({"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN", ["FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"], id="asked for"),
        pytest.param({"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN", ["FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION"], id="the third"),
        pytest.param({"attention_config": {"backend": "FLASHINFER"}}, None, ["FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"], id="named in the configuration"),
        pytest.param({}, None, ["FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "FLASH_ATTN"], id="chosen by vLLM"),
    ],
)  # fmt: skip
def test_the_backend_at_hand_is_not_the_next(
    arguments: dict[str, Any], at_hand: str | None, expected: list[str]
) -> None:
    """Each of the others comes once; vLLM's probable choice is the last one."""
    steps = walk(
        course(arguments), fails(Kind.attention_backend, Place.warm_up), replace(BUILT, attention_backend=at_hand)
    )

    assert expected == [step.arguments["attention_backend"] for step in steps]


def test_a_backend_that_vllm_sets_by_itself_is_not_the_next_either() -> None:
    """Nothing has asked for it, and it is the one that has just failed."""
    step = next_step(course(), fails(Kind.attention_backend), replace(BUILT, attention_backend="FLASHINFER"), AUTO_BACKENDS)  # fmt: skip

    assert isinstance(step, Step)
    assert "TRITON_ATTN" == step.arguments["attention_backend"]


@pytest.mark.parametrize(
    ("detail", "first", "last"),
    [
        pytest.param("RuntimeError: flash_attn_varlen_func() failed", "FLASHINFER", "FLASH_ATTN", id="function"),
        pytest.param("ImportError: FlashAttention is not installed", "FLASHINFER", "FLASH_ATTN", id="name in words"),
        pytest.param("RuntimeError: FlashInfer: plan failed", "FLASH_ATTN", "FLASHINFER", id="flashinfer"),
        pytest.param("error in vllm/v1/attention/backends/triton_attn.py", "FLASH_ATTN", "TRITON_ATTN", id="file"),
    ],
)
def test_the_backend_that_the_failure_names_comes_last(detail: str, first: str, last: str) -> None:
    """vLLM had chosen it, so it has just failed, and it is remembered for the steps that follow."""
    failure = fails(Kind.attention_backend, Place.warm_up, detail)
    one = next_step(course(), failure, BUILT, AUTO_BACKENDS)
    assert isinstance(one, Step)
    later = walk(course().and_then(one), fails(Kind.attention_backend, Place.warm_up), built_with(BUILT, one))

    assert first == one.arguments["attention_backend"]
    assert last == later[-1].arguments["attention_backend"]


def test_a_list_of_the_file_is_gone_through_in_its_order() -> None:
    """And nothing else is tried."""
    at = course({"attention_backend": "TRITON_ATTN"})
    now = replace(BUILT, attention_backend="TRITON_ATTN")
    steps = walk(at, fails(Kind.attention_backend), now, ("TRITON_ATTN", "FLEX_ATTENTION", "FLASH_ATTN"))

    assert ["FLEX_ATTENTION", "FLASH_ATTN"] == [step.arguments["attention_backend"] for step in steps]


def test_latent_attention_has_backends_of_its_own() -> None:
    """Where a backend does not know MLA, the others without it are not tried; nor are those with it where nothing asks."""
    refused = fails(
        Kind.attention_backend,
        Place.loading,
        "ValueError: Selected backend AttentionBackendEnum.FLASHINFER is not valid for this configuration. "
        "Reason: ['MLA not supported']",
    )
    at_hand = replace(BUILT, attention_backend="FLASHINFER")
    steps = walk(course({"attention_backend": "FLASHINFER"}), refused, at_hand)
    tried = [step.arguments["attention_backend"] for step in steps]
    other = replace(refused, detail=refused.detail.replace("MLA", "non-MLA"))

    assert sorted(MLA_BACKENDS) == sorted(tried)
    assert [] == [step for step in walk(course(), other, at_hand) if "MLA" in step.arguments["attention_backend"]]
    # Named by mistake for a model without it (the words are vLLM's on an H200).
    named = replace(BUILT, attention_backend="FLASHMLA")
    wrong = replace(refused, detail="ValueError: Selected backend AttentionBackendEnum.FLASHMLA is not valid for this "
                    "configuration. Reason: ['head_size not supported', 'non-MLA not supported']")  # fmt: skip
    steps = walk(course({"attention_backend": "FLASHMLA"}), wrong, named)
    assert [*AUTO_BACKENDS] == [step.arguments["attention_backend"] for step in steps]
    # The user's own list is the user's word.
    assert ["FLEX_ATTENTION"] == [step.arguments["attention_backend"] for step in walk(course(), refused, at_hand, ("FLEX_ATTENTION",))]  # fmt: skip


def test_where_vllm_has_asked_every_backend_none_is_named() -> None:
    """Its reasons list them all: naming one is a start for nothing, and the advice says what they may not take."""
    text = "ValueError: No valid attention backend found for cuda with ... Reasons: {FLASH_ATTN: [dtype not supported]}"
    answer = next_step(course(), fails(Kind.attention_backend, Place.loading, text), BUILT, AUTO_BACKENDS)

    assert isinstance(answer, NoStep)
    assert [] == [word for word in ("kv_cache_dtype", "block_size") if word not in answer.advice]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param({"backend": "FLASHINFER"}, None, id="nothing else"),
        pytest.param(
            {"backend": "FLASHINFER", "flash_attn_version": 2}, {"flash_attn_version": 2}, id="the rest stays"
        ),
    ],
)
def test_a_backend_is_named_once(asked: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """vLLM refuses attention_backend beside attention_config.backend."""
    step = next_step(course({"attention_config": asked}), fails(Kind.attention_backend), BUILT, AUTO_BACKENDS)

    assert isinstance(step, Step)
    assert {"attention_backend": "FLASH_ATTN", "attention_config": expected} == step.arguments
    assert "attention_backend FLASHINFER -> FLASH_ATTN" in step.reason


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(
            {"mode": 3}, [({"compilation_config": {"mode": 3, "cudagraph_mode": "NONE"}}, {}), EAGER], id="merged"
        ),
        pytest.param({"cudagraph_mode": "FULL"}, [NO_GRAPHS, EAGER], id="replaced"),
        pytest.param({"cudagraph_mode": "NONE"}, [EAGER], id="off already"),
        pytest.param(3, [EAGER], id="no mapping"),
    ],
)
def test_what_is_asked_of_the_compiler_stays(asked: Any, expected: list[Any]) -> None:
    """Only the graphs are switched off in it."""
    assert expected == changes(
        walk(course({"compilation_config": asked}), fails(Kind.graph_capture, Place.capture), BUILT)
    )


def test_what_the_file_switches_off_is_not_a_step() -> None:
    """A step that changes nothing would be a start for nothing."""
    at = course(
        {"disable_custom_all_reduce": True},
        {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_DISABLE_COMPILE_CACHE": "1", "NCCL_P2P_DISABLE": "1"},
    )

    assert [] == walk(at, fails(Kind.communication), TP2)
    assert EAGER == changes(walk(at, fails(Kind.compilation), TP2))[0]
    assert EAGER == changes(walk(at, fails(Kind.stalled), TP2))[0]
    assert backend("FLASH_ATTN") == changes(walk(at, fails(Kind.flashinfer), TP2))[0]


def test_a_step_says_what_was_tried_and_why_it_fell() -> None:
    """The old way, the new one, and the engine's own words."""
    failure = fails(Kind.attention_backend, Place.warm_up, "RuntimeError: no kernel for sm75.")
    at = course({"attention_backend": "FLASHINFER"})
    step = next_step(at, failure, replace(BUILT, attention_backend="FLASHINFER"), AUTO_BACKENDS)

    assert isinstance(step, Step)
    assert (
        "attention_backend FLASHINFER -> FLASH_ATTN, because of attention_backend (warm_up): "
        "RuntimeError: no kernel for sm75."
    ) == step.reason
    assert (Kind.attention_backend, Place.warm_up, False) == (step.kind, step.place, step.is_rung)


def test_a_step_names_the_gpus_that_have_no_p2p() -> None:
    """What is switched off, why the start fell, and between which GPUs."""
    step = next_step(course(), unlinked(Kind.start_stalled), TP2, AUTO_BACKENDS)

    assert isinstance(step, Step)
    assert (
        "NCCL_P2P_DISABLE unset -> 1, disable_custom_all_reduce false -> true, because of start_stalled (start): "
        "it failed. There is no P2P between GPU 0 and 1 (the chipset does not support it)."
    ) == step.reason


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Kind.attention_backend, ("recovery.attention_backends", "kv_cache_dtype")),
        (Kind.flashinfer, ("nvcc", "ninja", "vllm download-kernels")),
        (Kind.compilation, ("gcc", "journal")),
        (Kind.graph_capture, ("journal",)),
        (Kind.communication, ("IOMMU", "/dev/shm", "NCCL_DEBUG")),
        (Kind.start_timeout, ("recovery.start_timeout_s",)),
        (Kind.start_stalled, ("journal",)),
        (Kind.stalled, ("stacks",)),
        (Kind.device_error, ("Xid", "llm-serve stress")),
        (Kind.crashed, ("journal",)),
    ],
)
def test_after_the_last_way_a_person_is_told_what_to_do(kind: Kind, words: tuple[str, ...]) -> None:
    """The advice names what to look at, to install or to set."""
    answer = next_step(course(), fails(kind), ON_CPU if kind is not Kind.compilation else replace(BUILT, enforce_eager=True), ())  # fmt: skip

    assert isinstance(answer, NoStep)
    assert [] == [word for word in words if word not in answer.advice]


DETAILS = (
    "it failed.",
    "FlashAttention",
    "MLA not supported",
    "non-MLA not supported",
    "flashinfer",
    "No valid attention backend found",
)
ASKED: tuple[dict[str, Any], ...] = ({}, {"attention_backend": "FLASHINFER"}, {"attention_config": {"backend": "TRITON_ATTN"}}, {"compilation_config": {"mode": 3}}, {"enforce_eager": True}, {"compilation_config": 0})  # fmt: skip
LONGEST_WALK = len(AUTO_BACKENDS) + len(MLA_BACKENDS) + 8
"""Every backend, and sampler, compile cache, graphs, compiling, P2P, custom all-reduce (twice) and NUMA once each."""


@settings(max_examples=300)
@given(
    st.sampled_from(ASKED),
    st.builds(Effective, device=st.sampled_from(("cuda", "cpu")), enforce_eager=st.booleans(), attention_backend=st.one_of(st.none(), st.sampled_from((*AUTO_BACKENDS, *MLA_BACKENDS))), tensor_parallel_size=st.sampled_from((1, 2)), world_size=st.sampled_from((1, 2)), numa_bind=st.booleans()),
    st.sampled_from((AUTO_BACKENDS, ("TRITON_ATTN", "FLASH_ATTN"), ("FLASHMLA",), ())),
    st.lists(st.builds(Failure, kind=st.sampled_from(Kind), detail=st.sampled_from(DETAILS), place=st.sampled_from(Place), no_p2p=st.sampled_from(((), ("GPU 0 and 1 (not supported)",)))), min_size=1, max_size=60),
)  # fmt: skip
def test_whatever_fails_each_way_is_gone_once_and_it_ends(
    asked: dict[str, Any], now: Effective, backends: tuple[str, ...], failures: list[Failure]
) -> None:
    """No plan comes twice, every step is a new plan, no number of it changes, and the steps come to an end."""
    at = course(asked)
    seen = {at.plan.fingerprint()}
    for failure in failures * 2:
        answer = next_step(at, failure, now, backends)
        if isinstance(answer, NoStep):
            assert answer.advice
            continue
        at, now = at.and_then(answer), built_with(now, answer)
        assert at.plan.fingerprint() not in seen
        seen.add(at.plan.fingerprint())
        assert not answer.is_rung
        assert " -> " in answer.reason
        assert failure.detail in answer.reason
        assert answer.arguments.keys() <= {"attention_backend", "attention_config", "compilation_config", "disable_custom_all_reduce", "enforce_eager", *UNBOUND[0]}  # fmt: skip
        assert now.world_size > 1 or "NCCL_P2P_DISABLE" not in answer.env
    assert len(at.steps) <= LONGEST_WALK
