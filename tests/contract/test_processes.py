"""What vLLM's processes are called, say, leave behind and read from their environment: as engine/ expects it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm import envs
from vllm.v1.engine import core_client

from llm_serve.core import progress
from llm_serve.engine import factory, forkserver, kernel_cache, startup_plans
from tests.contract.surface import VLLM, parameters, vllm_source

pytestmark = pytest.mark.vllm


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

    assert kernel_cache.ASSEMBLER in inspect.getsource(tasks._set_triton_ptxas_path)


def test_a_compiling_engine_moves_tritons_folder_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own environment: an engine that finds everything compiled would look for kernels elsewhere."""
    adaptor = importlib.import_module("vllm.compilation.compiler_interface").InductorAdaptor()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")

    monkeypatch.setenv(kernel_cache.FOLDER, str(tmp_path / "told"))
    adaptor.initialize_cache(str(tmp_path / "vllm"))
    assert str(tmp_path / "told") == os.environ[kernel_cache.FOLDER]

    monkeypatch.delenv(kernel_cache.FOLDER)
    adaptor.initialize_cache(str(tmp_path / "vllm"))
    assert os.environ[kernel_cache.FOLDER].startswith(str(tmp_path / "vllm"))


@pytest.mark.parametrize("environ", [{}, {"VLLM_CACHE_ROOT": "/somewhere"}, {"XDG_CACHE_HOME": "/elsewhere"}])
def test_kernels_are_kept_below_vllms_own_cache(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    """As vLLM finds that folder, told or not."""
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    folder = Path(kernel_cache.environment(environ)[kernel_cache.FOLDER])

    assert Path(envs.environment_variables["VLLM_CACHE_ROOT"]()) == folder.parent


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
    "load_config.load_format": "ipc_cache",
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
        load_config=SimpleNamespace(load_format="auto"),
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
    tree = ast.parse(Path(forkserver.__file__).with_name("preload.py").read_text())
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
