"""Every name of the installed vLLM that engine/ relies on, with the shape that it relies on.

When a new vLLM breaks one of these, the test names it; without them the first engine failure would.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, Gauge
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError
from vllm.v1.engine import core_client, exceptions
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from llm_serve.core import progress
from llm_serve.core.errors import ConfigError
from llm_serve.engine import (
    assembler,
    attach,
    factory,
    forkserver,
    long_texts,
    media_cache,
    openai,
    openai_routes,
    orphans,
    pieces,
    resume,
    startup_plans,
    survivor,
    tokenizer_copies,
)

pytestmark = pytest.mark.vllm

ENGINE = Path(factory.__file__).parent
VLLM = Path(inspect.getfile(EngineClient)).parents[1]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name."""
    return dict(inspect.signature(function).parameters)


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


# What a failure leaves.
def test_exit_codes_are_where_they_are_looked_for() -> None:
    """The manager of engine processes is found in the client's resources, and in the frame of a failed start."""
    fields = {field.name for field in dataclasses.fields(core_client.BackgroundResources)}
    engine_utils = importlib.import_module("vllm.v1.engine.utils")

    assert "engine_manager" in fields
    assert "self.processes" in inspect.getsource(engine_utils.CoreEngineProcManager)
    assert "launch = CoreEngineLaunch(" in inspect.getsource(engine_utils)
    assert "engine_manager" in parameters(engine_utils.CoreEngineLaunch)


def test_processes_have_the_names_that_rank_their_errors() -> None:
    """Workers and EngineCores are told apart by name, before and after they have named themselves."""
    core = (VLLM / "v1/engine/core.py").read_text()
    manager = (VLLM / "v1/engine/utils.py").read_text()
    executor = (VLLM / "v1/executor/multiproc_executor.py").read_text()

    assert 'else "EngineCore"' in manager
    assert 'process_title = "EngineCore"' in core
    assert 'process_name = "Worker"' in executor
    assert 'name=f"VllmWorker-{rank}"' in executor


def test_records_name_their_process() -> None:
    """vLLM's record factory adds the name that the relay reads."""
    logger = importlib.import_module("vllm.logger")
    make = logger._VllmLogRecordFactory(logging.LogRecord)

    record = make("vllm", logging.INFO, __file__, 1, "text", (), None)

    assert record.processName == record.vllm_process_name


