"""What a failed engine left behind, and what it means: vLLM 0.32's own messages, with the frames they come with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core import failure_texts, progress
from llm_serve.core.evidence import ErrorRecord, Evidence, Failure, Holder, Kind, Place
from llm_serve.core.failures import classify, root_cause

CORE, WORKER, PARENT = "EngineCore", "Worker_TP0", ""
GIB, MIB = 1 << 30, 1 << 20

# v1/engine/utils.py:wait_for_engine_startup
PARENTS_WORDS = ErrorRecord(
    PARENT,
    "builtins.RuntimeError",
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}",
)
# v1/executor/multiproc_executor.py:wait_for_ready
CORES_WORDS = ErrorRecord(
    CORE,
    "builtins.Exception",
    "WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.",
    ("run_engine_core", "__init__", "_init_executor", "wait_for_ready"),
)
# v1/engine/exceptions.py:EngineDeadError
DEAD = ErrorRecord(
    PARENT,
    "vllm.v1.engine.exceptions.EngineDeadError",
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
)
WRAPPERS = {
    "the parent's at start": PARENTS_WORDS,
    "EngineCore's at start": CORES_WORDS,
    "the parent's while serving": DEAD,
    # v1/executor/multiproc_executor.py:collective_rpc and v1/engine/core.py:_handle_client_request
    "EngineCore's while serving": ErrorRecord(CORE, "builtins.RuntimeError", "Executor failed."),
    # distributed/device_communicators/shm_broadcast.py:acquire_read, when the queue is closed under a reader
    "a worker's at its end": ErrorRecord(WORKER, "builtins.RuntimeError", "cancelled"),
}
OOM = (
    "CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 139.80 GiB of which 612.44 MiB is "
    "free. Process 4711 has 130.10 GiB memory in use. Of the allocated memory 129.01 GiB is allocated by PyTorch."
)
TRIED = int(1.02 * GIB)
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
STEP = ("run_busy_loop", "_process_engine_step", "step_with_batch_queue", "execute_model", "_model_forward")
INIT = ("run_engine_core", "__init__", "_initialize_kv_caches")
WARM = (*INIT, "compile_or_warm_up_model", "collective_rpc", "run_method", "compile_or_warm_up_model")


@dataclass(frozen=True)
class Case:
    """One exception as it is logged, and the verdict on it."""

    exception: str
    text: str
    kind: Kind
    place: Place = Place.start
    frames: tuple[str, ...] = ()
    numbers: dict[str, int] = field(default_factory=dict)
    process: str = CORE

    @property
    def record(self) -> ErrorRecord:
        return ErrorRecord(self.process, self.exception, self.text, self.frames)


def oom(place: Place, *frames: str, kind: Kind = Kind.out_of_memory) -> Case:
    """The same words wherever they are met."""
    return Case("torch.OutOfMemoryError", OOM, kind, place, frames, {"tried_bytes": TRIED})


def parents(exception: str, text: str, kind: Kind) -> Case:
    """What is raised before there is an engine process."""
    return Case(exception, text, kind, process=PARENT)


K, P = Kind, Place
EXCEPTIONS: dict[str, Case] = {
    # v1/worker/gpu_model_runner.py:load_model re-raises it; gpu/model_runner.py:load_model has no words of its own
    "A1 weights": oom(P.loading, "run_engine_core", "__init__", "load_model", "load_model", kind=K.weights_do_not_fit),
    "A1 its log text, raised": Case(
        "builtins.RuntimeError",
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for weights",
        K.weights_do_not_fit,
        P.loading,
    ),
    # v1/worker/gpu/model_runner.py:profile_run
    "A2 profiling": oom(P.profiling, *INIT, "determine_available_memory", "profile_run", "_dummy_run"),
    "A2 profiling of graphs": oom(
        P.profiling, *INIT, "determine_available_memory", "profile_cudagraph_memory", "capture_model"
    ),
    "A2 profiling on a CPU": Case(
        "builtins.RuntimeError",
        CPU_OOM,
        K.out_of_memory,
        P.profiling,
        ("determine_available_memory", "warming_up_model", "profile_run"),
        {"tried_bytes": 64 * GIB},
    ),
    # v1/worker/gpu_model_runner.py:_dummy_sampler_run
    "A3 sampler": Case(
        "builtins.RuntimeError",
        "CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering "
        "`max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        K.out_of_memory,
        P.warm_up,
        (*INIT, "determine_available_memory", "profile_run", "_dummy_sampler_run"),
    ),
    # v1/worker/gpu/pool/pooling_runner.py:_dummy_pooler_run_task
    "A3 pooler": Case(
        "builtins.RuntimeError",
        "CUDA out of memory occurred when warming up pooler (task='embed') with 256 dummy requests. Please try "
        "lowering `max_num_seqs`",
        K.out_of_memory,
        P.warm_up,
    ),
    # v1/worker/gpu/model_runner.py:_dummy_sampler_run, which says nothing of its own
    "A3 sampler without words": oom(P.warm_up, *INIT, "determine_available_memory", "profile_run", "_dummy_sampler_run"),
    # v1/core/kv_cache_utils.py:_check_enough_kv_cache_memory
    "A4 nothing left for the cache": Case(
        "builtins.ValueError",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the "
        "engine (this flag also controls CPU memory reservation on the CPU backend, despite its name).",
        K.no_kv_cache,
        P.kv_cache,
        (*INIT, "get_kv_cache_configs", "_check_enough_kv_cache_memory"),
    ),
    # v1/worker/cpu_worker.py:determine_available_memory, with more than its share used up
    "A4 on a CPU": Case(
        "builtins.ValueError",
        "Available memory on node 0 (3.1/15.6 GiB) on kv cache allocation is less than requested memory for kv "
        "(-0.42/2.1 GiB). Reduce CPU memory used by other processes.",
        K.no_kv_cache,
        P.kv_cache,
        ("determine_available_memory",),
        {"free_bytes": int(3.1 * GIB), "total_bytes": int(15.6 * GIB)},
    ),
    # v1/core/kv_cache_utils.py:_check_enough_kv_cache_memory
    "A5 too small for one request": Case(
        "builtins.ValueError",
        "To serve at least one request with the model's max seq len (32768), (1.75 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (0.5 GiB). Based on the available memory, the estimated maximum "
        "model length is 9360. Try increasing `gpu_memory_utilization`",
        K.kv_cache_too_small,
        P.kv_cache,
        (*INIT, "get_kv_cache_configs"),
        {"fitting_model_len": 9360},
    ),
    "A5 without an estimate": Case(
        "builtins.ValueError",
        "To serve at least one request with the model's max seq len (32768), (1.75 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (0.0 GiB). Try increasing `gpu_memory_utilization`",
        K.kv_cache_too_small,
        P.kv_cache,
    ),
    # v1/core/kv_cache_utils.py:_auto_fit_max_model_len
    "A6 no length fits": Case(
        "builtins.ValueError",
        "Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token.",
        K.no_kv_cache,
        P.kv_cache,
    ),
    # v1/worker/utils.py:request_memory
    "A7 somebody else's memory": Case(
        "builtins.ValueError",
        "Free memory on device cuda:0 (8.77/139.8 GiB) on startup is less than desired GPU memory utilization "
        "(0.9, 125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        K.memory_held,
        frames=("run_engine_core", "__init__", "init_device", "request_memory"),
        numbers={"free_bytes": int(8.77 * GIB), "total_bytes": int(139.8 * GIB)},
    ),
    "A7 beside weights that are held outside": Case(
        "builtins.ValueError",
        "Free memory on device cuda:0 (8.77/139.8 GiB) on startup is less than the engine's budget after excluding "
        "external process's weights (0.9, 60.5 GiB). Decrease GPU memory utilization",
        K.memory_held,
        numbers={"free_bytes": int(8.77 * GIB), "total_bytes": int(139.8 * GIB)},
    ),
    # v1/worker/cpu_worker.py:__init__
    "A7 on a CPU": Case(
        "builtins.ValueError",
        "Available memory on node 0 (8.4/15.6 GiB) on startup is less than desired CPU memory utilization (0.92, 14.35 "
        "GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory",
        K.memory_held,
        numbers={"free_bytes": int(8.4 * GIB), "total_bytes": int(15.6 * GIB)},
    ),
    # v1/worker/gpu_worker.py:determine_available_memory
    "A8 somebody let go": Case(
        "builtins.AssertionError",
        "Error in memory profiling. Initial free memory 60.1 GiB, current free memory 71.5 GiB. This happens when "
        "other processes sharing the same container release GPU memory while vLLM is profiling",
        K.memory_held,
        P.profiling,
        (*INIT, "determine_available_memory"),
    ),
    # v1/worker/gpu_worker.py:initialize_from_config
    "A9 the cache itself": oom(
        P.kv_cache, *INIT, "initialize_from_config", "initialize_kv_cache", "initialize_kv_cache_tensors"
    ),
    # v1/worker/cpu_worker.py:determine_available_memory
    "A9 a cache that was asked for": Case(
        "builtins.ValueError",
        "Available memory on node 0 (3.1/15.6 GiB) on kv cache allocation is less than requested memory for kv (8.0 "
        "GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
        K.out_of_memory,
        P.kv_cache,
        ("determine_available_memory",),
        {"free_bytes": int(3.1 * GIB), "total_bytes": int(15.6 * GIB)},
    ),
    # model_executor/warmup/kernel_warmup.py:kernel_warmup and v1/worker/gpu/warmup.py:warmup_kernels
    "A10 kernels": oom(P.warm_up, *WARM, "kernel_warmup"),
    "A10 kernels, through whole steps": oom(P.warm_up, *WARM, "warmup_kernels", "execute_model"),
    # v1/worker/gpu_worker.py:compile_or_warm_up_model
    "A11 graphs": oom(P.capture, *WARM, "capture_model", "_dummy_run"),
    "A11 graphs, in CUDA's words": Case(
        "torch.AcceleratorError", "CUDA error: out of memory", K.out_of_memory, P.capture, (*WARM, "capture_model")
    ),
    # Seen on an H200: FlashAttention asks torch for memory through its C interface, which passes no reason on.
    "A11 graphs, through torch's stable interface": Case(
        "builtins.RuntimeError",
        'torch_call_dispatcher( "aten::new_empty", "", stack.data(), ( ((0ULL + 2) << 56) | ((0ULL + 13) << 48) | '
        "((0ULL + 0) << 40) | ((0ULL + 0) << 0))) API call failed at "
        "/opt/venv/lib/python3.12/site-packages/torch/include/torch/csrc/stable/ops.h, line 939",
        K.out_of_memory,
        P.capture,
        (*WARM, "capture_model", "flash_attn_varlen_func"),
    ),
    "A11 graphs, for another reason": Case(
        "torch.AcceleratorError",
        "CUDA error: operation not permitted when stream is capturing\nSearch for `cudaErrorStreamCaptureUnsupported'",
        K.graph_capture,
        P.capture,
        (*WARM, "capture_model"),
    ),
    # v1/worker/gpu/model_runner.py:execute_model, sample_tokens and the model's compute_logits
    "A12 a step": oom(P.serving, *STEP),
    "A12 sampling": oom(P.serving, "step", "sample_tokens"),
    "A13 logits, crept up to": oom(P.serving, "step", "compute_logits"),
    # v1/executor/multiproc_executor.py:collective_rpc
    "A12 in a worker, told by EngineCore": Case(
        "builtins.RuntimeError",
        f"Worker failed with error '{OOM}', please check the stack trace above for the root cause",
        K.out_of_memory,
        P.serving,
        ("step", "execute_model", "collective_rpc"),
        {"tried_bytes": TRIED},
    ),
    # config/compilation.py:resolve_cudagraph_mode_and_sizes
    "A14 sequences and Mamba": Case(
        "builtins.ValueError",
        "max_num_seqs (256) exceeds available Mamba cache blocks (97). Each decode sequence requires one Mamba cache "
        "block, so CUDA graph capture cannot proceed. Please lower max_num_seqs to at most 97 or increase",
        K.too_many_sequences,
        P.capture,
        (*WARM, "capture_model"),
        {"fitting_num_seqs": 97},
    ),
    # Python, numpy and torch themselves
    "B1 no host memory for weights": Case(
        "builtins.RuntimeError",
        CPU_OOM,
        K.weights_do_not_fit,
        P.loading,
        ("load_model", "load_weights"),
        {"tried_bytes": 64 * GIB},
    ),
    "B1 no host memory": Case("builtins.MemoryError", "", K.out_of_memory),
    "B1 no host memory for an array": Case(
        "numpy._core._exceptions._ArrayMemoryError",
        "Unable to allocate 512. GiB for an array with shape (70368744177664,) and data type float64",
        K.out_of_memory,
    ),
    "B7 files": Case("builtins.OSError", "[Errno 24] Too many open files: '/dev/shm'", K.host_limit),
    "B9 fork": Case(
        "builtins.RuntimeError",
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn'",
        K.crashed,
    ),
    # v1/engine/core_client.py:MPClient.__init__
    "F4 vLLM's own deadline": parents(
        "builtins.TimeoutError",
        "Timed out waiting for engine core processes to start. This is often caused by slow weight loading for large",
        K.start_timeout,
    ),
    # v1/executor/multiproc_executor.py:get_response
    "H4 a step without an answer": Case(
        "builtins.TimeoutError", "RPC call to execute_model timed out.", K.stalled, P.serving, ("step", "execute_model")
    ),
    "H4 sampling without an answer": Case("builtins.TimeoutError", "RPC call to sample_tokens timed out.", K.stalled),
    "H6 watchdog": Case(
        "torch.distributed.DistBackendError",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, "
        "Timeout(ms)=600000)",
        K.communication,
    ),
    "H6 the other rank never came": Case(
        "torch.distributed.DistStoreError",
        "Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
        K.communication,
    ),
    # distributed/device_communicators/pynccl_wrapper.py:NCCL_CHECK
    "H7 NCCL": Case("builtins.RuntimeError", "NCCL error: unhandled system error", K.communication),
    "H7 peers": Case(  # CUDA's own words for cudaErrorPeerAccessUnsupported
        "torch.AcceleratorError",
        "CUDA error: peer access is not supported between these two devices",
        K.communication,
    ),
    # distributed/device_communicators/shm_broadcast.py:check_shm_free_space
    "H8 shared memory": Case(
        "builtins.RuntimeError",
        "Insufficient space in /dev/shm for message queue: 160 MiB required, 64 MiB free. Increase /dev/shm (e.g. "
        "--shm-size or --ipc=host).",
        K.host_limit,
    ),
    "H8 shared memory of NCCL": Case(
        "torch.distributed.DistBackendError",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, ncclSystemError. Last error: Error while creating shared memory "
        "segment /dev/shm/nccl-vRwc0d (size 9637888)",
        K.host_limit,
    ),
    "D1 illegal access": Case(
        "torch.AcceleratorError", "CUDA error: an illegal memory access was encountered", K.device_error
    ),
    "D1 assert": Case("torch.AcceleratorError", "CUDA error: device-side assert triggered", K.device_error),
    "D1 launch": Case("torch.AcceleratorError", "CUDA error: unspecified launch failure", K.device_error),
    "D1 address": Case("torch.AcceleratorError", "CUDA error: misaligned address", K.device_error),
    "D2 cuBLAS": Case(
        "builtins.RuntimeError",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        K.out_of_memory,
        P.profiling,
        (*INIT, "determine_available_memory", "profile_run"),
    ),
    "D3 ECC": Case("torch.AcceleratorError", "CUDA error: uncorrectable ECC error encountered", K.device_lost),
    # config/device.py:__post_init__
    "D4 no device yet": parents(
        "builtins.RuntimeError",
        "Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`",
        K.driver_not_ready,
    ),
    "D4 no GPU yet": Case("builtins.RuntimeError", "No CUDA GPUs are available", K.driver_not_ready),
    "D4 fabric manager": Case(
        "builtins.RuntimeError",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        K.driver_not_ready,
    ),
    "D4 NVML lost in a container": Case(
        "pynvml.NVMLError_Unknown", "Failed to initialize NVML: Unknown Error", K.driver_not_ready
    ),
    "D4 unfit driver": Case(
        "builtins.RuntimeError",
        "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda driver "
        "combination",
        K.unsupported_gpu,
    ),
    "D4 unfit GPU": Case(
        "builtins.RuntimeError",
        "Error 804: forward compatibility was attempted on non supported HW",
        K.unsupported_gpu,
    ),
    "D4 old driver": Case(
        "builtins.RuntimeError",
        "The NVIDIA driver on your system is too old (found version 11040).",
        K.unsupported_gpu,
    ),
    "D4 driver was upgraded under it": Case(
        "pynvml.NVMLError_LibRmVersionMismatch",
        "Failed to initialize NVML: Driver/library version mismatch",
        K.unsupported_gpu,
    ),
    "D5 no kernels": Case(
        "torch.AcceleratorError",
        "CUDA error: no kernel image is available for execution on the device",
        K.unsupported_gpu,
    ),
    # platforms/cuda.py:check_if_supports_dtype
    "D6 bfloat16": Case(
        "builtins.ValueError",
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute",
        K.configuration,
    ),
    # platforms/cuda.py:get_attn_backend_cls
    "D7 none": Case(
        "builtins.ValueError",
        "No valid attention backend found for cuda with AttentionSelectorConfig(head_size=40). Reasons: {FLASH_ATTN: "
        "[head_size not supported], FLASHINFER: [ImportError]}.",
        K.attention_backend,
    ),
    "D7 the one that was asked for": Case(
        "builtins.ValueError",
        "Selected backend AttentionBackendEnum.FLASHINFER is not valid for this configuration. Reason: [ImportError: "
        "No module named 'flashinfer']",
        K.attention_backend,
    ),
    # v1/attention/backends/registry.py:__getitem__
    "D7 a name that does not exist": parents(
        "builtins.ValueError",
        "Unknown attention backend: 'X'. Valid options are: FLASH_ATTN, FLASHINFER, TRITON_ATTN",
        K.configuration,
    ),
    "D7 its library": Case(
        "builtins.ImportError",
        "/usr/lib/vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEa",
        K.attention_backend,
    ),
    "D7 its kernels": Case(
        "builtins.RuntimeError",
        "shape mismatch in a kernel",
        K.attention_backend,
        P.profiling,
        (*INIT, "determine_available_memory", "profile_run", "forward", "unified_attention_with_output", "forward"),
    ),
    # v1/sample/ops/topk_topp_sampler.py:flashinfer_sampler_supported
    "D8 the sampler that was asked for": Case(
        "builtins.RuntimeError",
        "FlashInfer top-p/top-k sampling unavailable: nvcc is missing. Unset VLLM_USE_FLASHINFER_SAMPLER=1.",
        K.flashinfer,
    ),
    "D8 not there": Case("builtins.ModuleNotFoundError", "No module named 'flashinfer'", K.flashinfer),
    "D8 no nvcc": Case(
        "builtins.FileNotFoundError",
        "[Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'",
        K.flashinfer,
    ),
    "D8 its build": Case("builtins.RuntimeError", "Ninja build failed. Ninja output:\nninja: error", K.flashinfer),
    "D8 its kernels": Case(
        "builtins.RuntimeError", "Error in function 'run' at flashinfer/attention/prefill.cuh:2000", K.flashinfer
    ),
    # triton/runtime/build.py:_build
    "D9 no compiler": Case(
        "builtins.RuntimeError",
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.",
        K.toolchain,
    ),
    # torch/_inductor/exc.py
    "D9 no C++ compiler": Case(
        "torch._inductor.exc.InductorError",
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
        K.toolchain,
    ),
    "D9 no headers": Case(
        "torch._inductor.exc.InductorError", "main.c:5:10: fatal error: Python.h: No such file or directory", K.toolchain
    ),
    # config/scheduler.py:verify_max_model_len
    "E1 a bad value": parents(
        "pydantic_core._pydantic_core.ValidationError",
        "1 validation error for SchedulerConfig\n  Value error, max_num_batched_tokens (64) must be greater than or "
        "equal to max_num_seqs (128).",
        K.configuration,
    ),
    "E1 a bad value among many names": parents(
        "pydantic_core._pydantic_core.ValidationError",
        "1 validation error for KernelConfig\nmoe_backend\n  Input should be 'triton', 'flashinfer_cutlass' or 'marlin'",
        K.configuration,
    ),
    # config/model.py:_get_and_verify_max_len
    "E1 too long for the model": parents(
        "builtins.ValueError",
        "User-specified max_model_len (999999) is greater than the derived max_model_len (max_position_embeddings=2048)",
        K.configuration,
    ),
    # model_executor/models/registry.py:_raise_for_unsupported
    "E1 an architecture": parents(
        "builtins.ValueError",
        "Model architectures ['XForCausalLM'] are not supported for now. Supported architectures: dict_keys([])",
        K.configuration,
    ),
    # transformers/models/auto/configuration_auto.py:from_pretrained
    "E1 a model type": parents(
        "builtins.ValueError",
        "The checkpoint you are trying to load has model type `x` but Transformers does not recognize this "
        "architecture.",
        K.configuration,
    ),
    # config/model.py:verify_with_parallel_config
    "E1 heads and GPUs": parents(
        "builtins.ValueError",
        "Total number of attention heads (9) must be divisible by tensor parallel size (2).",
        K.configuration,
    ),
    # huggingface_hub/utils/_validators.py:validate_repo_id
    "E2 no such folder": parents(
        "huggingface_hub.errors.HFValidationError",
        "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/models/gone'. Use `repo_type` argument",
        K.configuration,
    ),
    # transformers_utils/config.py:get_config
    "E2 neither folder nor name": parents(
        "builtins.ValueError",
        "Invalid repository ID or local directory specified: 'x'.\nPlease verify the following requirements:",
        K.configuration,
    ),
    "E2 a broken config.json": parents(
        "builtins.OSError",
        "It looks like the config file at '/models/x/config.json' is not a valid JSON file.",
        K.configuration,
    ),
    # transformers/utils/hub.py:cached_files
    "E2 gated": parents(
        "builtins.OSError",
        "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b.\n401 "
        "Client Error.",
        K.configuration,
    ),
    "E2 no such model": parents(
        "builtins.OSError",
        "a/b is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
        K.configuration,
    ),
    # huggingface_hub/file_download.py:_raise_on_head_call_error
    "E2 switched off": parents(
        "huggingface_hub.errors.LocalEntryNotFoundError",
        "Cannot find the requested files in the disk cache and outgoing traffic has been disabled.",
        K.configuration,
    ),
    "E2 no answer": parents(
        "huggingface_hub.errors.LocalEntryNotFoundError",
        "An error happened while trying to locate the file on the Hub and we cannot find the requested files in the "
        "local cache.",
        K.hub_unreachable,
    ),
    "E2 no connection": parents("httpx2.ConnectError", "[Errno -2] Name or service not known", K.hub_unreachable),
    "E2 slow": parents("httpx2.ReadTimeout", "The read operation timed out", K.hub_unreachable),
    "E2 out of order": parents(
        "huggingface_hub.errors.HfHubHTTPError",
        "Server error '503 Service Unavailable' for url 'https://huggingface.co/a/b'",
        K.hub_unreachable,
    ),
    "E2 no connection, in transformers' words": parents(
        "builtins.OSError",
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
        K.hub_unreachable,
    ),
    # safetensors 0.8, and the words it had before
    "E3 cut short": Case(
        "safetensors._safetensors_rust.SafetensorError",
        "Error while deserializing header: incomplete metadata, file not fully covered",
        K.weights,
        P.loading,
        ("load_model", "load_weights", "safetensors_weights_iterator"),
    ),
    "E3 a pointer": Case(
        "safetensors_rust.SafetensorError", "Error while deserializing header: HeaderTooLarge", K.weights, P.loading
    ),
    "E3 read by the parent": parents("struct.error", "unpack requires a buffer of 8 bytes", K.weights),
    # model_executor/model_loader/default_loader.py:_prepare_weights
    "E3 none": Case("builtins.RuntimeError", "Cannot find any model weights with `/models/x`", K.weights, P.loading),
    # model_executor/model_loader/weight_utils.py:filter_duplicate_safetensors_files
    "E3 one of many": Case(
        "builtins.FileNotFoundError",
        "Weight files referenced in index but missing: {'/models/x/model-00002-of-00002.safetensors'}",
        K.weights,
        P.loading,
    ),
    # model_executor/model_loader/default_loader.py:track_weights_loading
    "E3 some within": Case(
        "builtins.ValueError",
        "Following weights were not initialized from checkpoint: {'lm_head.weight'}",
        K.weights,
        P.loading,
    ),
    # transformers/tokenization_utils_tokenizers.py
    "E4 tokenizer": parents(
        "builtins.ValueError", "Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library", K.configuration
    ),
    "E5 an inner port": Case(
        "torch.distributed.DistNetworkError",
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use",
        K.address_in_use,
    ),
    "E6 disk": Case("builtins.OSError", "[Errno 28] No space left on device: '/var/cache/x'", K.host_limit),
    "E6 disk, met by a compiler": Case(
        "torch._inductor.exc.InductorError", "OSError: [Errno 28] No space left on device", K.host_limit
    ),
    # compilation/compiler_interface.py:compile
    "E6 compile cache": Case(
        "builtins.RuntimeError",
        "vLLM failed to compile the model. The most likely reason for this is that a previous compilation failed",
        K.compilation,
    ),
    "E6 compile cache, read back": Case(
        "builtins.AssertionError", "Expected tensors only, but got: <class 'int'>", K.compilation
    ),
    "E6 compiler": Case("torch._dynamo.exc.BackendCompilerFailed", "backend='x' raised:\nKeyError: 1", K.compilation),
    "E7 cache": Case("builtins.PermissionError", "[Errno 13] Permission denied: '/.triton'", K.host_limit),
    "E7 no such user": Case("builtins.KeyError", "'getpwuid(): uid not found: 1001'", K.host_limit),
    "E7 inspection": parents(
        "builtins.ValueError",
        "Model architectures ['LlamaForCausalLM'] failed to be inspected. Please check the logs for more details.",
        K.configuration,
    ),
    "E8 sandbox": Case("builtins.OSError", "[Errno 30] Read-only file system: '/var/lib/x'", K.host_limit),
    "E9 versions": Case(
        "builtins.ImportError", "cannot import name 'X' from 'transformers' (/usr/lib/transformers)", K.configuration
    ),
    # v1/engine/core.py:run_busy_loop: whatever a request brings out
    "E10 a bug that a request met": Case("builtins.KeyError", "'req-12'", K.crashed, P.serving, STEP),
}  # fmt: skip


@pytest.mark.parametrize("case", EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_an_exception_has_a_kind_a_place_and_numbers(case: Case) -> None:
    """Each row of the list of failures, in vLLM's own words, under what vLLM makes of it on its way up."""
    errors = (case.record, CORES_WORDS) if case.process else ()
    evidence = Evidence(errors=errors, parent_error=PARENTS_WORDS if case.process else case.record)

    failure = classify(evidence)

    numbers = {name: value for name, value in failure.to_json().items() if isinstance(value, int)}
    expected = P.loading if case.kind is K.weights else case.place
    assert (case.kind, expected, case.numbers) == (failure.kind, failure.place, numbers)


