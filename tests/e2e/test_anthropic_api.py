"""Anthropic's Messages API with Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

from llm_serve.engine import openai_routes
from tests.daemon import MODEL_NAME, Daemon

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture
def client(shared: Daemon) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, without second tries."""
    with anthropic.Anthropic(base_url=shared.url, api_key="none-needed", max_retries=0, timeout=120) as client:
        yield client


def test_a_message_is_answered_with_text_and_usage(client: anthropic.Anthropic) -> None:
    """messages.create gives one block of text, a reason for its end and a count."""
    answer = client.messages.create(
        model=MODEL_NAME, max_tokens=12, messages=[{"role": "user", "content": "Say hello."}], system="Be brief."
    )

    (block,) = answer.content
    assert "text" == block.type
    assert block.text
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert 12 >= answer.usage.output_tokens > 0


def test_a_streamed_message_adds_up(client: anthropic.Anthropic) -> None:
    """The stream's pieces are the final message's text."""
    with client.messages.stream(
        model=MODEL_NAME, max_tokens=12, messages=[{"role": "user", "content": "Say hello."}]
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert final.content[0].text == text  # type: ignore[union-attr]
    assert final.stop_reason in ("end_turn", "max_tokens")


def test_tokens_are_counted_as_they_are_for_an_answer(client: anthropic.Anthropic) -> None:
    """count_tokens says what the answer's usage says."""
    messages = [{"role": "user", "content": "How many tokens is this?"}]

    count = client.messages.count_tokens(model=MODEL_NAME, messages=messages)  # type: ignore[arg-type]
    answer = client.messages.create(model=MODEL_NAME, max_tokens=1, messages=messages)  # type: ignore[arg-type]

    assert answer.usage.input_tokens == count.input_tokens


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    """The error has Anthropic's form, so that the client knows it."""
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", max_tokens=1, messages=[{"role": "user", "content": "x"}])

    assert isinstance(caught.value.body, dict)
    assert "error" == caught.value.body["type"]
    assert MODEL_NAME in caught.value.body["error"]["message"]


def test_a_message_without_max_tokens_is_refused(shared: Daemon) -> None:
    """A field that Anthropic requires is required here."""
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "x"}]}

    answer = shared.http.post("/v1/messages", json=body)

    assert 400 == answer.status_code
    assert "max_tokens" in answer.text


def test_without_the_option_there_are_no_messages() -> None:
    """anthropic_messages opens /v1/messages and nothing else does."""
    closed, opened = (openai_routes.allowed(anthropic_messages=choice) for choice in (False, True))

    assert {("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")} == opened - closed
    assert set() == closed - opened
