"""Every name of the installed vLLM that engine/ relies on, with the shape that it relies on.

When a new vLLM breaks one of these, the test names it; without them the first engine failure would. What belongs to one subject
is beside this: processes, routes, tokenizers, front ends.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, Gauge
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError
from vllm.v1.engine import core_client, exceptions
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from llm_serve.engine import factory, survivor
from tests.contract.surface import parameters

pytestmark = pytest.mark.vllm


ENGINE = Path(factory.__file__).parent


def imported_names() -> Iterator[tuple[str, str]]:
    """(module, name) of every `from vllm... import name` in engine/."""
    for path in sorted(ENGINE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((node.module or "", alias.name) for alias in node.names)


def has(module: str, name: str) -> bool:
    """Whether a module has a name; of one whose compiled part another build has, whether its source defines it."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return False
        defined = (ast.ClassDef, ast.FunctionDef)
        return name in {
            node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, defined)
        }
    return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize(("module", "name"), sorted(set(imported_names())))
def test_every_name_that_is_imported_is_there(module: str, name: str) -> None:
    """Imports inside functions fail only when they are run; here all of them are tried."""
    assert has(module, name)


# AsyncLLM, as the factory uses it.
def test_an_engine_is_built_from_a_configuration() -> None:
    """from_vllm_config takes what the factory gives it."""
    given = {"vllm_config", "usage_context", "aggregate_engine_logging", "disable_log_stats"}

    assert given <= parameters(AsyncLLM.from_vllm_config).keys()
    assert {"aggregate_engine_logging", "disable_log_stats"} <= parameters(
        importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
    ).keys()


def test_threads_of_an_ended_renderer_can_be_had_again() -> None:
    """What vLLM's handlers have of them is an executor that takes work again after its end."""
    from vllm.renderers import base

    executor = base._SwappableExecutor(max_workers=1)
    executor.shutdown()
    executor.replace_inner()

    assert 3 == executor.submit(lambda: 3).result(10)
    assert "_SwappableExecutor(max_workers" in inspect.getsource(base.BaseRenderer.__init__)
    executor.shutdown()


def test_an_engine_is_ended_with_a_time_limit() -> None:
    """AsyncLLM and its core client take the seconds that a shutdown may last."""
    for owner in (AsyncLLM, core_client.MPClient):
        assert "timeout" in parameters(owner.shutdown)


@pytest.mark.parametrize("name", ["output_handler", "engine_core", "output_processor", "renderer", "input_processor"])
def test_an_engine_has_the_parts_that_are_reached_for(name: str) -> None:
    """Attributes that are set in AsyncLLM.__init__ have no other sign of their existence."""
    assert f"self.{name}" in inspect.getsource(AsyncLLM)


def test_a_dead_engine_says_so() -> None:
    """`errored` is what the watch reads, and `dead_error` what requests get."""
    assert isinstance(AsyncLLM.errored, property)
    assert isinstance(AsyncLLM.dead_error, property)


def test_the_first_token_can_be_asked_for() -> None:
    """The proof of readiness uses these options of a request."""
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

    assert {"max_tokens", "temperature", "detokenize"} <= parameters(SamplingParams).keys()
    assert "task" in parameters(PoolingParams)
    assert inspect.iscoroutinefunction(AsyncLLM.get_supported_tasks)


# The survivor in front of it.
def public_methods(owner: type) -> dict[str, Any]:
    """The public methods that a class defines itself."""
    return {name: value for name, value in vars(owner).items() if not name.startswith("_") and callable(value)}


@pytest.mark.parametrize("name", sorted(public_methods(EngineClient)))
def test_the_survivor_has_every_method_of_an_engine(name: str) -> None:
    """Handlers may call whatever EngineClient declares, and await what it declares as async."""
    theirs, ours = getattr(EngineClient, name), vars(survivor.Survivor)[name]

    assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours)


