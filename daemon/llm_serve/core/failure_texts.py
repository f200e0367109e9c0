"""What vLLM, torch, the hub and the driver say when they fail, and what is meant: the table that `failures` reads.

The texts are those of vLLM 0.32 and of the torch, transformers, huggingface_hub and safetensors that come with it; a
contract test looks them up in the installed vLLM. A number such as A5 or H7 names a way to fail: A the device's memory,
B processes and host, D device and driver, E file, model and machine, H hangs and communication.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llm_serve.core.evidence import Kind, Place


@dataclass(frozen=True, slots=True)
class Row:
    """One meaning of a text. Without a place it is where the exception's frames, or the phase, say."""

    number: str
    pattern: re.Pattern[str]
    kind: Kind
    advice: str = ""
    place: Place | None = None


def _row(number: str, pattern: str, kind: Kind, advice: str = "", place: Place | None = None) -> Row:
    return Row(number, re.compile(pattern, re.IGNORECASE), kind, advice, place)


def row_for(said: str) -> Row | None:
    """The first row that knows an exception by its type and text."""
    return next((row for row in ROWS if row.pattern.search(said)), None)


_DRIVER = "The driver must fit the CUDA version of the installed torch: update it, and reboot after an update."
_RESET = "Reset the GPU (nvidia-smi --gpu-reset) or reboot; if it comes back, the GPU or its slot is failing."
_CACHE = "Remove the folder torch_compile_cache in vLLM's cache, or set engine.enforce_eager."
_SMALLER = "Take a smaller or quantised model, or more GPUs (engine.tensor_parallel_size)."
_TO_VLLM = "Leave engine.attention_backend, engine.kv_cache_dtype and engine.block_size to vLLM."
_BACKEND = "Name another engine.attention_backend."
_REBUILD = "Packages do not fit each other: make the environment anew from the locks."
LINKS = (
    "If it stays so without P2P, which is tried by itself: switch the IOMMU or PCIe ACS off, enlarge /dev/shm, or set "
    "NCCL_DEBUG=INFO in [engine.env] and read the journal."
)
_FETCH = 'Download the model again; a file that starts with "version https://git-lfs" is only a pointer to one.'

