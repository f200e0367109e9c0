"""What was learned, as JSON and back, and which of it holds for another file, model, vLLM or machine."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.course import Course, Step
from llm_serve.core.evidence import Kind, Place
from llm_serve.core.learned import FORMAT, Key, Remembered, steps_for, to_json
from llm_serve.core.plan import EnginePlan

KEY = Key(settings="f00", vllm="0.32.0", gpus=("RTX 3090 24576 MiB",), model="folder abc")
ASKED = EnginePlan("m", {"max_model_len": 8192}, {"HF_TOKEN": "hf_secret", "A": "asked-value"})
RUNG = Step(
    Kind.kv_cache_too_small, Place.kv_cache, "8192 -> 4096 tokens fit.", {"max_model_len": 4096}, {}, is_rung=True
)
TRITON = Step(
    Kind.attention_backend, Place.warm_up, "FLASHINFER hangs.", {"attention_backend": "TRITON_ATTN"}, {}, is_rung=False
)
SAMPLER = Step(Kind.flashinfer, Place.warm_up, "No nvcc.", {}, {"VLLM_USE_FLASHINFER_SAMPLER": "0"}, is_rung=False)
EAGER = Step(Kind.compilation, Place.capture, "No compiler.", {"enforce_eager": True}, {}, is_rung=False)
COURSE = Course(ASKED, (TRITON, RUNG, SAMPLER), is_proven=True)


def through_text(course: Course, key: Key = KEY) -> Any:
    """As a file would hand it back."""
    return json.loads(json.dumps(to_json(course, key), allow_nan=False))


def test_a_course_comes_back_whole() -> None:
    """Under the same key every step is there, in its order, and still proven."""
    assert Remembered(COURSE.steps, is_proven=True, why_dropped=None) == steps_for(through_text(COURSE), KEY, ASKED)


def test_the_asked_plan_is_not_kept() -> None:
    """Neither a secret of the file nor anything else that it asks for reaches the disk."""
    text = json.dumps(to_json(COURSE, KEY))

    assert [] == [word for word in ("hf_secret", "HF_TOKEN", "asked-value", "8192,") if word in text]


def test_the_values_are_copies() -> None:
    """What is changed in the values later changes no step."""
    step = dataclasses.replace(RUNG, arguments={"compilation_config": {"level": 0}})
    value = to_json(Course(ASKED, (step,)), KEY)
    remembered = steps_for(value, KEY, ASKED)
    value["steps"][0]["arguments"]["compilation_config"]["level"] = 3

    assert {"compilation_config": {"level": 0}} == step.arguments == remembered.steps[0].arguments


def test_nothing_learned_is_nothing_dropped() -> None:
    """A course without steps says nothing about another machine, and needs no word."""
    value = through_text(Course(ASKED, (), is_proven=True))

    assert Remembered((), is_proven=True, why_dropped=None) == steps_for(value, KEY, ASKED)
    assert Remembered((), is_proven=False, why_dropped=None) == steps_for(
        value, dataclasses.replace(KEY, vllm="0.33.0"), ASKED
    )


FALLBACKS = (TRITON, SAMPLER)


@pytest.mark.parametrize(
    ("change", "kept", "why"),
    [
        pytest.param(
            {"settings": "b4r"},
            FALLBACKS,
            "1 of 3 learned steps are dropped: the engine's settings changed.",
            id="file",
        ),
        pytest.param(
            {"model": "folder def"},
            FALLBACKS,
            "1 of 3 learned steps are dropped: the model's files changed.",
            id="model",
        ),
        pytest.param(
            {"vllm": "0.33.0"}, (), "3 of 3 learned steps are dropped: vLLM changed from 0.32.0 to 0.33.0.", id="vllm"
        ),
        pytest.param(
            {"gpus": ("RTX 3090 24576 MiB", "T4 15360 MiB")},
            (),
            "3 of 3 learned steps are dropped: the GPUs changed from [RTX 3090 24576 MiB] to [RTX 3090 24576 MiB, T4 15360 MiB].",
            id="one more gpu",
        ),
        pytest.param(
            {"model": "folder def", "settings": "b4r"},
            FALLBACKS,
            "1 of 3 learned steps are dropped: the engine's settings changed and the model's files changed.",
            id="two at once",
        ),
    ],
)
def test_a_changed_key_drops_what_it_decided(change: dict[str, Any], kept: tuple[Step, ...], why: str) -> None:
    """Rungs need the whole key, fallbacks the version and the machine; what is left is not proven any more."""
    now = dataclasses.replace(KEY, **change)

    assert Remembered(kept, is_proven=False, why_dropped=why) == steps_for(through_text(COURSE), now, ASKED)


@pytest.mark.parametrize(
    ("step", "arguments", "env", "expected"),
    [
        pytest.param(TRITON, {"attention_backend": "FLASH_ATTN"}, {}, False, id="argument"),
        pytest.param(TRITON, {"attention_config": {"backend": "FLASH_ATTN"}}, {}, False, id="other name: vLLM refuses both"),
        pytest.param(TRITON, {"kv_cache_dtype": "fp8"}, {}, True, id="another argument"),
        pytest.param(EAGER, {"compilation_config": {"mode": 3}}, {}, False, id="eager would undo the compilation asked for"),
        pytest.param(EAGER, {"enforce_eager": False}, {}, False, id="the opposite"),
        pytest.param(SAMPLER, {}, {"VLLM_USE_FLASHINFER_SAMPLER": "1"}, False, id="variable"),
        pytest.param(SAMPLER, {}, {"VLLM_LOGGING_LEVEL": "DEBUG"}, True, id="another variable"),
    ],
)  # fmt: skip
def test_a_changed_file_has_the_last_word(
    step: Step, arguments: dict[str, Any], env: dict[str, str], expected: bool
) -> None:
    """A fallback that sets what the new file sets itself is dropped; the same file again keeps it."""
    asked = EnginePlan("m", arguments, env)
    value = through_text(Course(ASKED, (step,), is_proven=True))

    assert ((step,) if expected else ()) == steps_for(value, dataclasses.replace(KEY, settings="b4r"), asked).steps
    assert Remembered((step,), is_proven=True, why_dropped=None) == steps_for(value, KEY, asked)
    assert (step,) == steps_for(value, dataclasses.replace(KEY, model="folder def"), asked).steps


def with_(path: tuple[str | int, ...], new: object) -> Any:
    """The values of COURSE with one of them replaced."""
    value = copy.deepcopy(through_text(COURSE))
    target = value
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = new
    return value


def without(path: tuple[str | int, ...]) -> Any:
    """The values of COURSE with one of them missing."""
    value = with_(path, None)
    target = value
    for part in path[:-1]:
        target = target[part]
    del target[path[-1]]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(None, "the whole must be an object, not NoneType", id="nothing"),
        pytest.param([], "the whole must be an object, not list", id="list"),
        pytest.param({}, f"its format is None, and this version reads {FORMAT}", id="empty"),
        pytest.param(with_(("format",), 2), "its format is 2, and this version reads 1", id="newer"),
        pytest.param(with_(("format",), True), "its format is True", id="format is no number"),
        pytest.param({**with_(("format",), 2), "steps": 0}, "its format is 2", id="format is judged first"),
        pytest.param(without(("steps",)), "the whole has no 'steps'", id="no steps"),
        pytest.param(with_(("floor",), 1), "the whole has an unknown 'floor'", id="one more member"),
        pytest.param(with_(("steps",), {}), "steps must be a list, not dict", id="steps no list"),
        pytest.param(with_(("is_proven",), 1), "is_proven must be true or false, not int", id="proven no flag"),
        pytest.param(with_(("key",), "f00"), "key must be an object, not str", id="key no object"),
        pytest.param(without(("key", "vllm")), "key has no 'vllm'", id="key without version"),
        pytest.param(with_(("key", "vllm"), 32), "key.vllm must be text, not int", id="version no text"),
        pytest.param(with_(("key", "gpus"), "T4"), "key.gpus must be a list, not str", id="gpus no list"),
        pytest.param(with_(("key", "gpus"), [24]), "key.gpus must be text, not int", id="gpu no text"),
        pytest.param(with_(("steps", 1), "RUNG"), "step 2 must be an object, not str", id="step no object"),
        pytest.param(without(("steps", 2, "env")), "step 3 has no 'env'", id="step without a member"),
        pytest.param(with_(("steps", 0, "kind"), "gremlins"), "step 1.kind is 'gremlins'", id="kind"),
        pytest.param(with_(("steps", 0, "kind"), ["killed"]), "step 1.kind must be text, not list", id="kind no text"),
        pytest.param(with_(("steps", 0, "place"), "nowhere"), "step 1.place is 'nowhere'", id="place"),
        pytest.param(
            with_(("steps", 0, "arguments"), []), "step 1.arguments must be an object, not list", id="arguments"
        ),
        pytest.param(with_(("steps", 2, "env"), {"A": 0}), "step 3.env.A must be text, not int", id="variable no text"),
        pytest.param(
            with_(("steps", 2, "is_rung"), "no"), "step 3.is_rung must be true or false, not str", id="is_rung"
        ),
        pytest.param(with_(("steps", 2, "reason"), None), "step 3.reason must be text, not NoneType", id="reason"),
    ],
)
def test_what_is_no_course_is_refused_in_words(value: object, words: str) -> None:
    """Never an exception, and never the steps before the wrong one."""
    steps, is_proven, why = steps_for(value, KEY, ASKED)

    assert ((), False) == (steps, is_proven)
    assert why is not None
    assert why.startswith("What was learned cannot be used: ")
    assert words in why


names = st.text(min_size=1, max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
some_steps = st.builds(
    Step,
    kind=st.sampled_from(Kind),
    place=st.sampled_from(Place),
    reason=st.text(max_size=20),
    arguments=st.dictionaries(names, plain, max_size=3),
    env=st.dictionaries(names, st.text(max_size=8), max_size=2),
    is_rung=st.booleans(),
)
courses = st.builds(Course, st.just(ASKED), st.lists(some_steps, max_size=5).map(tuple), is_proven=st.booleans())
keys = st.builds(
    Key, st.sampled_from("ab"), st.sampled_from("ab"), st.sampled_from([("x",), ("x", "x")]), st.sampled_from("ab")
)


@given(courses, keys)
def test_any_course_survives_the_file(course: Course, key: Key) -> None:
    """Whatever the ladder did comes back as it was."""
    assert (course.steps, course.is_proven, None) == steps_for(through_text(course, key), key, ASKED)


@given(courses, keys, keys)
def test_what_is_kept_is_part_of_what_was_learned(course: Course, then: Key, now: Key) -> None:
    """In its order; proven only whole; a rung only under an equal key; something dropped is always explained."""
    steps, is_proven, why = steps_for(through_text(course, then), now, ASKED)

    rest: Iterator[Step] = iter(course.steps)
    assert all(step in rest for step in steps)
    assert is_proven == (course.is_proven and then == now)
    assert (why is None) == (len(steps) == len(course.steps))
    assert then == now or not any(step.is_rung for step in steps)
    assert (then.vllm, then.gpus) == (now.vllm, now.gpus) or not steps


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in items:
        yield (*path, part)
        yield from paths(inner, (*path, part))


@given(st.sampled_from(list(paths(through_text(COURSE)))), plain)
def test_one_foreign_value_anywhere_is_refused_or_harmless(path: tuple[str | int, ...], new: object) -> None:
    """Steps come out of it whole or not at all, and never with a wrong type in them."""
    steps, is_proven, why = steps_for(with_(path, new), KEY, ASKED)

    assert why is not None or len(steps) == len(with_(path, new)["steps"])
    assert not is_proven or why is None
    for step in steps:
        assert isinstance(step.is_rung, bool)
        assert all(isinstance(text, str) for text in (step.reason, *step.env, *step.env.values(), *step.arguments))


@given(plain)
def test_any_value_at_all_is_answered(value: object) -> None:
    """Nothing that JSON can hold raises; what is no course yields no step."""
    assert ((), False) == steps_for(value, KEY, ASKED)[:2]