@cache
def vllm_source() -> str:
    """All of vLLM's Python source, with texts that are split over lines put together again."""
    whole = "\n".join(path.read_text(errors="replace") for path in sorted(VLLM.rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", whole)


@pytest.mark.parametrize("marker", [marker for marker, _ in progress._MARKERS])
def test_every_phase_marker_is_something_that_vllm_says(marker: str) -> None:
    """Each text by which a start's progress is told is in vLLM's source."""
    assert marker in vllm_source()


@pytest.mark.parametrize(
    "text",
    [
        "No available memory for the cache blocks",
        "estimated maximum model length is",
        "KV cache is needed",
        "Free memory on device",
        "Available memory on node",
        "Cannot find any model weights",
        "Weight files referenced in index but missing",
        "not initialized from checkpoint",
        "Insufficient space in {shm_path}",
        "are not supported for now",
        "must be divisible by tensor parallel size",
        "Unknown attention backend",
        "EngineCore failed to start.",
        "WorkerProc failed to start.",
        "Engine core initialization failed",
    ],
)
def test_every_text_of_a_failure_is_something_that_vllm_says(text: str) -> None:
    """The classification of failures rests on vLLM's own words."""
    assert text in vllm_source()


# The environment and the fork server.
VARIABLES = (*factory.PROCESS_ENVIRONMENT, "VLLM_LOGGING_CONFIG_PATH", "VLLM_RPC_BASE_PATH")
OF_OTHERS = {"CUDA_DEVICE_ORDER": "the CUDA driver", "SPT_NOENV": "setproctitle"}


@pytest.mark.parametrize("name", [name for name in VARIABLES if name not in OF_OTHERS])
def test_every_variable_that_is_set_is_read(name: str) -> None:
    """A variable that vLLM does not know any more would be set in vain."""
    assert name in envs.environment_variables


def test_triton_reads_the_assembler_where_torch_would_name_it() -> None:
    """By this variable torch tells Triton of its own ptxas, where it has one."""
    tasks = importlib.import_module("torch._inductor.runtime.compile_tasks")

    assert assembler.VARIABLE in inspect.getsource(tasks._set_triton_ptxas_path)


def test_a_process_with_a_title_keeps_its_environment() -> None:
    """setproctitle, by which vLLM names its processes, still reads SPT_NOENV."""
    spec = importlib.util.find_spec("setproctitle._setproctitle")
    assert spec is not None
    assert spec.origin is not None
    assert b"SPT_NOENV" in Path(spec.origin).read_bytes()


def test_vllm_is_configured_to_log_to_us() -> None:
    """The function that reads VLLM_LOGGING_CONFIG_PATH is called with the parsed arguments."""
    logger = importlib.import_module("vllm.logger")

    assert ["args"] == list(parameters(logger.configure_logging_from_args))
    assert "VLLM_LOGGING_CONFIG_PATH" in inspect.getsource(logger)


@pytest.mark.parametrize("name", forkserver._PATCHED_MODULES)
def test_the_start_method_is_looked_up_where_it_is_replaced(name: str) -> None:
    """get_mp_context is called by this name in the module, with no arguments."""
    module = importlib.import_module(name)

    assert {} == parameters(module.get_mp_context)


def test_the_start_method_is_looked_up_nowhere_else() -> None:
    """Whoever starts a process of an engine gets its context from a module that is patched."""
    found = {
        ".".join(path.relative_to(VLLM.parent).with_suffix("").parts)
        for folder in ("v1/engine", "v1/executor", "utils")
        for path in (VLLM / folder).rglob("*.py")
        if "get_mp_context().Process" in (text := path.read_text()) or "context = get_mp_context()" in text
    }

    assert found <= set(forkserver._PATCHED_MODULES)


def test_cached_environment_can_be_forgotten() -> None:
    """A fork has another environment than the server that it came from."""
    assert {} == parameters(envs.disable_envs_cache)


_LIMITS = {
    "cache_config.gpu_memory_utilization": 0.5,
    "model_config.max_model_len": 512,
    "scheduler_config.max_num_seqs": 4,
    "scheduler_config.max_num_batched_tokens": 256,
}


@pytest.mark.parametrize("changed", [None, *_LIMITS])
def test_a_start_up_plan_holds_for_the_limits_it_was_measured_under(
    changed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM saves one and finds it again, by its own code; after any limit has changed it finds none."""
    plans = importlib.import_module("vllm.v1.worker.startup_plan")
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(plans, "compute_plan_fingerprint", lambda *_: "vLLM's own")
    startup_plans.install()
    config = SimpleNamespace(
        cache_config=SimpleNamespace(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None),
        model_config=SimpleNamespace(max_model_len=1024),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=2048),
    )
    worker = SimpleNamespace(
        vllm_config=config, cache_config=config.cache_config, rank=0, init_snapshot=SimpleNamespace(free_memory=100),
        parallel_config=SimpleNamespace(world_size=1),
    )  # fmt: skip
    plans.maybe_save_startup_plan(worker, 42)
    if changed:
        part, name = changed.split(".")
        setattr(getattr(config, part), name, _LIMITS[changed])

    plans.maybe_apply_startup_plan(worker)

    assert (None if changed else 42) == worker.cache_config.kv_cache_memory_bytes


def preloaded_modules() -> list[str]:
    """The modules that the fork server loads, read off its source: importing it would act."""
    tree = ast.parse((ENGINE / "preload.py").read_text())
    lists = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in {"_ALWAYS", "_CPU", "_CUDA"}
    }
    assert {"_ALWAYS", "_CPU", "_CUDA"} == lists.keys()
    return sorted(name for names in lists.values() for name in names)


@pytest.mark.parametrize("name", preloaded_modules())
def test_every_preloaded_module_is_there(name: str) -> None:
    """One that is missing would only make each start slower, without a word."""
    assert importlib.util.find_spec(name) is not None


def test_a_model_s_module_is_found_by_its_architecture() -> None:
    """The registry maps an architecture to the module that holds it."""
    registry = importlib.import_module("vllm.model_executor.models.registry")

    module, _ = registry._VLLM_MODELS["LlamaForCausalLM"]

    assert importlib.util.find_spec(f"vllm.model_executor.models.{module}") is not None


# The routes.
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


def test_vllm_looks_into_the_environment_only_while_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each token it would look several times; the next engine's variables are seen all the same."""
    monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "7")
    try:
        with forkserver.environment({"VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": "8"}):
            assert 8 == envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        assert 7 == envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        forkserver.remember_settings()
        monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "9")
        assert 7 == envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        with forkserver.environment({"VLLM_SOMETHING": "1"}):
            assert 9 == envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        assert 9 == envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
    finally:
        envs.disable_envs_cache()


def test_a_variable_that_means_nothing_is_told_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where all of them are remembered."""
    monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "soon")
    try:
        forkserver.remember_settings()
        with pytest.raises(ValueError, match="soon"):
            assert envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
    finally:
        envs.disable_envs_cache()


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


def test_the_memo_that_keeps_tokenizers_can_be_cleared() -> None:
    """A dead engine's tokenizer is freed by clearing what vLLM remembers of chat templates, by its name there."""
    from vllm.utils import func_utils

    func_utils.supports_kw(lambda tools: tools, "tools")
    assert 0 < func_utils._supports_kw.cache_info().currsize
    func_utils._supports_kw.cache_clear()
    assert 0 == func_utils._supports_kw.cache_info().currsize


def test_copies_of_a_tokenizer_are_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's renderer gets its pool at once, which soon has as many copies as vLLM would have made, and works."""
    from tokenizers import Tokenizer, models
    from vllm.renderers import hf as renderer
    from vllm.tokenizers import hf

    made: list[object] = []
    is_allowed, deepcopy = threading.Event(), copy.deepcopy

    def slowly(value: object) -> object:
        is_allowed.wait(10)
        made.append(deepcopy(value))
        return made[-1]

    monkeypatch.setattr(hf, "copy", SimpleNamespace(copy=copy.copy, deepcopy=slowly))
    monkeypatch.setattr(renderer, "maybe_make_thread_pool", hf.maybe_make_thread_pool)
    tokenizer_copies.install()
    tokenizer = hf.TokenizersBackend(tokenizer_object=Tokenizer(models.WordLevel({"one": 0, "two": 1}, "one")))

    pool = renderer.maybe_make_thread_pool(tokenizer, 2)
    assert [] == made
    is_allowed.set()
    for thread in threading.enumerate():
        if thread.name == "tokenizer-copy":
            thread.join(10)

    assert 2 == len(made)
    assert ["two", "one"] == pool.convert_ids_to_tokens([1, 0])
    assert 2 == len(made)
    assert pool is renderer.maybe_make_thread_pool(pool, 2)
    assert 2 == len(made)


class Slow:
    """A tokenizer that takes its time, and counts what it reads and where."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        """Read one text. A long one ends only when it is allowed to."""
        self.read.append(threading.current_thread().name)
        self.has_begun.set()
        if len(text) > 1000:
            assert self.may_go_on.wait(30)
        return {"input_ids": [1] * min(len(text), options["max_length"])}  # type: ignore[call-overload]


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's renderer, as far as it has texts read, with a model of 100 tokens."""
    from concurrent.futures import ThreadPoolExecutor

    from vllm.renderers import base
    from vllm.tokenizers import hf
    from vllm.utils.async_utils import make_async

    for name in ("tokenize_prompts", "tokenize_prompts_async"):
        monkeypatch.setattr(base.BaseRenderer, name, getattr(base.BaseRenderer, name))
    monkeypatch.setattr(base.BaseRenderer, "reads_long_texts_aside", True, raising=False)
    monkeypatch.delattr(base.BaseRenderer, "reads_long_texts_aside")
    long_texts.install()
    monkeypatch.setattr(base.BaseRenderer, "__abstractmethods__", frozenset())
    made: Any = object.__new__(base.BaseRenderer)
    made.tokenizer = type("Pool", (Slow, hf.ThreadSafeHFTokenizerMixin), {"max_chars_per_token": 10**6})()
    made.model_config = SimpleNamespace(max_model_len=100)
    executor = ThreadPoolExecutor(1, "vllm")
    made._tokenize_prompt_async = make_async(made._tokenize_prompt, executor=executor)
    yield made
    made.tokenizer.may_go_on.set()
    executor.shutdown()


async def test_a_long_text_keeps_no_short_one_waiting(renderer: Any) -> None:
    """It is read by a thread of its own; and of a request that is refused, nothing more is read."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.params import TokenizeParams

    params = TokenizeParams(max_total_tokens=100)
    many = [{"prompt": "x" * 2000} for _ in range(100)]
    reading = asyncio.create_task(renderer.tokenize_prompts_async(many, params))
    await asyncio.to_thread(renderer.tokenizer.has_begun.wait, 30)

    short = await asyncio.wait_for(renderer.tokenize_prompts_async([{"prompt": "x" * 50}], params), 30)
    assert 50 == len(short[0]["prompt_token_ids"])
    renderer.tokenizer.may_go_on.set()
    with pytest.raises(VLLMValidationError, match="maximum context length is 100 tokens"):
        await reading
    assert ["long-texts_0", "vllm_0"] == renderer.tokenizer.read


async def test_a_text_that_is_far_too_long_is_not_read(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where vLLM asks for no limit, as to count tokens; the option is named."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.params import TokenizeParams

    unlimited = TokenizeParams(max_total_tokens=None)
    too_long = {"prompt": "x" * (long_texts._LEAST_CHARS + 1)}
    with pytest.raises(VLLMValidationError, match=r"limits\.max_prompt_chars"):
        await renderer.tokenize_prompts_async([{"prompt": "x"}, too_long], unlimited)
    with pytest.raises(VLLMValidationError, match=r"limits\.max_prompt_chars"):
        renderer.tokenize_prompts([{"encoder_prompt": too_long, "decoder_prompt": None}], unlimited)

    monkeypatch.setattr(long_texts, "_limit", 10)
    with pytest.raises(VLLMValidationError, match="at most 10 are allowed"):
        await renderer.tokenize_prompts_async([{"prompt": "x" * 11}], unlimited)
    assert [] == renderer.tokenizer.read
    given = [{"prompt": "x" * 11, "prompt_token_ids": [1]}]
    assert [[1]] == [each["prompt_token_ids"] for each in await renderer.tokenize_prompts_async(given, unlimited)]


@pytest.mark.parametrize(("kind", "keeps_data"), [("lru", True), ("shm", False), (None, True)])
def test_the_daemon_keeps_the_images_that_its_engines_have(
    kind: str | None, keeps_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's renderer gets a cache that answers with data; shared memory, which was asked for, is recognised as such."""
    from vllm.multimodal.inputs import MultiModalKwargsItem
    from vllm.renderers import base

    images = SimpleNamespace(
        mm_processor_cache_gb=0.01 if kind else 0, mm_processor_cache_type=kind, mm_shm_cache_max_object_size_mb=1
    )
    model = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: images)
    parallel = SimpleNamespace(_api_process_count=1, data_parallel_size=1, world_size=1)
    monkeypatch.setattr(base, "processor_cache_from_config", None)
    media_cache.install()

    cache: Any = base.processor_cache_from_config(SimpleNamespace(model_config=model, parallel_config=parallel))

    item = MultiModalKwargsItem.dummy(4)
    if cache is not None:
        cache.get_and_update_item((item, []), "black")
        item = cache.get_and_update_item(None, "black")[0]
        cache.close()
    assert keeps_data == resume.is_repeatable({"mm_kwargs": {"image": [item]}})