# What is more special stands above: the first row that matches is the answer. Memory comes first, because a compiler,
# a kernel or a graph that ran out of it says so within its own error.
ROWS = (
    # Memory that vLLM counts before it takes it.
    _row("A5", r"KV cache is needed, which is larger than",
     Kind.kv_cache_too_small, "Lower engine.max_model_len or raise engine.gpu_memory_utilization.", Place.kv_cache),
    _row("A4", r"No available memory for the cache blocks|requested memory for kv \((?:-|0\.0/)",
     Kind.no_kv_cache, "Raise engine.gpu_memory_utilization. " + _SMALLER, Place.kv_cache),
    _row("A6", r"Cannot auto-fit max_model_len",
     Kind.no_kv_cache, "Raise engine.gpu_memory_utilization. " + _SMALLER, Place.kv_cache),
    _row("A14", r"exceeds available Mamba cache blocks",
     Kind.too_many_sequences, "Lower engine.max_num_seqs.", Place.capture),
    _row("A9", r"Decrease --kv-cache-memory-bytes",  # asked for by name on a CPU, so this is no one else's doing
     Kind.out_of_memory, "Lower engine.kv_cache_memory_bytes.", Place.kv_cache),
    _row("A7", r"Free memory on device .* is less than|Available memory on node .* is less than",
     Kind.memory_held, "Stop what else uses the device, or lower engine.gpu_memory_utilization."),
    _row("A8", r"Error in memory profiling\. Initial free memory",
     Kind.memory_held, "Another process let go of memory while it was measured: keep others off the device.",
     Place.profiling),
    # Out of memory wherever it is met: its frames say what it means.
    _row("A3", r"out of memory occurred when warming up", Kind.out_of_memory, "", Place.warm_up),
    _row("A1", r"Failed to load model - not enough GPU memory", Kind.out_of_memory, "", Place.loading),
    _row("A12", r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation",
     Kind.out_of_memory),
    # Torch's stable interface, through which FlashAttention calls it, passes no reason on: seen on an H200.
    _row("A12", r'torch_call_dispatcher\(\s*"aten::(?:new_)?(?:empty|zeros|full)', Kind.out_of_memory),
    _row("D2", r"(?:CUBLAS|CUDNN|CUSPARSE)_STATUS_ALLOC_FAILED", Kind.out_of_memory),
    _row("B1", r"DefaultCPUAllocator|cannot allocate memory|MemoryError|Errno 12\b", Kind.out_of_memory),
    # The device and its driver.
    _row("D3", r"uncorrectable ECC|fallen off the bus|GPU is lost|GSP RPC", Kind.device_lost, _RESET),
    _row("D5", r"no kernel image is available|is not compatible with the current PyTorch|Torch not compiled with CUDA",
     Kind.unsupported_gpu, "The installed build has no kernels for this GPU: install a build that has."),
    _row("D4", r"Error 80[34]\b|driver on your system is too old|Driver/library version mismatch|"
           r"driver version is insufficient|unsupported display driver",
     Kind.unsupported_gpu, _DRIVER),
    _row("D4", r"Error 802\b|Failed to infer device type|No CUDA GPUs are available|CUDA unknown error|"
           r"Failed to initialize NVML|no CUDA-capable device|CUDA driver initialization failed",
     Kind.driver_not_ready, "If it stays so: run nvidia-smi, and look at nvidia-persistenced, nvidia-fabricmanager and "
     "at the unit's DeviceAllow=; a container may have to be made anew."),
    _row("D1", r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
           r"illegal instruction was encountered",
     Kind.device_error, "If it comes again: set engine.enforce_eager, or name another engine.attention_backend."),
    _row("B9", r"Cannot re-initialize CUDA in forked subprocess",
     Kind.crashed, "This is a bug of llm-serve: report it."),
    # The machine: what a compiler or a download met there comes before the compiler and the download.
    _row("E6", r"No space left on device|Errno 28\b|Not enough free disk space",
     Kind.host_limit, "Free space on the disk that holds that path, or the caches."),
    _row("H8", r"Insufficient space in \S+ for|Error while creating shared memory segment",
     Kind.host_limit, "Make /dev/shm larger: remount it with size=, or give a container --shm-size."),
    _row("B7", r"Too many open files|Errno 24\b", Kind.host_limit, "Raise LimitNOFILE= of the unit."),
    _row("E7", r"Permission denied|Errno 13\b|Errno 1\b|PermissionError|getpwuid\(\): uid not found|"
           r"Read-only file system|Errno 30\b",
     Kind.host_limit, "Give the service user access to that path, with ReadWritePaths= of the unit if need be."),
    _row("E5", r"Address already in use|EADDRINUSE|Errno 98\b",
     Kind.address_in_use, "Another process has that port: `ss -ltnp` names it."),
    # Ways of computing.
    _row("D7", r"No valid attention backend found|is not valid for this configuration",
     Kind.attention_backend, _TO_VLLM),
    _row("D7", r"Unknown attention backend", Kind.configuration, "Name one of those that the message lists."),
    _row("D9", r"Failed to find C compiler|Python\.h: No such file|InvalidCxxCompiler|No working C\+\+ compiler",
     Kind.toolchain, "Kernels are compiled on this machine: install gcc, g++ and Python's headers (python3-dev)."),
    _row("D8", r"No module named 'flashinfer|FlashInfer top-p/top-k sampling unavailable|Could not find nvcc|"
           r"nvcc: not found|'[^']*\bnvcc'|Ninja build failed|'ninja'",
     Kind.flashinfer, "FlashInfer compiles kernels: put nvcc (CUDA_HOME) and ninja on the unit's PATH, install its "
     "prebuilt kernels, or set VLLM_USE_FLASHINFER_SAMPLER=0 in [engine.env]."),
    _row("A11", r"cudaErrorStreamCapture|operation (?:would make|not permitted|failed due to).* captur",
     Kind.graph_capture, "Set engine.enforce_eager, which uses no CUDA graphs.", Place.capture),
    _row("E6", r"vLLM failed to compile the model|torch_compile_cache|Expected tensors only, but got|"
           r"failed to get the (?:hash|file path) of the compiled graph|BackendCompilerFailed|"
           r"torch\._(?:dynamo|inductor)",
     Kind.compilation, _CACHE),
    # Between processes and GPUs.
    _row("H7", r"NCCL error|NCCL WARN|ncclSystemError|ncclUnhandledCudaError|peer access is not supported|"
           r"peer mapping resources exhausted",
     Kind.communication, LINKS),
    _row("H6", r"Watchdog caught collective operation timeout|DistBackendError|DistStoreError|DistNetworkError|"
           r"waiting for clients|connectFullMesh|third_party/gloo",
     Kind.communication, LINKS),
    _row("H4", r"RPC call to .+ timed out",
     Kind.stalled, "If steps really take so long, raise VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS in [engine.env]."),
    _row("F4", r"Timed out waiting for engine core processes",
     Kind.start_timeout, "If it is only slow, raise VLLM_ENGINE_READY_TIMEOUT_S in [engine.env]."),
    # The hub, the model and the file. A refusal of the hub's is final, its silence is not.
    _row("E2", r"gated repo|GatedRepoError|Repo(?:sitory)?NotFound|Repository Not Found|Revision Not Found|"
           r"is not a valid (?:model|git) identifier|40[13] Client Error|'40[13] ",
     Kind.configuration, "Check `model` and engine.revision; a gated or private one needs HF_TOKEN in [engine.env]."),
    _row("E2", r"outgoing traffic has been disabled|OfflineModeIsEnabled",
     Kind.configuration, "The hub is switched off (HF_HUB_OFFLINE) and the model is not in the cache: download it."),
    _row("E2", r"httpx2?\.(?:Connect|Read|Write|Pool|RemoteProtocol|Network)\w+|"
           r"requests\.exceptions\.\w*(?:Connect|Timeout)|"
           r"Max retries exceeded|name resolution|Name or service not known|Server error '5|50[0234] Server Error|"
           r"'429 |429 Client Error|couldn't connect to '|error happened while trying to locate|"
           r"specific connection error",
     Kind.hub_unreachable, "The hub does not answer. HF_HUB_OFFLINE=1 in [engine.env] serves a model that is cached."),
    _row("E2", r"HFValidationError|Repo id must|Invalid repository ID or local directory|not a valid JSON file",
     Kind.configuration, "`model` names neither a model of the hub nor a folder with a config.json."),
    _row("E3", r"Error while deserializing header|SafetensorError|unpack requires a buffer",
     Kind.weights, "A weight file is cut short, or is none. " + _FETCH, Place.loading),
    _row("E3", r"Cannot find any model weights|Weight files referenced in index but missing|"
           r"not initialized from checkpoint",
     Kind.weights, "The model's folder lacks weights. " + _FETCH, Place.loading),
    _row("E4", r"backend tokenizer|Can't load tokenizer",
     Kind.configuration, "The model's folder lacks its tokenizer: download it again, or set engine.tokenizer."),
    _row("D6", r"Bfloat16 is only supported on GPUs", Kind.configuration, 'Set engine.dtype to "half" or "auto".'),
    _row("E7", r"failed to be inspected",
     Kind.configuration, "The journal has the exception of that inspection: a cache that cannot be written, or a "
     "package that does not fit."),
    _row("E1", r"is greater than the derived max_model_len",
     Kind.configuration, "Lower engine.max_model_len to what the model was made for."),
    _row("E1", r"validation error for|are not supported for now|is not supported (?:anymore|in-tree)|"
           r"does not recognize this architecture|must be divisible by tensor parallel size|"
           r"must be greater than or equal to max_num_seqs",
     Kind.configuration, "Change what it names in the instance file."),
    # Last, because other messages list these names too.
    _row("D7", r"vllm_flash_attn|_vllm_fa\d|flash_attn|FlashAttention", Kind.attention_backend, _BACKEND),
    _row("D8", r"flashinfer", Kind.flashinfer, "Name another engine.attention_backend, or set "
     "VLLM_USE_FLASHINFER_SAMPLER=0 in [engine.env]."),
    _row("E9", r"undefined symbol|cannot import name|incompatible version|ImportError|ModuleNotFoundError",
     Kind.configuration, _REBUILD),
)  # fmt: skip

