"""The fields that the edge knows are those of the installed vLLM's request classes, for every route that is served."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, RootModel

from llm_serve.core import request_fields
from llm_serve.engine import openai_routes

BODIES = {
    ("POST", "/v1/chat/completions"): "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
    ("POST", "/v1/completions"): "vllm.entrypoints.openai.completion.protocol:CompletionRequest",
    ("POST", "/v1/responses"): "vllm.entrypoints.openai.responses.protocol:ResponsesRequest",
    ("POST", "/v1/embeddings"): "vllm.entrypoints.pooling.embed.protocol:EmbeddingRequest",
    ("POST", "/tokenize"): "vllm.entrypoints.serve.tokenize.protocol:TokenizeRequest",
    ("POST", "/detokenize"): "vllm.entrypoints.serve.tokenize.protocol:DetokenizeRequest",
    ("POST", "/v1/messages"): "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest",
    ("POST", "/v1/messages/count_tokens"): "vllm.entrypoints.anthropic.protocol:AnthropicCountTokensRequest",
}
NO_BODY = {("POST", "/v1/responses/{response_id}/cancel")}
OLD = {"best_of", "embedding_types", "images", "input_type", "inputs", "logits_processors", "output_dimension"}
OLD |= {"texts", "truncate", "structured_outputs.grammar", "structured_outputs.regex"}
"""What the edge knows beside them: fields of earlier versions and of routes that are not served, and parts of fields."""


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The request classes that an annotation means."""
    if get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from models(each)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, RootModel):
        yield annotation
    else:
        yield from models(get_args(annotation)[0])


def fields_of(where: str) -> set[str]:
    """Every name that a body of this kind may have."""
    module, _, name = where.partition(":")
    found = getattr(pytest.importorskip(module), name)
    return {
        alias
        for model in models(found)
        for field, info in model.model_fields.items()
        for alias in (field, info.alias)
        if alias
    }


def test_every_route_has_its_request_class_here() -> None:
    """A route that is added to the allow-list is looked at by the edge, too."""
    posted = {route for route in openai_routes.allowed(anthropic_messages=True) if route[0] == "POST"}

    assert posted - NO_BODY == BODIES.keys()


@pytest.mark.parametrize("route", BODIES)
def test_no_field_is_unknown_to_the_edge(route: tuple[str, str]) -> None:
    """A field that a new vLLM brings has to be judged before it is served."""
    assert set() == fields_of(BODIES[route]) - request_fields.KNOWN


def test_the_edge_knows_no_field_that_nobody_has() -> None:
    """Else a misspelt name in the list would guard nothing."""
    everything = set().union(*map(fields_of, BODIES.values()))

    assert set() == request_fields.KNOWN - everything - OLD