def test_an_engine_is_started_for_all_front_ends_and_their_clients_can_be_numbered() -> None:
    """The first client starts it, with addresses that can be added to; the others are given theirs."""
    from vllm.v1.engine.utils import EngineZmqAddresses

    assert ["vllm_config", "executor_class", "log_stats", "addresses"] == list(
        parameters(core_client.launch_core_engines)
    )
    assert {"inputs", "outputs"} <= {each.name for each in dataclasses.fields(EngineZmqAddresses)}
    assert {"client_addresses", "client_count", "client_index"} <= parameters(AsyncLLM.from_vllm_config).keys()
    source = inspect.getsource(core_client.MPClient.__init__)
    assert (
        "with launch_core_engines(\n                    vllm_config, executor_class, log_stats, addresses\n" in source
    )
    for name in ("input_address", "output_address", "input_listener", "self._apply_ready_response(payload)"):
        assert name in source


def test_the_offer_is_made_at_the_start_and_nothing_stays_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place has two addresses of its own, and what the engine says of itself is kept."""
    import pickle

    started: list[Any] = []
    monkeypatch.setattr(core_client, "launch_core_engines", lambda *given: started.append(given))
    launch, apply = core_client.launch_core_engines, core_client.MPClient._apply_ready_response
    offers: list[tuple[int, bytes]] = []
    party = attach.Party(3, lambda epoch, offer: offers.append((epoch, offer)))
    addresses = SimpleNamespace(inputs=["ipc:///first"], outputs=["ipc:///out"])

    with party.invited(7, {"a": "config"}, SimpleNamespace(port=1), {"X": "1"}):  # type: ignore[arg-type]
        core_client.launch_core_engines("config", "executor", True, addresses)

    (epoch, pickled) = offers[0]
    offer = pickle.loads(pickled)
    assert (7, {"a": "config"}, {"X": "1"}) == (epoch, offer.config, offer.env)
    assert [requests for requests, _ in offer.addresses] == addresses.inputs[1:]
    assert [answers for _, answers in offer.addresses] == addresses.outputs[1:]
    assert 8 == len(set(addresses.inputs + addresses.outputs))
    assert [("config", "executor", True, addresses)] == started
    assert (launch, apply) == (core_client.launch_core_engines, core_client.MPClient._apply_ready_response)


@pytest.mark.parametrize(
    ("parallel", "ipc", "told"),
    [(1, "direct_rpc", None), (2, "direct_rpc", "data_parallel_size"), (1, "torch_shm", "mm_tensor_ipc")],
)
def test_an_engine_that_cannot_be_shared_is_refused(parallel: int, ipc: str, told: str | None) -> None:
    """In words, before anything is started; a cache that is between one client and its engine is exchanged."""
    from vllm.config import MultiModalConfig, ParallelConfig

    media = MultiModalConfig(mm_tensor_ipc=ipc, mm_processor_cache_type="shm")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=parallel),
        model_config=SimpleNamespace(multimodal_config=media),
    )
    assert "data_parallel_size" in {each.name for each in dataclasses.fields(ParallelConfig)}

    if told is None:
        attach.check(config, "x.toml")
        assert "lru" == media.mm_processor_cache_type
    else:
        with pytest.raises(ConfigError, match=told):
            attach.check(config, "x.toml")


async def test_a_client_meets_an_engine_that_comes_before_or_after_it_or_for_the_second_time() -> None:
    """It is not waited for in vLLM's constructor; vLLM's own greeting may have been said, or not."""
    import tempfile

    import zmq
    import zmq.asyncio
    from vllm.utils.network_utils import make_zmq_listener, make_zmq_socket
    from vllm.v1.engine import EngineCoreRequestType

    with tempfile.TemporaryDirectory() as folder, zmq.Context() as engines:
        address = f"ipc://{folder}/real"
        engine = make_zmq_socket(engines, address, zmq.DEALER, identity=attach._ENGINE, bind=False, linger=0)
        engine.send(b"READY")
        for turn in range(2):
            listener = make_zmq_listener(f"{address}-{turn}", zmq.ROUTER)
            context = zmq.asyncio.Context()
            with attach._greeted(listener.address):
                router = make_zmq_socket(context, listener.address, zmq.ROUTER, bind=True, listener=listener.socket)
                assert [attach._ENGINE, b""] == zmq.Socket.shadow(router.underlying).recv_multipart()
            llm = SimpleNamespace(engine_core=SimpleNamespace(input_socket=router))
            client = attach.Client(llm, SimpleNamespace(), SimpleNamespace(), address)  # type: ignore[arg-type]

            await asyncio.wait_for(attach.meet(client), 10)

            assert [EngineCoreRequestType.WAKEUP.value, b"\xc0"] == engine.recv_multipart()
            await router.send_multipart((attach._ENGINE, b"a request"))
            assert [b"a request"] == engine.recv_multipart()
            router.close(linger=0)
            context.term()
            await asyncio.to_thread(lambda: None)
        engine.close()


def test_what_is_sent_to_meet_an_engine_is_taken_no_notice_of() -> None:
    """EngineCore's input thread decodes what follows, and its loop returns at once."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.serial_utils import MsgpackDecoder

    assert MsgpackDecoder().decode(b"\xc0") is None
    source = inspect.getsource(EngineCoreProc._handle_client_request)
    assert "if request_type == EngineCoreRequestType.WAKEUP:\n            return\n" in source