# Functions of vLLM and what an engine does in them. They call each other, so what is more special stands above:
# compile_or_warm_up_model calls capture_model, determine_available_memory calls profile_run, that _dummy_sampler_run.
FRAMES: tuple[tuple[frozenset[str], Place], ...] = (
    (frozenset({"load_model", "load_weights"}), Place.loading),
    (frozenset({"_dummy_sampler_run", "_dummy_pooler_run"}), Place.warm_up),
    (frozenset({"profile_run", "profile_cudagraph_memory", "determine_available_memory"}), Place.profiling),
    (frozenset({"capture_model", "_capture_cudagraphs"}), Place.capture),
    (frozenset({"kernel_warmup", "warmup_kernels", "compile_or_warm_up_model"}), Place.warm_up),
    (frozenset({"initialize_kv_cache", "initialize_kv_cache_tensors", "initialize_from_config"}), Place.kv_cache),
    (frozenset({"execute_model", "sample_tokens", "compute_logits"}), Place.serving),
)

PHASES: dict[str, Place] = {
    "loading weights": Place.loading,
    "weights loaded": Place.profiling,
    "compiling": Place.profiling,
    "measuring memory": Place.kv_cache,
    "making the KV cache": Place.kv_cache,
    "capturing CUDA graphs": Place.capture,
    "warming up": Place.warm_up,
    "engine ready": Place.warm_up,
    "generating the first token": Place.warm_up,
    "serving": Place.serving,
}
"""By the names in `progress`: what an engine does after it has announced that phase."""

