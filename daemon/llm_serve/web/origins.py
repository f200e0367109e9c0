"""Web pages of other origins that may ask: whoever the file names, and by default none.

Outside the gate, because a browser's first question (OPTIONS) carries no key, and so that a page can read refusals too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from llm_serve.web.asgi import Asgi


def around(app: Asgi, options: Mapping[str, Any]) -> Asgi:
    """`app` behind vLLM's own options `allowed_origins`, `allowed_methods`, `allowed_headers`, `allow_credentials`."""
    origins = _listed(options.get("allowed_origins", ()))
    if not origins:
        return app
    guard: Any = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=_listed(options.get("allowed_methods", ("*",))),
        allow_headers=_listed(options.get("allowed_headers", ("*",))),
        allow_credentials=bool(options.get("allow_credentials")),
        expose_headers=("x-request-id", "retry-after"),
    )
    return guard  # type: ignore[no-any-return]


def _listed(value: Any) -> Sequence[str]:
    """As vLLM takes it: a list, or one written as JSON."""
    listed: Sequence[str] = json.loads(value) if isinstance(value, str) else value
    return listed