@pytest.mark.parametrize(
    "case", [case for case in EXCEPTIONS.values() if case.process], ids=lambda case: case.text[:30]
)
def test_a_worker_says_the_same_as_an_engine_core(case: Case) -> None:
    """With one GPU the exception is EngineCore's, with more a worker's."""
    at_worker = ErrorRecord(WORKER, case.exception, case.text, case.frames)

    failures = [classify(Evidence(errors=(record,))) for record in (case.record, at_worker)]

    assert failures[0].kind is failures[1].kind
    assert failures[0].place is failures[1].place


@pytest.mark.parametrize("case", EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_a_verdict_is_one_line_with_advice(case: Case) -> None:
    """It says what was raised, and what a person may do."""
    failure = classify(Evidence(parent_error=case.record))

    assert "\n" not in str(failure)
    assert failure.advice.endswith(".")
    assert " ".join(case.text.split())[:20] in failure.detail or "Worker failed" in case.text


@pytest.mark.parametrize("row", failure_texts.ROWS, ids=[f"{row.number} {row.kind}" for row in failure_texts.ROWS])
def test_no_row_is_hidden_by_the_rows_above(row: failure_texts.Row) -> None:
    """Each row of the table is the answer to at least one real message."""
    answers = [failure_texts.row_for(f"{case.exception}: {case.text}") for case in EXCEPTIONS.values()]

    assert row in answers


# What the machine says.
XID = "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to {}"
KILLED = "Memory cgroup out of memory: Killed process 4711 (VLLM::EngineCor) total-vm:9000kB"
WITNESSED: dict[str, tuple[dict[str, Any], Kind, str]] = {
    "B1 by the group's count": ({"exit_codes": {CORE: -9}, "oom_kills": 1}, K.host_out_of_memory, CORE),
    "B1 by the kernel's log": ({"exit_codes": {CORE: -9}, "kernel_log": (KILLED,)}, K.host_out_of_memory, "4711"),
    "B1 a worker": ({"errors": (CORES_WORDS,), "kernel_log": (KILLED,)}, K.host_out_of_memory, "4711"),
    "B1 with no exit code": ({"oom_kills": 2}, K.host_out_of_memory, "a process of the engine"),
    "B1 without proof": ({"exit_codes": {CORE: -9}}, K.killed, "EngineCore was ended by SIGKILL."),
    "B3 segfault": ({"exit_codes": {CORE: -11}}, K.crashed, "EngineCore was ended by SIGSEGV."),
    "B3 abort": ({"exit_codes": {CORE: -6}}, K.crashed, "EngineCore was ended by SIGABRT."),
    "B3 a signal without a name": ({"exit_codes": {CORE: -99}}, K.crashed, "EngineCore was ended by signal 99."),
    "B3 beside those that were killed after it": (
        {"exit_codes": {CORE: -9, WORKER: -11}},
        K.crashed,
        "Worker_TP0 was ended by SIGSEGV.",
    ),
    "B4 a worker died": ({"errors": (WRAPPERS["EngineCore's while serving"],), "parent_error": DEAD}, K.crashed, ""),
    "H1 nothing in NCCL": (
        {"stalled_for_s": 120.0, "phase": "starting the engine's processes"},
        K.start_stalled,
        "the start did nothing for 120 s in the phase 'starting the engine's processes'",
    ),
    "H2 the deadline": (
        {"timed_out_after_s": 1800.0, "phase": "loading weights", "errors": (CORES_WORDS,)},
        K.start_timeout,
        "the engine was not ready 1800 s after its start in the phase 'loading weights'.",
    ),
    "H5 no step": (
        {"stalled_for_s": 121.0, "stalled_on": "a step", "has_served": True},
        K.stalled,
        "no step for 121 s although there was work: a step.",
    ),
    "H6 abort by the watchdog": (
        {"exit_codes": {CORE: -6}, "output_tail": ("[PG ID 2 Rank 0] ProcessGroupNCCL's watchdog got stuck",)},
        K.communication,
        "SIGABRT",
    ),
    "H8 SIGBUS": ({"exit_codes": {CORE: -7}}, K.crashed, "EngineCore was ended by SIGBUS."),
    "B6 a process that cannot be ended": (
        {"unkillable": ("VLLM::EngineCore (pid 7): D (disk sleep), waits in uvm_va_space_destroy",), "exit_codes": {CORE: -9}},
        K.unkillable,
        "SIGKILL does not end VLLM::EngineCore (pid 7): D (disk sleep), waits in uvm_va_space_destroy.",
    ),
    "D3 reset": ({"kernel_log": (XID.format("0x1 (GPU Reset Required)"),)}, K.device_lost, "GPU Reset Required"),
    "D3 reboot": ({"kernel_log": (XID.format("0x2 (Node Reboot Required)"),)}, K.device_lost, "Node Reboot Required"),
    "D3 taken back": (
        {"kernel_log": (XID.format("0x1 (GPU Reset Required)"), XID.format("0x0 (None)")), "xids": (154,)},
        K.unknown,
        "without a word",
    ),
    **{f"D3 Xid {xid}": ({"xids": (xid,)}, K.device_lost, f"Xid {xid}") for xid in (48, 62, 64, 79, 95, 109, 119, 120)},
    **{f"D3 Xid {xid}": ({"xids": (xid,)}, K.device_error, f"Xid {xid}") for xid in (8, 11, 13, 31, 43, 45, 94)},
    "D3 Xid 63, which only asks for a reset some day": ({"xids": (63,)}, K.unknown, "without a word"),
    "D3 Xid 45 of a process that was killed": ({"xids": (45,), "exit_codes": {CORE: -9}}, K.killed, "SIGKILL"),
    "E11 a client's mistake": (
        {"errors": (ErrorRecord("MainProcess", "builtins.ValueError", "x are not supported for now"),), "exit_codes": {CORE: -9}},
        K.killed,
        "SIGKILL",
    ),
    "an exception that was over, in a timeout": (
        {"errors": (ErrorRecord(CORE, "builtins.KeyError", "'x'"),), "timed_out_after_s": 60.0},
        K.start_timeout,
        "60 s",
    ),
    "nothing but output": ({"exit_codes": {CORE: 1}, "output_tail": ("a", "Fatal: b", " ")}, K.unknown, "Fatal: b"),
    "nothing": ({}, K.unknown, "the engine ended without a word."),
}  # fmt: skip


@pytest.mark.parametrize(("known", "kind", "words"), WITNESSED.values(), ids=WITNESSED)
def test_the_machine_is_believed(known: dict[str, Any], kind: Kind, words: str) -> None:
    """Signals, the kernel, the driver and silence have kinds of their own."""
    failure = classify(Evidence(**known))

    assert kind is failure.kind
    assert words in failure.detail


PAIR = "GPU 0 and 1 (the chipset does not support it)"


@pytest.mark.parametrize(
    ("known", "is_named"),
    [
        ({"stalled_for_s": 120.0}, True),
        ({"timed_out_after_s": 1800.0}, True),
        ({"errors": (ErrorRecord("Worker_TP1", "builtins.RuntimeError", "NCCL error: unhandled system error"),)}, True),
        ({"exit_codes": {CORE: -6}, "output_tail": ("ProcessGroupNCCL's watchdog",)}, True),
        ({"exit_codes": {CORE: -9}}, False),
        ({"errors": (ErrorRecord(CORE, "torch.OutOfMemoryError", "CUDA out of memory"),)}, False),
    ],
)
def test_gpus_without_p2p_are_named_where_they_may_be_the_cause(known: dict[str, Any], is_named: bool) -> None:
    """In the advice, and for the decision; where memory or a signal explains it, the driver's word is beside the point."""
    failure = classify(Evidence(**known, no_p2p=(PAIR,)))

    assert is_named == (f"By the driver, there is no P2P between {PAIR}." in failure.advice)
    assert ((PAIR,) if is_named else ()) == failure.no_p2p
    assert () == classify(Evidence(**known)).no_p2p
    assert "no_p2p" not in classify(Evidence(**known)).to_json()


def test_a_hang_says_what_was_waited_for() -> None:
    """A start whose GPUs never met has used CPU time all the while."""
    failure = classify(Evidence(phase="starting the engine's processes", stalled_for_s=120.0, stalled_on="they spun"))

    assert (
        "the start did nothing for 120 s in the phase 'starting the engine's processes': they spun." == failure.detail
    )


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "kernel"), (-7, "/dev/shm"), (-7, "cut short")], ids=["kill", "bus: space", "bus: file"]
)
def test_a_signal_comes_with_what_is_known_to_send_it(code: int, words: str) -> None:
    """A person who has never seen a SIGBUS is told where they come from."""
    assert words in classify(Evidence(exit_codes={CORE: code})).advice


