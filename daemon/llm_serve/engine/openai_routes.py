"""The routes of the model that clients may call: the allow-list, apart from vLLM to be there at once."""

from __future__ import annotations

Route = tuple[str, str]
"""(method, path)"""

OPENAI: frozenset[Route] = frozenset(
    {
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/{response_id}"),
        ("POST", "/v1/responses/{response_id}/cancel"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    }
)
ANTHROPIC: frozenset[Route] = frozenset({("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")})


def allowed(*, anthropic_messages: bool) -> frozenset[Route]:
    """Everything that clients may call on the model."""
    return OPENAI | (ANTHROPIC if anthropic_messages else frozenset())