IN_ATTENTION = re.compile(r"flash_attn|flashinfer|triton_attn|unified_(?:mla_)?attention|flex_attention|xformers")
"""Functions of attention backends, and the two of vLLM through which a model calls them."""

OF_HOST = re.compile(r"DefaultCPUAllocator|cannot allocate memory|(?<!OutOf)MemoryError|Errno 12\b", re.IGNORECASE)
"""Out of the host's memory, not the GPU's."""

# A wrapper tells that something else went wrong.
_WRAPPER = re.compile(
    r"WorkerProc initialization failed due to an exception|Engine core initialization failed|Executor failed\.|"
    r"EngineDeadError|EngineCore encountered an issue|died unexpectedly|CancelledError|SystemExit|: cancelled$"
)
_WRAPPED = re.compile(r"Worker failed with error '(.*?)(?:', please check the|$)", re.DOTALL)
_INSPECTED = "Error raised in subprocess:"


def is_wrapper(said: str) -> bool:
    """True for a type and text that explain nothing."""
    return bool(_WRAPPER.search(said))


def wrapped_in(text: str) -> str:
    """The worker's own words within EngineCore's, or nothing."""
    found = _WRAPPED.search(text)
    return found[1].strip() if found else ""


def is_inspection(text: str) -> bool:
    """True for what vLLM logs before it calls a model uninspectable: the reason is in here and nowhere else."""
    return text.startswith(_INSPECTED)


def place_of(frames: Collection[str]) -> Place | None:
    """What an engine did in these functions."""
    return next((place for names, place in FRAMES if not names.isdisjoint(frames)), None)


_AMOUNT = r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)(?:i?B|bytes)\b"
_TRIED = re.compile(rf"(?:Tried|tried|Unable) to allocate {_AMOUNT}")
_LENGTH = re.compile(r"estimated maximum model length is (\d{1,12})")
_SEQS = re.compile(r"available Mamba cache blocks \((\d{1,9})\)")
_FREE = re.compile(
    r"(?:Free memory on device|Available memory on node) \S+ \((\d{1,9}(?:\.\d{1,9})?)/(\d{1,9}(?:\.\d{1,9})?) GiB\)"
)
_BUDGET = re.compile(r"external process's weights \((\d{1,3}\.\d{1,9}), (\d{1,9}(?:\.\d{1,9})?) GiB\)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def numbers(text: str) -> dict[str, Any]:
    """The numbers that a text names, by the fields of Failure."""
    found: dict[str, int] = {}
    if tried := _TRIED.search(text):
        found["tried_bytes"] = int(float(tried[1]) * _UNITS[tried[2]])
    if length := _LENGTH.search(text):
        found["fitting_model_len"] = int(length[1])
    if seqs := _SEQS.search(text):
        found["fitting_num_seqs"] = int(seqs[1])
    if memory := _FREE.search(text):
        free, total = map(float, memory.groups())
        if budget := _BUDGET.search(text):
            # Weights that stay there for the next engine are not free, but it need not make room for them either.
            free += max(0.0, float(budget[1]) * total - float(budget[2]))
        found["free_bytes"], found["total_bytes"] = int(free * _UNITS["G"]), int(total * _UNITS["G"])
    return found