def test_a_kill_for_memory_names_the_limits() -> None:
    """The kernel killed for the machine's memory or for a limit that somebody set."""
    advice = classify(Evidence(exit_codes={CORE: -9}, oom_kills=1)).advice

    assert "MemoryMax=" in advice
    assert "container" in advice


# Who comes before whom.
@pytest.mark.parametrize("name", ["Worker", "Worker_TP1", "Worker_PP0_TP1", "VllmWorker-0"])
def test_a_worker_comes_before_the_core_and_the_core_before_the_parent(name: str) -> None:
    """Whichever was logged first, and under whichever name the worker logged."""
    worker, core = ErrorRecord(name, "a.B", "1"), ErrorRecord("EngineCore_DP0", "a.B", "2")
    parent = ErrorRecord(PARENT, "a.B", "3")

    assert worker == root_cause(Evidence(errors=(core, worker), parent_error=parent))
    assert core == root_cause(Evidence(errors=(core,), parent_error=parent))
    assert parent == root_cause(Evidence(parent_error=parent))


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_never_the_cause(wrapper: ErrorRecord) -> None:
    """It tells that something else went wrong, so anything else is better."""
    something = ErrorRecord(PARENT, "builtins.KeyError", "'x'")

    assert root_cause(Evidence(errors=(wrapper,))) is None
    assert something == root_cause(Evidence(errors=(wrapper,), parent_error=something))
    assert K.killed is classify(Evidence(errors=(wrapper,), parent_error=DEAD, exit_codes={CORE: -9})).kind


