"""What a failed engine left behind, and what it means. The texts are vLLM's and torch's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.failures import ErrorRecord, Evidence, Failure, Kind, classify, root_cause

CORE, WORKER = "EngineCore", "Worker_TP0"
PARENT = ErrorRecord(
    "",
    "builtins.RuntimeError",
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}",
)
WRAPPER = ErrorRecord(
    CORE, "builtins.Exception", "WorkerProc initialization failed due to an exception in a background process."
)

OOM = Kind.out_of_memory
TEXTS: dict[str, tuple[str, str, Kind]] = {
    "A1 memory for the weights": (
        "torch.OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 139.80 GiB",
        OOM,
    ),
    "A3 sampler warm-up": (
        "builtins.RuntimeError",
        "CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering",
        OOM,
    ),
    "A4 no memory for the cache": (
        "builtins.ValueError",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing",
        OOM,
    ),
    "A5 cache too small for the length": (
        "builtins.ValueError",
        (
            "To serve at least one request with the model's max seq len (32768), (1.75 GiB KV cache is needed, which "
            "is larger than the available KV cache memory (0.5 GiB). Based on the available memory, the estimated "
            "maximum model length is 9360."
        ),
        OOM,
    ),
    "A7 somebody else's memory": (
        "builtins.ValueError",
        (
            "Free memory on device cuda:0 (8.77/139.8 GiB) on startup is less than desired GPU memory utilization "
            "(0.9, 125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
        ),
        OOM,
    ),
    "A11 graph capture": ("builtins.RuntimeError", "CUDA error: out of memory", OOM),
    "D2 cuBLAS": ("builtins.RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas`", OOM),
    "D5 no kernels for the GPU": (
        "torch.AcceleratorError",
        "CUDA error: no kernel image is available for execution on the device",
        Kind.configuration,
    ),
    "D7 unknown backend": (
        "builtins.ValueError",
        "Unknown attention backend: 'X'. Valid options are: FLASH_ATTN",
        Kind.configuration,
    ),
    "E1 a bad value": (
        "pydantic_core._pydantic_core.ValidationError",
        "1 validation error for SchedulerConfig\n  Value error, max_num_batched_tokens (64) must be greater than",
        Kind.configuration,
    ),
    "E1 an unknown architecture": (
        "builtins.ValueError",
        (
            "The checkpoint you are trying to load has model type `x` but Transformers does not recognize this "
            "architecture."
        ),
        Kind.configuration,
    ),
    "E1 an unsupported architecture": (
        "builtins.ValueError",
        "Model architectures ['XForCausalLM'] are not supported for now. Supported architectures: [...]",
        Kind.configuration,
    ),
    "E1 heads and GPUs": (
        "builtins.ValueError",
        "Total number of attention heads (9) must be divisible by tensor parallel size (2).",
        Kind.configuration,
    ),
    "E3 a header that is cut": ("struct.error", "unpack requires a buffer of 8 bytes", Kind.weights),
    "E3 a file that is no safetensors file": (
        "safetensors_rust.SafetensorError",
        "Error while deserializing header: HeaderTooLarge",
        Kind.weights,
    ),
    "E3 a file that is cut": (
        "safetensors_rust.SafetensorError",
        "Error while deserializing header: MetadataIncompleteBuffer",
        Kind.weights,
    ),
    "E3 the same in newer words": (
        "safetensors_rust.SafetensorError",
        "Error while deserializing header: incomplete metadata, file not fully covered",
        Kind.weights,
    ),
    "E3 no weights at all": (
        "builtins.RuntimeError",
        "Cannot find any model weights with `/models/x`",
        Kind.weights,
    ),
    "E3 a file of the index is missing": (
        "builtins.RuntimeError",
        "Weight files referenced in index but missing: ['model-00002-of-00002.safetensors']",
        Kind.weights,
    ),
    "E3 weights are missing": (
        "builtins.ValueError",
        "Following weights were not initialized from checkpoint: {'lm_head.weight'}",
        Kind.weights,
    ),
    "E6 the disk is full": (
        "builtins.OSError",
        "[Errno 28] No space left on device: '/var/cache/llm-serve/torch'",
        Kind.host_limit,
    ),
    "E7 a cache cannot be written": (
        "builtins.PermissionError",
        "[Errno 13] Permission denied: '/.triton'",
        Kind.host_limit,
    ),
    "B7 too many files": ("builtins.OSError", "[Errno 24] Too many open files", Kind.host_limit),
    "H8 shared memory": (
        "builtins.RuntimeError",
        "Insufficient space in /dev/shm for the message queue",
        Kind.host_limit,
    ),
    "D1 an illegal access": (
        "torch.AcceleratorError",
        "CUDA error: an illegal memory access was encountered",
        Kind.crashed,
    ),
    "E10 a bug that a request met": ("builtins.KeyError", "'req-12'", Kind.crashed),
}


@pytest.mark.parametrize(("exception", "text", "kind"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("process", [CORE, WORKER, ""], ids=["core", "worker", "parent"])
def test_a_text_names_its_kind(process: str, exception: str, text: str, kind: Kind) -> None:
    """The same message means the same whichever process of a start said it."""
    record = ErrorRecord(process, exception, text)
    evidence = Evidence(errors=(record,)) if process else Evidence(parent_error=record)

    failure = classify(evidence)

    assert kind is failure.kind
    assert exception.rsplit(".", 1)[-1] in failure.detail


@pytest.mark.parametrize("kind", [Kind.configuration, Kind.weights, Kind.host_limit, Kind.out_of_memory])
def test_what_a_person_can_mend_comes_with_advice(kind: Kind) -> None:
    """Every row that knows the cause also says what to do about it."""
    failures = [
        classify(Evidence(errors=(ErrorRecord(CORE, exception, text),)))
        for exception, text, expected in TEXTS.values()
        if expected is kind
    ]

    assert failures
    assert all(failure.advice.endswith(".") for failure in failures)


@pytest.mark.parametrize("name", ["Worker", "Worker_TP1", "Worker_PP0_TP1", "VllmWorker-0"])
def test_a_worker_comes_before_the_core_and_the_core_before_the_parent(name: str) -> None:
    """The wrapper is never taken for the cause, under whichever name the worker logged."""
    worker = ErrorRecord(name, "torch.OutOfMemoryError", "CUDA out of memory.")

    assert worker == root_cause(Evidence(errors=(WRAPPER, worker), parent_error=PARENT))
    assert WRAPPER == root_cause(Evidence(errors=(WRAPPER,), parent_error=PARENT))
    assert PARENT == root_cause(Evidence(parent_error=PARENT))
    assert root_cause(Evidence()) is None


def test_the_first_exception_of_a_process_counts() -> None:
    """What follows on an exception in the same process is its consequence."""
    first = ErrorRecord(CORE, "builtins.ValueError", "No available memory for the cache blocks.")
    second = ErrorRecord(CORE, "builtins.OSError", "[Errno 28] No space left on device")

    assert first == root_cause(Evidence(errors=(first, second)))


def test_the_daemons_own_records_explain_nothing_that_the_parent_error_can() -> None:
    """An exception that the daemon logged beside a start is not its cause."""
    aside = ErrorRecord("MainProcess", "builtins.OSError", "Permission denied")

    assert PARENT == root_cause(Evidence(errors=(aside,), parent_error=PARENT))


def test_a_bad_request_of_a_client_is_no_verdict_on_the_configuration() -> None:
    """Handlers log exceptions in the daemon's process; a later death must not be taken for a bad file."""
    request = ErrorRecord("MainProcess", "builtins.ValueError", "audio inputs are not supported")

    killed = classify(Evidence(errors=(request,), exit_codes={CORE: -9}))
    gone = classify(Evidence(errors=(request,)))

    assert Kind.killed is killed.kind
    assert Kind.crashed is gone.kind


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (-9, Kind.killed, "EngineCore was ended by SIGKILL."),
        (-6, Kind.crashed, "EngineCore was ended by SIGABRT."),
        (-11, Kind.crashed, "EngineCore was ended by SIGSEGV."),
        (-7, Kind.crashed, "EngineCore was ended by SIGBUS."),
        (-99, Kind.crashed, "EngineCore was ended by signal 99."),
    ],
)
def test_a_signal_is_named(code: int, kind: Kind, words: str) -> None:
    """With nothing but an exit code, even beside the parent's empty words, the signal is the answer."""
    for evidence in (Evidence(exit_codes={CORE: code}), Evidence(exit_codes={CORE: code}, parent_error=PARENT)):
        failure = classify(evidence)

        assert (kind, words) == (failure.kind, failure.detail)


