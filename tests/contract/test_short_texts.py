"""Short texts are read at once, by vLLM's own code and with the same result; all others as vLLM does it."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_serve.engine import short_texts, tokenizer_copies

pytestmark = pytest.mark.vllm

_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ tools or '' }}"
_OTHER = "{{ messages | length }} one two"
_WORDS = ["[UNK]", "[", "]", "user", "system", "one", "two", "three"]
_TOOL = {"type": "function", "function": {"name": "one", "parameters": {}}}
_LONG = "one " * 513


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a chat template and a configuration, and no weights."""
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(_WORDS)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(_WORDS), **sizes}
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 8192, "torch_dtype": "float32"})
    )
    return folder


@pytest.fixture
def renderer(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's renderer for it, with everything of ours, which counts what it gives to threads."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers import hf
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    for name in ("render_chat_async", "render_cmpl_async"):
        monkeypatch.setattr(hf.HfRenderer, name, getattr(hf.HfRenderer.__mro__[1], name))
    monkeypatch.setattr(hf, "maybe_make_thread_pool", hf.maybe_make_thread_pool)
    monkeypatch.setattr(hf.HfRenderer, "reads_short_texts_at_once", True, raising=False)
    monkeypatch.delattr(hf.HfRenderer, "reads_short_texts_at_once")
    tokenizer_copies.install()
    short_texts.install()
    config = ModelConfig(model=str(model), dtype="float32")
    made: Any = hf.HfRenderer(VllmConfig(model_config=config), cached_tokenizer_from_config(config))
    until = time.monotonic() + 30
    while not tokenizer_copies.is_one_free(made.tokenizer):
        assert time.monotonic() < until, "vLLM's copies are not found, or not made"
        time.sleep(0.01)
    made.given_away = 0
    submit = made._executor.submit

    def count(*work: Any, **more: Any) -> Any:
        made.given_away += 1
        return submit(*work, **more)

    made._executor.submit = count
    yield made
    made.shutdown()


def _chat(content: Any = "one two", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "more", "is_at_once"),
    [
        ([_chat()], {}, True),
        ([_chat(), {"role": "system", "content": "three"}, _chat(name="me")], {}, True),
        ([_chat("")], {}, True),
        ([_chat(_LONG)], {}, False),
        ([_chat(_LONG[:1500]), _chat(_LONG[:1500])], {}, False),
        ([_chat()] * 33, {}, False),
        ([_chat([{"type": "text", "text": "one"}])], {}, False),
        ([{"role": "assistant", "content": "one", "tool_calls": []}], {}, False),
        ([_chat()], {"chat_template_kwargs": {"tools": [_TOOL]}}, False),
        ([_chat()], {"chat_template": _OTHER}, False),
    ],
)
def test_a_chat_is_read_as_vllm_would(
    renderer: Any, messages: list[Any], more: dict[str, Any], *, is_at_once: bool
) -> None:
    """On the loop or in vLLM's threads, with the same tokens and the same conversation."""
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import ChatParams, TokenizeParams

    async def read(function: Any) -> Any:
        # What vLLM's handlers merge into each request's parameters.
        kwargs = {"tokenize": False, "add_generation_prompt": False, **more.get("chat_template_kwargs", {})}
        chat = ChatParams(chat_template=more.get("chat_template"), chat_template_kwargs=kwargs)
        conversations, (prompt,) = await function(
            renderer, [copy.deepcopy(messages)], chat, TokenizeParams(8192), prompt_extras={"cache_salt": "salt"}
        )
        return conversations, {name: value for name, value in prompt.items() if name != "arrival_time"}

    ours = asyncio.run(read(type(renderer).render_chat_async))
    assert is_at_once is (renderer.given_away == 0)

    assert asyncio.run(read(BaseRenderer.render_chat_async)) == ours
    assert ours[1]["prompt_token_ids"]
    assert ours[1]["cache_salt"] == "salt"


@pytest.mark.parametrize(
    ("prompts", "is_at_once"),
    [
        ([{"prompt": "one two"}], True),
        ([{"prompt": "one"}, {"prompt": "two"}], True),
        ([{"prompt": "one"}] * 33, False),
        ([{"prompt": _LONG}], False),
    ],
)
def test_a_prompt_is_read_as_vllm_would(renderer: Any, prompts: list[Any], *, is_at_once: bool) -> None:
    """The same for completions."""
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import TokenizeParams

    async def read(function: Any) -> Any:
        return [each["prompt_token_ids"] for each in await function(renderer, prompts, TokenizeParams(8192))]

    ours = asyncio.run(read(type(renderer).render_cmpl_async))
    assert is_at_once is (renderer.given_away == 0)

    assert asyncio.run(read(BaseRenderer.render_cmpl_async)) == ours


def test_the_servers_own_template_is_trusted(renderer: Any) -> None:
    """One of the instance file is read at once; a client's may take long, where clients may bring them."""
    from vllm.renderers.params import ChatParams, TokenizeParams

    short_texts.trust(SimpleNamespace(online_renderer=SimpleNamespace(renderer=renderer, chat_template=_OTHER)))
    for template, given_away in ((_OTHER, 0), (f"{_OTHER} ", 2)):
        params = ChatParams(chat_template=template, chat_template_kwargs={"tokenize": False})
        asyncio.run(renderer.render_chat_async([[_chat()]], params, TokenizeParams(8192)))
        assert given_away == renderer.given_away


def test_no_copy_of_the_tokenizer_is_made_on_the_loop(renderer: Any) -> None:
    """Where all are in use, vLLM's threads have another one made."""
    from vllm.renderers.params import ChatParams, TokenizeParams

    while tokenizer_copies.is_one_free(renderer.tokenizer):
        type(renderer.tokenizer).free_copies.get()
    params = ChatParams(chat_template_kwargs={"tokenize": False})

    asyncio.run(renderer.render_chat_async([[_chat()]], params, TokenizeParams(8192)))

    assert renderer.given_away


def test_a_pool_that_is_made_otherwise_is_not_known() -> None:
    """Then all texts are read as vLLM does it, and no start fails."""
    assert tokenizer_copies._copies_of(dict) is None
    assert tokenizer_copies._copies_of(type("Pool", (), {"__call__": lambda _: 1})) is None


def test_an_error_is_the_same(renderer: Any) -> None:
    """A prompt that is too long for the model."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.params import ChatParams, TokenizeParams

    params = ChatParams(chat_template_kwargs={"tokenize": False})
    with pytest.raises(VLLMValidationError, match="maximum context length is 3 tokens"):
        asyncio.run(renderer.render_chat_async([[_chat("one " * 9)]], params, TokenizeParams(3)))
