"""How vLLM reads texts, keeps images and makes the pieces of answers, with our parts in their places."""

from __future__ import annotations

import asyncio
import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")


from llm_serve.engine import long_texts, media_cache, pieces, resume, tokenizer_copies

pytestmark = pytest.mark.vllm


def test_the_memo_that_keeps_tokenizers_can_be_cleared() -> None:
    """A dead engine's tokenizer is freed by clearing what vLLM remembers of chat templates, by its name there."""
    from vllm.utils import func_utils

    func_utils.supports_kw(lambda tools: tools, "tools")
    assert 0 < func_utils._supports_kw.cache_info().currsize
    func_utils._supports_kw.cache_clear()
    assert 0 == func_utils._supports_kw.cache_info().currsize


def test_copies_of_a_tokenizer_are_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's renderer gets its pool at once, which soon has as many copies as vLLM would have made, and works."""
    from tokenizers import Tokenizer, models
    from vllm.renderers import hf as renderer
    from vllm.tokenizers import hf

    made: list[object] = []
    is_allowed, deepcopy = threading.Event(), copy.deepcopy

    def slowly(value: object) -> object:
        is_allowed.wait(10)
        made.append(deepcopy(value))
        return made[-1]

    monkeypatch.setattr(hf, "copy", SimpleNamespace(copy=copy.copy, deepcopy=slowly))
    monkeypatch.setattr(renderer, "maybe_make_thread_pool", hf.maybe_make_thread_pool)
    tokenizer_copies.install()
    tokenizer = hf.TokenizersBackend(tokenizer_object=Tokenizer(models.WordLevel({"one": 0, "two": 1}, "one")))

    pool = renderer.maybe_make_thread_pool(tokenizer, 2)
    assert [] == made
    is_allowed.set()
    for thread in threading.enumerate():
        if thread.name == "tokenizer-copy":
            thread.join(10)

    assert 2 == len(made)
    assert ["two", "one"] == pool.convert_ids_to_tokens([1, 0])
    assert 2 == len(made)
    assert pool is renderer.maybe_make_thread_pool(pool, 2)
    assert 2 == len(made)


class Slow:
    """A tokenizer that takes its time, and counts what it reads and where."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        """Read one text. A long one ends only when it is allowed to."""
        self.read.append(threading.current_thread().name)
        self.has_begun.set()
        if len(text) > 1000:
            assert self.may_go_on.wait(30)
        return {"input_ids": [1] * min(len(text), options["max_length"])}  # type: ignore[call-overload]


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's renderer, as far as it has texts read, with a model of 100 tokens."""
    from concurrent.futures import ThreadPoolExecutor

    from vllm.renderers import base
    from vllm.tokenizers import hf
    from vllm.utils.async_utils import make_async

    for name in ("tokenize_prompts", "tokenize_prompts_async"):
        monkeypatch.setattr(base.BaseRenderer, name, getattr(base.BaseRenderer, name))
    monkeypatch.setattr(base.BaseRenderer, "reads_long_texts_aside", True, raising=False)
    monkeypatch.delattr(base.BaseRenderer, "reads_long_texts_aside")
    long_texts.install()
    monkeypatch.setattr(base.BaseRenderer, "__abstractmethods__", frozenset())
    made: Any = object.__new__(base.BaseRenderer)
    made.tokenizer = type("Pool", (Slow, hf.ThreadSafeHFTokenizerMixin), {"max_chars_per_token": 10**6})()
    made.model_config = SimpleNamespace(max_model_len=100)
    executor = ThreadPoolExecutor(1, "vllm")
    made._tokenize_prompt_async = make_async(made._tokenize_prompt, executor=executor)
    yield made
    made.tokenizer.may_go_on.set()
    executor.shutdown()