def test_a_workers_words_are_taken_out_of_the_cores() -> None:
    """Where the worker itself was not heard; its frames are EngineCore's, and still say where."""
    text = "Worker failed with error 'CUDA error: misaligned address', please check the stack trace above"
    wrapped = ErrorRecord(CORE, "builtins.RuntimeError", text, ("step", "execute_model"))

    cause = root_cause(Evidence(errors=(wrapped,), parent_error=DEAD))

    assert ErrorRecord(CORE, "", "CUDA error: misaligned address", ("step", "execute_model")) == cause


def test_a_workers_words_may_have_several_lines() -> None:
    """Messages of CUDA's have; the wrapper may be cut off at the length that a record may have."""
    text = "Worker failed with error 'CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"

    cause = root_cause(Evidence(errors=(ErrorRecord(CORE, "builtins.RuntimeError", text),)))

    assert cause is not None
    assert cause.text.startswith("CUDA error: out of memory\nSearch")


def test_an_attention_backend_that_has_served_is_not_blamed() -> None:
    """Its frames are in every step; what a request brings out there is a crash like any other."""
    record = ErrorRecord(CORE, "builtins.RuntimeError", "shape mismatch", (*STEP, "unified_attention_with_output"))

    assert K.crashed is classify(Evidence(errors=(record,), has_served=True)).kind


