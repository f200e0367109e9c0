"""The texts and functions of the installed vLLM by which failures are told apart: an upgrade names the rows gone stale.

Sources are read, not imported: a text counts as there when a string literal of that file holds it, `{}` for a value.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llm_serve.core import failure_texts
from llm_serve.core.evidence import ErrorRecord, Evidence, Kind
from llm_serve.core.failures import classify

pytestmark = pytest.mark.vllm

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

KV_CACHE = "vllm/v1/core/kv_cache_utils.py"
V1_RUNNER, V2_RUNNER = "vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/model_runner.py"
WORKER, CPU_WORKER = "vllm/v1/worker/gpu_worker.py", "vllm/v1/worker/cpu_worker.py"
EXECUTOR, CORE = "vllm/v1/executor/multiproc_executor.py", "vllm/v1/engine/core.py"
SHARED_MEMORY = "vllm/distributed/device_communicators/shm_broadcast.py"
REGISTRY = "vllm/model_executor/models/registry.py"

TEXTS = (
    ("A1", V1_RUNNER, "Failed to load model - not enough GPU memory. "),
    ("A3", V1_RUNNER, "CUDA out of memory occurred when warming up sampler with {} dummy requests. "),
    ("A3", V1_RUNNER, "CUDA out of memory occurred when warming up pooler (task={}) with {} dummy requests. "),
    ("A3", "vllm/v1/worker/gpu/pool/pooling_runner.py", "CUDA out of memory occurred when warming up pooler "),
    ("A4", KV_CACHE, "No available memory for the cache blocks. "),
    ("A4", CPU_WORKER, " on kv cache allocation is less than requested memory for kv ({}/{} GiB). Reduce CPU memory"),
    ("A5", KV_CACHE, " GiB KV cache is needed, which is larger than the available KV cache memory ({} GiB). "),
    ("A6", KV_CACHE, "Cannot auto-fit max_model_len: not enough GPU memory available "),
    ("A7", "vllm/v1/worker/utils.py", "Free memory on device {} ({}/{} GiB) on startup is less than desired GPU memory"),
    ("A7", "vllm/v1/worker/utils.py", "Free memory on device {} ({}/{} GiB) on startup is less than the engine's budget"),
    ("A7", CPU_WORKER, "Available memory on node {} ({}/{} GiB) on startup is less than desired CPU memory utilization"),
    ("A8", WORKER, "Error in memory profiling. Initial free memory {} GiB, current free memory {} GiB. "),
    ("A9", CPU_WORKER, " less than requested memory for kv ({} GiB). Decrease --kv-cache-memory-bytes, "),
    ("A14", "vllm/config/compilation.py", "max_num_seqs ({}) exceeds available Mamba cache blocks ({}). "),
    ("D4", "vllm/config/device.py", "Failed to infer device type, please set "),
    ("D6", "vllm/platforms/cuda.py", "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. "),
    ("D7", "vllm/platforms/cuda.py", "No valid attention backend found for {} with {}. Reasons: {}."),
    ("D7", "vllm/platforms/cuda.py", "Selected backend {} is not valid for this configuration. Reason: {}"),
    ("D7", "vllm/v1/attention/backends/mla/prefill/selector.py", "{} is not valid for this configuration. Reason: {}"),
    ("D7", "vllm/v1/attention/backends/registry.py", "Unknown attention backend: '{}'. Valid options are: {}"),
    ("D8", "vllm/v1/sample/ops/topk_topp_sampler.py", "FlashInfer top-p/top-k sampling unavailable: {}. Unset"),
    ("D9", "triton/runtime/build.py", "Failed to find C compiler. "),
    ("D9", "torch/_inductor/exc.py", "No working C++ compiler found in {}"),
    ("E1", "vllm/config/model.py", "User-specified max_model_len ({}) is greater than the derived max_model_len ({}="),
    ("E1", "vllm/config/model.py", " must be divisible by tensor parallel size ({})."),
    ("E1", "vllm/config/scheduler.py", "max_num_batched_tokens ({}) must be greater than or equal to max_num_seqs ({})."),
    ("E1", REGISTRY, "Model architectures {} are not supported for now. "),
    ("E1", REGISTRY, "Model architecture {} was supported in vLLM until v{}, and is not supported anymore. "),
    ("E1", REGISTRY, "Model architecture {} is not supported in-tree anymore. "),
    ("E1", "transformers/models/auto/configuration_auto.py", "but Transformers does not recognize this architecture. "),
    ("E2", "vllm/transformers_utils/config.py", "Invalid repository ID or local directory specified: '{model}'."),
    ("E2", "transformers/utils/generic.py", "It looks like the config file at '{}' is not a valid JSON file."),
    ("E2", "transformers/utils/hub.py", "You are trying to access a gated repo."),
    ("E2", "transformers/utils/hub.py", "{} is not a local folder and is not a valid model identifier listed on "),
    ("E2", "transformers/utils/hub.py", "We couldn't connect to '{}' to load the files, and couldn't find them"),
    ("E2", "transformers/utils/hub.py", "There was a specific connection error when trying to load {}:"),
    ("E2", "huggingface_hub/file_download.py", "An error happened while trying to locate the file on the Hub and we"),
    ("E2", "huggingface_hub/file_download.py", "in the disk cache and outgoing traffic has been disabled. "),
    ("E2", "huggingface_hub/_snapshot_download.py", "on the local disk and outgoing traffic has been disabled. "),
    ("E2", "huggingface_hub/utils/_validators.py", "Repo id must be in the form 'repo_name' or 'namespace/repo_name':"),
    ("E3", "vllm/model_executor/model_loader/default_loader.py", "Cannot find any model weights with `{}`"),
    ("E3", "vllm/model_executor/model_loader/default_loader.py", "weights were not initialized from checkpoint: {}"),
    ("E3", "vllm/model_executor/model_loader/weight_utils.py", "Weight files referenced in index but missing: {}"),
    ("E4", "transformers/tokenization_utils_tokenizers.py", "Couldn't instantiate the backend tokenizer from one of: "),
    ("E4", "transformers/tokenization_utils_base.py", "Can't load tokenizer for '{}'. "),
    ("E6", "vllm/compilation/compiler_interface.py", "vLLM failed to compile the model. The most likely reason for this"),
    ("E6", "vllm/compilation/compiler_interface.py", "failed to get the file path of the compiled graph"),
    ("E6", "torch/_inductor/utils.py", "Expected tensors only, but got: {}"),
    ("E7", REGISTRY, "Model architectures {} failed to be inspected. "),
    ("F4", "vllm/v1/engine/core_client.py", "Timed out waiting for engine core processes to start. "),
    ("H4", EXECUTOR, "RPC call to {} timed out."),
    ("H7", "vllm/distributed/device_communicators/pynccl_wrapper.py", "NCCL error: {}"),
    ("H8", SHARED_MEMORY, "Insufficient space in {} for {}: {} MiB required, {} MiB free. "),
)  # fmt: skip

WRAPPERS = (
    (EXECUTOR, "WorkerProc initialization failed due to an exception in a background process. "),
    (EXECUTOR, "Executor failed."),
    (CORE, "Executor failed."),
    ("vllm/v1/engine/utils.py", "Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
    ("vllm/v1/engine/exceptions.py", "EngineCore encountered an issue. See stack trace (above) for the root cause."),
)

CALLS = (
    (WORKER, "determine_available_memory", "profile_run"),
    (WORKER, "determine_available_memory", "profile_cudagraph_memory"),
    (WORKER, "compile_or_warm_up_model", "kernel_warmup"),
    (WORKER, "compile_or_warm_up_model", "warmup_kernels"),
    (WORKER, "compile_or_warm_up_model", "capture_model"),
    (CPU_WORKER, "determine_available_memory", "warming_up_model"),
    (V1_RUNNER, "profile_run", "_dummy_sampler_run"),
    (V1_RUNNER, "profile_run", "_dummy_pooler_run"),
    (V2_RUNNER, "profile_run", "_dummy_sampler_run"),
    (V2_RUNNER, "profile_run", "_dummy_pooler_run"),
    (V1_RUNNER, "capture_model", "_capture_cudagraphs"),
    (V1_RUNNER, "initialize_kv_cache", "initialize_kv_cache_tensors"),
)
"""Which function stands within the frames of which other: the order of the table of frames relies on it."""


@cache
def tree(path: str) -> ast.Module:
    """The source of an installed package's file."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None and package == "triton":
        pytest.skip("Triton is not part of the environment for CPUs")
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / rest).read_text())