async def test_a_long_text_keeps_no_short_one_waiting(renderer: Any) -> None:
    """It is read by a thread of its own; and of a request that is refused, nothing more is read."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.params import TokenizeParams

    params = TokenizeParams(max_total_tokens=100)
    many = [{"prompt": "x" * 2000} for _ in range(100)]
    reading = asyncio.create_task(renderer.tokenize_prompts_async(many, params))
    await asyncio.to_thread(renderer.tokenizer.has_begun.wait, 30)

    short = await asyncio.wait_for(renderer.tokenize_prompts_async([{"prompt": "x" * 50}], params), 30)
    assert 50 == len(short[0]["prompt_token_ids"])
    renderer.tokenizer.may_go_on.set()
    with pytest.raises(VLLMValidationError, match="maximum context length is 100 tokens"):
        await reading
    assert ["long-texts_0", "vllm_0"] == renderer.tokenizer.read


async def test_a_text_that_is_far_too_long_is_not_read(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where vLLM asks for no limit, as to count tokens; the option is named."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.params import TokenizeParams

    unlimited = TokenizeParams(max_total_tokens=None)
    too_long = {"prompt": "x" * (long_texts._LEAST_CHARS + 1)}
    with pytest.raises(VLLMValidationError, match=r"limits\.max_prompt_chars"):
        await renderer.tokenize_prompts_async([{"prompt": "x"}, too_long], unlimited)
    with pytest.raises(VLLMValidationError, match=r"limits\.max_prompt_chars"):
        renderer.tokenize_prompts([{"encoder_prompt": too_long, "decoder_prompt": None}], unlimited)

    monkeypatch.setattr(long_texts, "_limit", 10)
    with pytest.raises(VLLMValidationError, match="at most 10 are allowed"):
        await renderer.tokenize_prompts_async([{"prompt": "x" * 11}], unlimited)
    assert [] == renderer.tokenizer.read
    given = [{"prompt": "x" * 11, "prompt_token_ids": [1]}]
    assert [[1]] == [each["prompt_token_ids"] for each in await renderer.tokenize_prompts_async(given, unlimited)]


@pytest.mark.parametrize(("kind", "keeps_data"), [("lru", True), ("shm", False), (None, True)])
def test_the_daemon_keeps_the_images_that_its_engines_have(
    kind: str | None, keeps_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's renderer gets a cache that answers with data; shared memory, which was asked for, is recognised as such."""
    from vllm.multimodal.inputs import MultiModalKwargsItem
    from vllm.renderers import base

    images = SimpleNamespace(
        mm_processor_cache_gb=0.01 if kind else 0, mm_processor_cache_type=kind, mm_shm_cache_max_object_size_mb=1
    )
    model = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: images)
    parallel = SimpleNamespace(_api_process_count=1, data_parallel_size=1, world_size=1)
    monkeypatch.setattr(base, "processor_cache_from_config", None)
    media_cache.install()

    cache: Any = base.processor_cache_from_config(SimpleNamespace(model_config=model, parallel_config=parallel))

    item = MultiModalKwargsItem.dummy(4)
    if cache is not None:
        cache.get_and_update_item((item, []), "black")
        item = cache.get_and_update_item(None, "black")[0]
        cache.close()
    assert keeps_data == resume.is_repeatable({"mm_kwargs": {"image": [item]}})


def test_pieces_of_answers_are_the_same_without_the_check_for_unknown_fields() -> None:
    """In what they say and in what they refuse; requests keep the check."""
    from pydantic import ValidationError
    from vllm.entrypoints.generate.base.protocol import DeltaMessage, DeltaToolCall
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    class Cited(DeltaMessage):  # type: ignore[misc]  # as vLLM derives one
        citations: list[int] | None = None

    def made() -> list[str]:
        deltas = (
            DeltaMessage(content="one"),
            DeltaMessage(role="assistant", tool_calls=[DeltaToolCall(index=0)]),
            Cited(content="two", citations=[1]),
        )
        answers = [
            chat.ChatCompletionStreamResponse(
                id="1", created=1, model="m", choices=[chat.ChatCompletionResponseStreamChoice(index=0, delta=delta)]
            )
            for delta in deltas
        ]
        choice = completion.CompletionResponseStreamChoice(index=0, text="three", finish_reason="stop")
        answers.append(completion.CompletionStreamResponse(id="1", created=1, model="m", choices=[choice], unknown=[4]))
        return [piece.model_dump_json(exclude_unset=True) for piece in answers]

    before = made()
    pieces.install()
    pieces.install()

    assert before == made()
    assert '"citations":[1]' in before[2]
    assert '"unknown":[4]' in before[3]
    with pytest.raises(ValidationError):
        chat.ChatCompletionResponseStreamChoice(index="x", delta=DeltaMessage())
    for request in (chat.ChatCompletionRequest, completion.CompletionRequest):
        assert pieces.CHECK in request.__pydantic_decorators__.model_validators
    for piece in (chat.ChatCompletionStreamResponse, completion.CompletionStreamResponse):
        assert pieces.CHECK not in piece.__pydantic_decorators__.model_validators
