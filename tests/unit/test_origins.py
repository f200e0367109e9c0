"""Web pages of other origins, against a gate that wants a key."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from llm_serve.web import origins
from llm_serve.web.asgi import Receive, Scope, Send
from llm_serve.web.errors import error_response

PAGE = "https://chat.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


async def gate(scope: Scope, receive: Receive, send: Send) -> None:
    """Let nobody in."""
    await error_response(401, "a key is needed.", code="invalid_api_key")(scope, receive, send)


async def asked(options: dict[str, Any], method: str, headers: dict[str, str]) -> httpx.Response:
    """What a browser gets."""
    transport: Any = httpx.ASGITransport(origins.around(gate, options))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.request(method, "/v1/chat/completions", headers=headers)


@pytest.mark.parametrize("allowed", [[PAGE], f'["{PAGE}"]', ["*"]])
async def test_a_page_that_is_named_may_ask_before_it_has_shown_a_key(allowed: Any) -> None:
    """The preflight needs none; the request itself does, and the page can read that it was refused."""
    preflight = await asked({"allowed_origins": allowed}, "OPTIONS", PREFLIGHT)
    refused = await asked({"allowed_origins": allowed}, "POST", {"origin": PAGE})

    assert 200 == preflight.status_code
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert 401 == refused.status_code
    assert {preflight.headers["access-control-allow-origin"], refused.headers["access-control-allow-origin"]} <= {
        PAGE,
        "*",
    }


async def test_another_page_may_not() -> None:
    """It gets no permission, and so its browser shows it nothing."""
    preflight = await asked({"allowed_origins": ["https://other.example"]}, "OPTIONS", PREFLIGHT)
    refused = await asked({"allowed_origins": ["https://other.example"]}, "POST", {"origin": PAGE})

    assert 400 == preflight.status_code
    assert "access-control-allow-origin" not in {*preflight.headers, *refused.headers}


@pytest.mark.parametrize("options", [{}, {"allowed_origins": []}])
def test_by_default_there_is_none(options: dict[str, Any]) -> None:
    """And nothing stands in the way of an answer."""
    assert gate is origins.around(gate, options)
