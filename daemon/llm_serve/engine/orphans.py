"""Lets an engine give up the requests of a front end that has died: nobody waits for them, and they take places.

vLLM 0.32 aborts requests by their ids, which only the one that sent them knows. The scheduler knows whose each is, so
it is asked there, with a method more on the class that vLLM's clients call by name.
"""

from __future__ import annotations

import importlib
from typing import Any

METHOD = "llm_serve_abort_requests_of"


def install() -> None:
    """Give the engines that this process forks the method."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    setattr(core.EngineCore, METHOD, _abort_requests_of)


def _abort_requests_of(engine: Any, client: int) -> int:
    """Abort all requests of the client with this index. Returns how many there were."""
    names = [name for name, request in engine.scheduler.requests.items() if request.client_index == client]
    if names:
        engine.abort_requests(names)
    return len(names)


async def abort_requests_of(llm: Any, client: int) -> int:
    """Have the engine behind this AsyncLLM abort another client's requests. Returns how many there were."""
    return int(await llm.engine_core.call_utility_async(METHOD, client))
