"""What a failed engine left behind, and what it means: vLLM 0.32's own messages, with the frames they come with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core import failure_texts, progress
from llm_serve.core.evidence import ErrorRecord, Evidence, Failure, Holder, Kind, Place
from llm_serve.core.failures import classify, root_cause
from tests.failure_cases import (
    CORE,
    CORES_WORDS,
    DEAD,
    EXCEPTIONS,
    GIB,
    MIB,
    OOM,
    PARENT,
    PARENTS_WORDS,
    STEP,
    WARM,
    WORKER,
    WRAPPERS,
    Case,
    K,
    P,
    oom,
)


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


@pytest.mark.parametrize(
    ("free", "total", "kind"),
    [
        ("139.29", "139.8", K.share_too_large),
        ("23.2", "23.7", K.share_too_large),
        ("22.0", "23.7", K.memory_held),
        ("8.77", "139.8", K.memory_held),
    ],
)
@pytest.mark.parametrize(
    "holders", [(), (Holder(0, 4711, "python", 100 * MIB),)], ids=["nobody", "somebody with little"]
)
def test_a_share_that_nobody_else_makes_too_large_is_called_so(
    free: str, total: str, kind: Kind, holders: tuple[Holder, ...]
) -> None:
    """The driver and the engine's context take their part; there is nobody to wait for."""
    text = f"Free memory on device cuda:0 ({free}/{total} GiB) on startup is less than desired GPU memory utilization"
    record = ErrorRecord(CORE, "builtins.ValueError", f"{text} (0.999, {total} GiB).")
    failure = classify(Evidence(errors=(record,), gpu_holders=holders))

    assert kind is failure.kind
    assert ("nobody else" in failure.advice) is (kind is K.share_too_large)
    assert "gpu_memory_utilization" in failure.advice or holders


def test_our_own_weights_make_no_share_too_large() -> None:
    """What is held for the engine itself is there for it: nobody is waited for, and nothing is given up twice."""
    text = (
        "Free memory on device cuda:0 (125.76/139.8 GiB) on startup is less than the engine's budget after excluding "
        "external process's weights (0.999, 126.79 GiB)."
    )
    failure = classify(Evidence(errors=(ErrorRecord(CORE, "builtins.ValueError", text),)))

    assert K.share_too_large is failure.kind
    assert pytest.approx(138.6, abs=0.1) == (failure.free_bytes or 0) / GIB


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