def test_an_engine_gives_up_the_requests_of_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler knows whose each is, and vLLM's client calls the method by its name."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    monkeypatch.setattr(EngineCore, orphans.METHOD, None, raising=False)
    orphans.install()
    aborted: list[list[str]] = []
    requests = {name: SimpleNamespace(client_index=index) for name, index in (("a", 1), ("b", 2), ("c", 1))}
    engine = SimpleNamespace(scheduler=SimpleNamespace(requests=requests), abort_requests=aborted.append)

    assert 2 == getattr(EngineCore, orphans.METHOD)(engine, 1)
    assert 0 == getattr(EngineCore, orphans.METHOD)(engine, 3)
    assert [["a", "c"]] == aborted
    assert "self.requests: dict[str, Request]" in inspect.getsource(Scheduler.__init__)
    assert "client_index" in parameters(Request.__init__)
    assert ["self", "method", "args"] == list(parameters(core_client.AsyncMPClient.call_utility_async))


def test_pieces_of_answers_are_the_same_without_the_check_for_unknown_fields() -> None:
    """In what they say and in what they refuse; requests keep the check."""
    from pydantic import ValidationError
    from vllm.entrypoints.generate.base.protocol import DeltaMessage, DeltaToolCall
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    class Cited(DeltaMessage):  # type: ignore[misc]  # as vLLM derives one
        citations: list[int] | None = None

    def made() -> list[str]:
        deltas = (
            DeltaMessage(content="one"),
            DeltaMessage(role="assistant", tool_calls=[DeltaToolCall(index=0)]),
            Cited(content="two", citations=[1]),
        )
        answers = [
            chat.ChatCompletionStreamResponse(
                id="1", created=1, model="m", choices=[chat.ChatCompletionResponseStreamChoice(index=0, delta=delta)]
            )
            for delta in deltas
        ]
        choice = completion.CompletionResponseStreamChoice(index=0, text="three", finish_reason="stop")
        answers.append(completion.CompletionStreamResponse(id="1", created=1, model="m", choices=[choice], unknown=[4]))
        return [piece.model_dump_json(exclude_unset=True) for piece in answers]

    before = made()
    pieces.install()
    pieces.install()

    assert before == made()
    assert '"citations":[1]' in before[2]
    assert '"unknown":[4]' in before[3]
    with pytest.raises(ValidationError):
        chat.ChatCompletionResponseStreamChoice(index="x", delta=DeltaMessage())
    for request in (chat.ChatCompletionRequest, completion.CompletionRequest):
        assert pieces.CHECK in request.__pydantic_decorators__.model_validators
    for piece in (chat.ChatCompletionStreamResponse, completion.CompletionStreamResponse):
        assert pieces.CHECK not in piece.__pydantic_decorators__.model_validators