def test_a_lost_connection_between_processes_is_not_the_hubs() -> None:
    """The words are the same, the caller is not."""
    record = ErrorRecord(CORE, "builtins.ConnectionResetError", "[Errno 104] Connection reset by peer", STEP)

    assert K.crashed is classify(Evidence(errors=(record,), has_served=True)).kind


def test_a_silent_hub_is_not_a_wrong_name_where_the_chain_is_told() -> None:
    """vLLM calls a name invalid when the hub does not answer (transformers_utils/config.py:get_config)."""
    wrong = EXCEPTIONS["E2 neither folder nor name"]
    chain = f"{wrong.text} caused by httpx2.ConnectError: [Errno 111] Connection refused"

    assert K.hub_unreachable is classify(Evidence(parent_error=ErrorRecord(PARENT, wrong.exception, chain))).kind


def test_the_first_exception_of_a_process_counts() -> None:
    """What follows on an exception in the same process is its consequence."""
    first = ErrorRecord(CORE, "builtins.ValueError", "No available memory for the cache blocks.")
    second = ErrorRecord(CORE, "builtins.OSError", "[Errno 28] No space left on device")

    assert first == root_cause(Evidence(errors=(first, second)))


def test_the_inspection_of_a_model_explains_what_the_parent_saw() -> None:
    """E7: vLLM runs it in a process of its own and raises only that it failed."""
    said = "Error raised in subprocess:\nTraceback\nPermissionError: [Errno 13] Permission denied: '/.cache'"
    aside = ErrorRecord("MainProcess", "builtins.RuntimeError", said)
    evidence = Evidence(errors=(aside,), parent_error=EXCEPTIONS["E7 inspection"].record)

    assert K.host_limit is classify(evidence).kind
    assert K.killed is classify(Evidence(errors=(aside,), exit_codes={CORE: -9})).kind


