"""vLLM's application and its routes, as it builds them and as we bind them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")


from llm_serve.engine import openai, openai_routes
from tests.contract.surface import parameters

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def arguments() -> Any:
    """The arguments of `vllm serve` with every default."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args([])


def routes_of(app: Any) -> set[tuple[str, str]]:
    """(method, path) of everything that an application answers."""
    return {(method, route.path) for route in app.router.routes for method in getattr(route, "methods", None) or ()}


def test_the_application_is_built_and_bound_as_vllm_does() -> None:
    """build_app and init_app_state have the parameters that are passed by position."""
    app = importlib.import_module("vllm.entrypoints.launchers.app")
    state = importlib.import_module("vllm.entrypoints.launchers.api_server.app_state")

    assert ["args", "supported_tasks", "model_config"] == list(parameters(app.build_app))
    assert ["engine_client", "state", "args", "supported_tasks"] == list(parameters(state.init_app_state))


@pytest.mark.filterwarnings("ignore")
def test_no_handler_looks_for_clients_that_have_gone(arguments: Any) -> None:
    """The gate does that for all of them; each of vLLM's that does is known by its wrapper, and works without."""
    from vllm.entrypoints.launchers.app import build_app

    def handlers(app: Any) -> dict[str, Any]:
        routes = (route for route in app.router.routes if "POST" in (getattr(route, "methods", None) or ()))
        return {route.path: route.dependant.call for route in routes}

    path = "/v1/chat/completions"
    theirs, ours = (
        handlers(build(arguments, ("generate",), None, *more))
        for build, more in ((build_app, ()), (openai.build_app, (openai_routes.allowed(anthropic_messages=True),)))
    )

    assert theirs[path].__code__ is not ours[path].__code__
    assert theirs[path].__wrapped__.__code__ is ours[path].__code__
    looking = {each for each, handler in theirs.items() if handler.__code__ is theirs[path].__code__}
    assert looking.isdisjoint({each for each, handler in ours.items() if handler.__code__ is theirs[path].__code__})
    assert {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/tokenize"} <= looking


@pytest.mark.filterwarnings("ignore")
def test_every_route_on_our_list_is_vllm_s(arguments: Any) -> None:
    """With the tasks of chat and of embedding models, all allowed routes exist, and only they are left."""
    allowed = openai_routes.allowed(anthropic_messages=True)
    found: set[tuple[str, str]] = set()

    embedding = MagicMock()
    embedding.get_pooling_task.return_value = "embed"
    for tasks, config in ((("generate",), None), (("embed",), embedding)):
        app = openai.build_app(arguments, tasks, config, allowed)
        found |= routes_of(app)

    assert allowed == found - {("HEAD", path) for _, path in allowed}


@pytest.mark.filterwarnings("ignore")
def test_the_list_keeps_something_out(arguments: Any) -> None:
    """vLLM registers more than clients should reach; otherwise the list would be for nothing."""
    from vllm.entrypoints.launchers.app import build_app

    everything = routes_of(build_app(arguments, ("generate",), None))

    assert {("GET", "/health"), ("GET", "/docs")} <= everything
    assert openai_routes.allowed(anthropic_messages=False) - everything <= {("POST", "/v1/embeddings")}


@pytest.mark.filterwarnings("ignore")
def test_no_web_page_may_talk_to_the_model_by_default(arguments: Any) -> None:
    """Who may is asked before the gate; vLLM's own place for it is left out, and its default is nobody as well."""
    from starlette.middleware.cors import CORSMiddleware
    from vllm.entrypoints.launchers.app import build_app

    ours = openai.build_app(arguments, ("generate",), None, frozenset())

    assert [] == arguments.allowed_origins
    assert CORSMiddleware in {each.cls for each in build_app(arguments, ("generate",), None).user_middleware}
    assert CORSMiddleware not in {each.cls for each in ours.user_middleware}
    assert ours.middleware_stack is None, "what vLLM built before is still asked"
    layers = [ours.build_middleware_stack()]
    while hasattr(layers[-1], "app"):
        layers.append(layers[-1].app)
    assert len(layers) > 3
    assert not any(isinstance(each, CORSMiddleware) for each in layers)