def test_a_kill_points_to_the_kernel_and_a_crash_does_not() -> None:
    """SIGKILL without a killer is most often the host's memory."""
    assert "kernel log" in classify(Evidence(exit_codes={CORE: -9})).advice
    assert "" == classify(Evidence(exit_codes={CORE: -11})).advice


def test_an_exit_code_of_a_python_exception_says_nothing() -> None:
    """Status 1 only means that there was an exception: the last line of output has to do."""
    failure = classify(Evidence(exit_codes={CORE: 1}, output_tail=("a", "Fatal: b")))

    assert Failure(Kind.unknown, "Fatal: b") == failure


def test_a_known_text_comes_before_a_signal() -> None:
    """A worker that ran out of memory explains why its EngineCore was killed."""
    worker = ErrorRecord(WORKER, "torch.OutOfMemoryError", "CUDA out of memory.")

    assert Kind.out_of_memory is classify(Evidence(errors=(worker,), exit_codes={CORE: -9})).kind


def test_an_unknown_text_comes_after_a_signal() -> None:
    """An exception that no row knows may be a consequence; the signal is certain."""
    core = ErrorRecord(CORE, "builtins.RuntimeError", "cancelled")

    assert Kind.killed is classify(Evidence(errors=(core,), exit_codes={CORE: -9})).kind