def test_the_daemons_own_records_explain_nothing() -> None:
    """An exception that the daemon logged beside a start is not its cause."""
    aside = ErrorRecord("MainProcess", "builtins.OSError", "Permission denied")

    assert root_cause(Evidence(errors=(aside,), parent_error=PARENTS_WORDS)) is None
    assert K.crashed is classify(Evidence(errors=(aside,))).kind


@pytest.mark.parametrize("has_served", [False, True])
@pytest.mark.parametrize("phase", ["", "loading weights", "capturing CUDA graphs", "serving"])
def test_a_frame_says_more_than_a_phase(phase: str, has_served: bool) -> None:
    """The phase is the last that was announced, and much happens between two of them."""
    record = oom(P.profiling, "profile_run").record

    assert P.profiling is classify(Evidence(errors=(record,), phase=phase, has_served=has_served)).place


@pytest.mark.parametrize(
    ("phase", "has_served", "place"),
    [
        ("", False, P.start),
        ("starting the engine's processes", False, P.start),
        ("loading weights", False, P.loading),
        ("weights loaded", False, P.profiling),
        ("compiling", False, P.profiling),
        ("measuring memory", False, P.kv_cache),
        ("making the KV cache", False, P.kv_cache),
        ("capturing CUDA graphs", False, P.capture),
        ("warming up", False, P.warm_up),
        ("generating the first token", False, P.warm_up),
        ("engine ready", True, P.serving),
    ],
)
def test_without_a_frame_the_phase_says_where(phase: str, has_served: bool, place: Place) -> None:
    """The last phase that the log announced, unless the engine had answered."""
    record = ErrorRecord(WORKER, "torch.OutOfMemoryError", OOM)

    assert place is classify(Evidence(errors=(record,), phase=phase, has_served=has_served)).place


