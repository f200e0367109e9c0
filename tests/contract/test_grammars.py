"""Grammars of requests: looked at once, beside the loop, with vLLM's own words for those that are wrong."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import sampling_params
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar

from llm_serve.engine import grammars

pytestmark = pytest.mark.vllm

SMALL = {"type": "object", "properties": {"name": {"type": "string"}}}
SLOW = {
    "type": "object",
    "properties": {
        f"p{n}": {"anyOf": [{"type": "integer"}, {"properties": {f"q{m}": {"type": "string"} for m in range(30)}}]}
        for n in range(700)
    },
}
CONFIGURATIONS = (SimpleNamespace(is_diffusion=False), SimpleNamespace(backend="xgrammar"), object())
LLM = SimpleNamespace(
    input_processor=SimpleNamespace(
        model_config=CONFIGURATIONS[0], structured_outputs_config=CONFIGURATIONS[1], tokenizer=CONFIGURATIONS[2]
    )
)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """vLLM as it comes, with our check put in; the names of the threads that made grammars."""
    threads: list[str] = []
    check = backend_xgrammar.validate_xgrammar_grammar

    def noted(params: Any) -> None:
        threads.append(threading.current_thread().name.partition("_")[0])
        check(params)

    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", noted)
    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", SamplingParams._validate_structured_outputs)
    monkeypatch.delattr(SamplingParams, "checks_grammars_aside", raising=False)
    monkeypatch.setattr(grammars, "_quick", OrderedDict())
    grammars.install()
    grammars.install()
    yield threads
    monkeypatch.undo()


def asking(**what: Any) -> SamplingParams:
    """A request's parameters."""
    return SamplingParams(structured_outputs=StructuredOutputsParams(**what))


def as_vllm_does(params: SamplingParams) -> None:
    """What the engine's client asks of every request, on the loop."""
    params.verify(SimpleNamespace(is_diffusion=False, max_logprobs=20), None, *CONFIGURATIONS[1:])


def test_a_slow_schema_is_looked_at_once_and_the_loop_goes_on(
    looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's longest pause is a part of what the check takes; vLLM does not repeat it."""
    for name in (
        "_validate_logprobs",
        "_validate_logit_bias",
        "_validate_stop_token_ids",
        "_validate_allowed_token_ids",
    ):
        monkeypatch.setattr(SamplingParams, name, lambda *_: None)

    async def play() -> None:
        params, longest, last = asking(json=SLOW), 0.0, time.perf_counter()
        checking = asyncio.create_task(grammars.check(params, LLM))
        began = last
        while not checking.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        await checking
        assert last - began > 0.1, "the schema is no trouble any more: take a longer one"
        assert longest < (last - began) / 2
        as_vllm_does(params)
        await grammars.check(params, LLM)

    asyncio.run(play())
    assert looked == ["grammars"]


def test_what_was_quick_is_left_to_vllm_the_next_time(looked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new request with the same schema; another schema is another matter."""
    monkeypatch.setattr(grammars, "_QUICK_S", 60.0)  # however slow the machine

    async def play() -> None:
        for schema in (SMALL, SMALL, SMALL | {"title": "x"}):
            params = asking(json=schema)
            await grammars.check(params, LLM)
            params._validate_structured_outputs(*CONFIGURATIONS)

    asyncio.run(play())
    assert looked == ["grammars", "MainThread", "grammars"]


def test_what_vllm_waits_for_is_not_quick(looked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has patterns compiled by a thread of its own: ours is idle meanwhile, and the loop would be as well."""
    check = backend_xgrammar.validate_xgrammar_grammar

    def slowly(params: Any) -> None:
        time.sleep(0.05)
        check(params)

    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", slowly)

    async def play() -> None:
        for _ in range(2):
            params = asking(regex="a")
            await grammars.check(params, LLM)
            params._validate_structured_outputs(*CONFIGURATIONS)

    asyncio.run(play())
    assert looked == ["grammars", "grammars"]


def test_only_so_many_are_remembered(looked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not asked for longest goes."""
    monkeypatch.setattr(grammars, "_QUICK_S", 60.0)
    monkeypatch.setattr(grammars, "_REMEMBERED", 2)

    async def play() -> None:
        for regex in ("a", "b", "a", "c", "a", "b"):
            await grammars.check(asking(regex=regex), LLM)

    asyncio.run(play())
    assert len(looked) == 4


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ({"json": '{"type": '}, "JSON"),
        ({"regex": "a\x00"}, "NUL"),
        ({"choice": []}, "empty"),
        ({"grammar": "?"}, "grammar"),
    ],
)
def test_what_is_wrong_is_told_as_vllm_tells_it(looked: list[str], what: dict[str, Any], word: str) -> None:
    """The same error, and nothing is taken for checked."""
    params = asking(**what)
    with pytest.raises(VLLMValidationError, match=word) as ours:
        asyncio.run(grammars.check(params, LLM))
    with pytest.raises(VLLMValidationError) as vllm_s:
        params._validate_structured_outputs(*CONFIGURATIONS)
    assert str(ours.value) == str(vllm_s.value)


def test_requests_without_them_are_not_looked_at(looked: list[str]) -> None:
    """Nor are embeddings, which have no such field."""
    asyncio.run(grammars.check(SamplingParams(), LLM))
    asyncio.run(grammars.check(SimpleNamespace(), LLM))
    assert looked == []


def test_engines_compile_behind_everybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their threads; whoever compiles in the main thread must not be slowed down."""
    levels: list[int] = []

    def level(*_: Any) -> None:
        levels.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    assert "request" in StructuredOutputManager._create_grammar.__code__.co_varnames
    monkeypatch.setattr(StructuredOutputManager, "_create_grammar", level)
    level()
    grammars.install_in_engines()
    manager: Any = StructuredOutputManager._create_grammar
    thread = threading.Thread(target=manager, args=(None, None))
    thread.start()
    thread.join()
    manager(None, None)
    assert levels == [levels[0], 10, levels[0]]


def test_vllm_asks_through_the_method_that_is_replaced() -> None:
    """`verify`, which the engine's client calls, does not go another way."""
    assert "_validate_structured_outputs" in SamplingParams.verify.__code__.co_names
    assert "_create_grammar" in StructuredOutputManager.grammar_init.__code__.co_names
    assert sampling_params.SamplingParams is SamplingParams