def test_a_start_that_took_too_long_names_its_phase() -> None:
    """The deadline is the verdict, whatever was logged on the way."""
    evidence = Evidence(phase="loading weights", errors=(WRAPPER,), timed_out_after_s=1800.0)

    failure = classify(evidence)

    assert Kind.start_timeout is failure.kind
    assert "the engine was not ready 1800 s after its start in the phase 'loading weights'." == failure.detail


def test_silence_is_said_to_be_silence() -> None:
    """No evidence at all is an unknown failure."""
    assert "unknown: the engine ended without a word." == str(classify(Evidence()))


def test_a_verdict_is_one_line() -> None:
    """Texts with line breaks and of any length fit into a log line."""
    failure = classify(Evidence(errors=(ErrorRecord(CORE, "a.b.MyError", "one\n  two\n" + "x" * 5000),)))

    assert "MyError (in EngineCore): one two x" in str(failure)
    assert "\n" not in str(failure)
    assert len(str(failure)) < 700


RECORDS = st.builds(
    ErrorRecord,
    st.sampled_from(["", "MainProcess", "EngineCore", "EngineCore_DP1", "Worker", "VllmWorker-0", "DPCoordinator"]),
    st.text(),
    st.text(),
)
EVIDENCE = st.builds(
    Evidence,
    phase=st.text(),
    errors=st.lists(RECORDS, max_size=4).map(tuple),
    output_tail=st.lists(st.text(), max_size=3).map(tuple),
    exit_codes=st.dictionaries(st.text(), st.integers(-130, 255), max_size=3),
    parent_error=st.none() | RECORDS,
    timed_out_after_s=st.none() | st.floats(0, 1e6),
)


@given(EVIDENCE)
def test_every_evidence_has_a_verdict(evidence: Evidence) -> None:
    """The classification is total, and its verdict always has words."""
    failure = classify(evidence)

    assert failure.kind in Kind
    assert str(failure).startswith(f"{failure.kind}: ")