def test_every_phase_of_a_start_has_a_place() -> None:
    """A new phase must not fall back to `start` unseen; those before the weights are the start."""
    phases = [phase for _, phase in progress._MARKERS] + [progress.FIRST_TOKEN, progress.SERVING]

    assert {"starting the engine's processes"} == {phase.name for phase in phases} - failure_texts.PHASES.keys()


def test_a_known_text_comes_before_a_signal_and_an_unknown_one_after_it() -> None:
    """A worker that ran out of memory explains why its EngineCore was killed; a KeyError may be a consequence."""
    known, unknown = ErrorRecord(WORKER, "torch.OutOfMemoryError", OOM), ErrorRecord(WORKER, "builtins.KeyError", "1")

    assert K.out_of_memory is classify(Evidence(errors=(known,), exit_codes={CORE: -9})).kind
    assert K.killed is classify(Evidence(errors=(unknown,), exit_codes={CORE: -9})).kind


@pytest.mark.parametrize(
    ("text", "xids", "kind"),
    [
        (OOM, (31,), K.out_of_memory),
        ("NCCL error: unhandled cuda error", (31,), K.device_error),
        ("RPC call to sample_tokens timed out.", (13,), K.device_error),
        ("RPC call to sample_tokens timed out.", (48,), K.device_lost),
        (OOM, (79,), K.device_lost),
        ("1", (31,), K.device_error),
    ],
    ids=["a cause", "a symptom", "a stall", "a stall of a dying GPU", "a cause on a lost GPU", "unknown words"],
)
def test_the_driver_explains_symptoms_but_no_causes(text: str, xids: tuple[int, ...], kind: Kind) -> None:
    """A fault may be another process's on the same GPU; a lost GPU is everybody's."""
    assert kind is classify(Evidence(errors=(ErrorRecord(WORKER, "a.B", text),), xids=xids)).kind


