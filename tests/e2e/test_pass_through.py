"""What the file says about templates, parsers and the kind of model reaches vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.daemon import MODEL_NAME, Daemon

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]

_TEMPLATE = "{{ mood | default('plain') }}:{{ messages[-1]['content'] }}\nAnswer:"


@pytest.fixture
def templated(daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """A daemon with a template of its own, a default for it, and a reasoning parser."""
    template = tmp_path / "template.jinja"
    template.write_text(_TEMPLATE)
    engine = {
        "chat-template": str(template),
        "default_chat_template_kwargs.mood": "cheerful",
        "reasoning_parser": "granite",
    }
    return daemon({"engine": engine}).wait_ready()


def test_the_template_and_its_defaults_are_used(templated: Daemon) -> None:
    """The prompt is made by the file's template and kwargs; a request may override them."""

    def prompt(**more: object) -> str:
        asked = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "add_special_tokens": False}
        tokens = templated.http.post("/tokenize", json=asked | more).raise_for_status().json()["tokens"]
        back = templated.http.post("/detokenize", json={"model": MODEL_NAME, "tokens": tokens}).raise_for_status()
        return str(back.json()["prompt"])

    assert "cheerful:Hi\nAnswer:" == prompt()
    assert "grumpy:Hi\nAnswer:" == prompt(chat_template_kwargs={"mood": "grumpy"})
    assert 8 == templated.chat().raise_for_status().json()["usage"]["completion_tokens"]


def test_an_embedding_model_gives_embeddings(daemon: Callable[..., Daemon]) -> None:
    """A model that pools becomes ready without generating a token, serves embeddings and nothing else."""
    pooling = daemon({"engine": {"runner": "pooling", "convert": "embed"}}).wait_ready()
    with openai.OpenAI(base_url=f"{pooling.url}/v1", api_key="none", max_retries=0) as client:
        both = client.embeddings.create(model=MODEL_NAME, input=["a cat", "a dog"])
    assert [576, 576] == [len(each.embedding) for each in both.data]
    assert both.data[0].embedding != both.data[1].embedding
    assert pooling.chat().status_code in {400, 404}
    assert "serving" == pooling.status()["state"]