@cache
def literals(path: str) -> str:
    """Every string literal of a file, a line break between them."""
    return "\n".join(words(tree(path)))


def words(node: ast.AST) -> Iterator[str]:
    """The string literals under a node; one that is written in parts is one, and `{}` stands for its values."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from words(child)


def functions(path: str) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a file, by name; of two with one name the longer."""
    found = sorted(
        (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)),
        key=lambda node: (node.end_lineno or 0) - node.lineno,
    )
    return {node.name: node for node in found}


def calls(function: ast.FunctionDef) -> set[str]:
    """The names of what a function calls."""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in called}


@pytest.mark.parametrize(("number", "path", "text"), TEXTS, ids=[f"{number} {text[:40]}" for number, _, text in TEXTS])
def test_a_text_is_still_said_and_still_understood(number: str, path: str, text: str) -> None:
    """Where it was found, and by the row that it was found for."""
    # A4's value has to be negative to be A4: with room left, the same words are A7.
    row = failure_texts.row_for(text.replace("for kv ({}/", "for kv (-0.1/"))

    assert text in literals(path)
    assert row is not None
    assert number == row.number


@pytest.mark.parametrize(("path", "text"), WRAPPERS, ids=[text[:40] for _, text in WRAPPERS])
def test_a_wrapper_is_still_one(path: str, text: str) -> None:
    """If one is worded anew, it is taken for a cause."""
    assert text in literals(path)
    assert failure_texts.is_wrapper(text)