def test_the_kernels_kill_of_a_stranger_explains_nothing() -> None:
    """Its log tells of the whole machine."""
    known = ErrorRecord(CORE, "builtins.ValueError", "No available memory for the cache blocks.")

    assert K.no_kv_cache is classify(Evidence(errors=(known,), kernel_log=(KILLED,))).kind
    assert K.host_out_of_memory is classify(Evidence(errors=(known,), oom_kills=1)).kind


# Whose memory it is.
@pytest.mark.parametrize(
    ("used", "kind"),
    [((), K.weights_do_not_fit), ((5 * MIB,), K.weights_do_not_fit), ((2 * GIB,), K.memory_held)],
    ids=["nobody's", "a desktop's few MiB", "enough to matter"],
)
def test_weights_that_do_not_fit_may_be_somebody_elses_doing(used: tuple[int, ...], kind: Kind) -> None:
    """They would fit if the others let go, or they would not."""
    holders = tuple(Holder(0, 4711, "python", size) for size in used)

    failure = classify(Evidence(errors=(EXCEPTIONS["A1 weights"].record,), gpu_holders=holders))

    assert kind is failure.kind
    assert ("pid 4711" in failure.advice) is (kind is K.memory_held)
    assert ("quantised" in failure.advice) is (kind is K.weights_do_not_fit)


def test_who_holds_the_memory_is_named() -> None:
    """A7: the message itself names nobody."""
    record = EXCEPTIONS["A7 somebody else's memory"].record
    holders = (Holder(0, 4711, "python", 130 * GIB), Holder(1, 4712, "ollama", GIB))

    advice = classify(Evidence(errors=(record,), gpu_holders=holders)).advice

    assert "python (pid 4711) holds 130.0 GiB of GPU 0; ollama (pid 4712) holds 1.0 GiB of GPU 1." in advice


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Tried to allocate 512 bytes.", {"tried_bytes": 512}),
        ("Tried to allocate 20.00 MiB.", {"tried_bytes": 20 * MIB}),
        ("Tried to allocate 64.00 KiB.", {"tried_bytes": 64 << 10}),
        ("Unable to allocate 1.5 TiB for an array", {"tried_bytes": 3 << 39}),
        ("Tried to allocate 1.2.3 GiB.", {}),
        ("Tried to allocate " + "9" * 5000 + " GiB", {}),
        ("the estimated maximum model length is unknown", {}),
    ],
    ids=["bytes", "MiB", "KiB", "numpy", "no number", "too long a number", "words"],
)
def test_numbers_are_read_or_left_out(text: str, numbers: dict[str, int]) -> None:
    """In the units that the messages use."""
    assert numbers == failure_texts.numbers(text)


WORDS = st.one_of(
    st.text(),
    st.sampled_from([case.text for case in EXCEPTIONS.values()] + [wrapper.text for wrapper in WRAPPERS.values()]),
)
RECORDS = st.builds(
    ErrorRecord,
    st.sampled_from(["", "MainProcess", "EngineCore", "EngineCore_DP1", "Worker", "VllmWorker-0", "DPCoordinator"]),
    st.text() | st.sampled_from([case.exception for case in EXCEPTIONS.values()]),
    WORDS,
    st.lists(st.sampled_from([*STEP, *WARM, "load_model", "profile_run"]) | st.text(), max_size=4).map(tuple),
)
EVIDENCE = st.builds(
    Evidence,
    phase=st.text() | st.sampled_from([*failure_texts.PHASES]),
    has_served=st.booleans(),
    errors=st.lists(RECORDS, max_size=4).map(tuple),
    output_tail=st.lists(st.text(), max_size=3).map(tuple),
    exit_codes=st.dictionaries(st.text(), st.integers(-130, 255), max_size=3),
    parent_error=st.none() | RECORDS,
    timed_out_after_s=st.none() | st.floats(),
    stalled_for_s=st.none() | st.floats(),
    stalled_on=st.text(),
    oom_kills=st.integers(0, 3),
    kernel_log=st.lists(st.text() | st.sampled_from([KILLED, XID]), max_size=3).map(tuple),
    xids=st.lists(st.integers(0, 200), max_size=3).map(tuple),
    gpu_holders=st.lists(st.builds(Holder, st.integers(), st.integers(), st.text(), st.integers()), max_size=2).map(
        tuple
    ),
)


@given(EVIDENCE)
def test_every_evidence_has_a_verdict(evidence: Evidence) -> None:
    """The classification is total, and its verdict always has words."""
    failure = classify(evidence)

    assert failure.kind in Kind
    assert failure.detail.strip()
    assert str(failure).startswith(f"{failure.kind}: ")


@given(EVIDENCE)
def test_no_wrapper_is_ever_the_cause(evidence: Evidence) -> None:
    """Whatever else was heard, or nothing."""
    cause = root_cause(evidence)

    assert cause is None or not failure_texts.is_wrapper(f"{cause.type}: {cause.text}") or not cause.type


def test_a_long_text_stays_a_line() -> None:
    """Texts with line breaks and of any length fit into a log line."""
    failure = classify(Evidence(errors=(ErrorRecord(CORE, "a.b.MyError", "one\n  two\n" + "x" * 5000),)))

    assert "MyError (in EngineCore): one two x" in str(failure)
    assert len(str(failure)) < 800


def test_an_exception_without_words_is_one() -> None:
    """Neither a type nor a text: the verdict still is a sentence."""
    expected = Failure(
        K.crashed, "an exception without words", "The journal has the exception and the processes' output."
    )

    assert expected == classify(Evidence(parent_error=ErrorRecord("", "", "")))
