"""Exceptions that engines end with, in vLLM's, torch's and the libraries' own words, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_serve.core.evidence import ErrorRecord, Kind, Place

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
        numbers={"free_bytes": int((8.77 + 0.9 * 139.8 - 60.5) * GIB), "total_bytes": int(139.8 * GIB)},
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