def test_a_workers_words_still_stand_in_the_cores() -> None:
    """They are cut out by what stands around them."""
    text = "Worker failed with error '{}', please check the stack trace above for the root cause"

    assert text in literals(EXECUTOR)
    assert "{}" == failure_texts.wrapped_in(text)


def test_a_closed_queue_still_says_cancelled() -> None:
    """A worker whose queue is closed logs this beside the cause."""
    assert "cancelled" in [*words(functions(SHARED_MEMORY)["acquire_read"])]
    assert failure_texts.is_wrapper("builtins.RuntimeError: cancelled")


def test_an_inspection_still_tells_its_reason_in_the_log() -> None:
    """What is raised afterwards only says that it failed."""
    text = "Error raised in subprocess:\n{}"

    assert text in literals(REGISTRY)
    assert failure_texts.is_inspection(text)


def test_processes_are_still_told_apart_by_name() -> None:
    """The order of exceptions goes by these names."""
    assert "VllmWorker-{}" in literals(EXECUTOR)
    assert "EngineCore" in literals(CORE)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        (KV_CACHE, r"the estimated maximum model length is \{\}"),
        ("vllm/config/compilation.py", r"available Mamba cache blocks \(\{\}\)"),
        ("vllm/v1/worker/utils.py", r"Free memory on device \{\} \(\{\}/\{\} GiB\)"),
        (CPU_WORKER, r"Available memory on node \{\} \(\{\}/\{\} GiB\)"),
    ],
)
def test_a_number_still_stands_where_it_is_read(path: str, pattern: str) -> None:
    """The next plan is made of these."""
    found = re.search(pattern, literals(path))
    assert found is not None

    numbers = failure_texts.numbers(found[0].replace("{}", "7"))

    assert numbers
    assert set(numbers.values()) <= {7, 7 << 30}


@pytest.mark.parametrize(("path", "outer", "inner"), CALLS)
def test_frames_still_stand_within_each_other(path: str, outer: str, inner: str) -> None:
    """What an out of memory means is read off the names of functions."""
    assert inner in calls(functions(path)[outer])


@pytest.mark.parametrize("name", sorted({name for names, _ in failure_texts.FRAMES for name in names}))
def test_a_function_that_tells_a_place_is_still_there(name: str) -> None:
    """A name that no engine has any more says nothing, and nobody would notice."""
    where = [V1_RUNNER, V2_RUNNER, WORKER, "vllm/model_executor/warmup/kernel_warmup.py", "vllm/v1/worker/gpu/warmup.py",
             "vllm/model_executor/models/llama.py", "vllm/model_executor/model_loader/default_loader.py"]  # fmt: skip

    assert name in set().union(*(functions(path) for path in where))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vllm/model_executor/layers/attention/attention.py", "unified_attention_with_output"),
        ("vllm/model_executor/layers/attention/mla_attention.py", "unified_mla_attention_with_output"),
        ("vllm/v1/attention/ops/triton_unified_attention.py", "unified_attention"),
        ("vllm/v1/attention/backends/fa_utils.py", "flash_attn_varlen_func"),
    ],
)
def test_attention_is_still_called_by_these_names(path: str, name: str) -> None:
    """An error without a known text is a backend's when it comes out of them."""
    assert name in functions(path)
    assert failure_texts.IN_ATTENTION.search(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", (10).to_bytes(8, "little") + b"{}",
     (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(60) + b"\0"],
    ids=["empty", "a pointer", "header cut short", "data cut short"],
)  # fmt: skip
def test_a_broken_weight_file_is_still_named(tmp_path: Path, content: bytes) -> None:
    """The installed safetensors says it in its own words, which have changed before."""
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(Exception) as raised:  # noqa: PT011 - its type is what is looked at
        safetensors.safe_open(path, "numpy")

    error = raised.value
    record = ErrorRecord("EngineCore", f"{type(error).__module__}.{type(error).__qualname__}", str(error))
    assert Kind.weights is classify(Evidence(errors=(record,))).kind