@pytest.mark.parametrize("name", ["generate", "encode"])
def test_requests_reach_the_engine_as_they_were_made(name: str) -> None:
    """The leading parameters have vLLM's names and order, so that handlers may pass them either way."""
    theirs, ours = parameters(getattr(EngineClient, name)), parameters(getattr(survivor.Survivor, name))

    assert list(theirs)[:4] == list(ours)[:4]
    assert inspect.Parameter.VAR_KEYWORD in {parameter.kind for parameter in ours.values()}
    for owner in (EngineClient, AsyncLLM):
        given = parameters(getattr(owner, name))
        positional = [each for each in given.values() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        takes_rest = inspect.Parameter.VAR_POSITIONAL in {each.kind for each in ours.values()}
        assert len(positional) == 4 or takes_rest


def test_the_survivor_has_every_attribute_of_an_engine() -> None:
    """What EngineClient only annotates is read by handlers all the same."""
    annotated = set(EngineClient.__annotations__)

    assert {"vllm_config", "model_config", "renderer", "input_processor"} == annotated
    assert annotated <= vars(survivor.Survivor).keys()


def test_admission_is_asked_as_vllm_asks_it() -> None:
    """check_admission has the parameters that handlers pass."""
    theirs, ours = parameters(EngineClient.check_admission), parameters(survivor.Survivor.check_admission)

    assert [(each.name, each.default) for each in theirs.values()] == [
        (each.name, each.default) for each in ours.values()
    ]


@pytest.mark.parametrize("eos", [2, [2, 7]])
def test_a_request_is_known_again_after_vllm_has_filled_it_in(eos: int | list[int]) -> None:
    """One that kills engines is refused when it comes again: what vLLM does to it meanwhile does not count."""
    from vllm.sampling_params import SamplingParams

    asked = {"prompt_token_ids": [1, 2, 3]}
    given, again = SamplingParams(max_tokens=8, stop_token_ids=[5]), SamplingParams(max_tokens=8, stop_token_ids=[5])
    name = survivor._Name("one", asked, given)
    before = name.fingerprint()

    given.update_from_generation_config({"eos_token_id": eos}, 2)
    given.max_tokens = 4

    assert before == name.fingerprint() == survivor._Name("two", dict(asked), again).fingerprint()
    assert before != survivor._Name("three", asked, SamplingParams(max_tokens=9, stop_token_ids=[5])).fingerprint()
    assert before != survivor._Name("four", {"prompt_token_ids": [1, 2]}, again).fingerprint()


def test_a_survivor_can_be_made() -> None:
    """No abstract method is left open."""
    assert 0 == survivor.Survivor(lambda _: None).epoch


def test_a_cut_answer_is_an_error_that_vllm_knows_how_to_send() -> None:
    """GenerationError takes a message, and its status is what a client gets."""
    error = survivor.EngineRestarted("the engine died")

    assert isinstance(error, GenerationError)
    assert HTTPStatus.INTERNAL_SERVER_ERROR == GenerationError("x").status_code
    assert HTTPStatus.SERVICE_UNAVAILABLE == error.status_code
    assert "the engine died" in str(error)


def test_the_errors_of_an_engine_are_all_known() -> None:
    """A new exception class in this module may need an answer of its own."""
    defined = {
        name for name, value in vars(exceptions).items() if getattr(value, "__module__", "") == exceptions.__name__
    }

    assert {"EngineDeadError", "EngineGenerateError"} == defined
    assert "EngineCore encountered an issue" in str(exceptions.EngineDeadError())


def test_every_request_can_be_ended_with_an_error() -> None:
    """propagate_error takes the error, and reaches all requests by itself."""
    given = list(parameters(OutputProcessor.propagate_error).values())

    assert 2 == len(given)


# Metrics.
def test_a_new_engine_leaves_our_metrics_alone() -> None:
    """vLLM removes what begins with vllm: from the registry at each start; ours begin otherwise."""
    prometheus = importlib.import_module("vllm.v1.metrics.prometheus")
    ours = Gauge("llm_serve_test_of_unregistering", "Ours.")
    Gauge("vllm:test_of_unregistering", "Theirs.")

    prometheus.unregister_vllm_metrics()
    names = set(REGISTRY._names_to_collectors)
    REGISTRY.unregister(ours)

    assert "llm_serve_test_of_unregistering" in names
    assert "vllm:test_of_unregistering" not in names


def test_this_process_has_started_no_engine() -> None:
    """Looking at vLLM's surface builds nothing and touches no device."""
    torch = sys.modules["torch"]

    assert not torch.cuda.is_initialized()
