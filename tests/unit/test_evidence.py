"""What is kept of an engine's words, and what it says of a failure afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_serve.core.evidence import ErrorRecord, Evidence, Kind
from llm_serve.core.failures import classify
from llm_serve.engine.evidence import Collector, exit_codes_in, exit_codes_of


def record(
    message: str, *, process: str = "EngineCore", level: str = "INFO", error: str | None = None
) -> dict[str, Any]:
    """A relayed record, with an exception of this text."""
    exception = error and {"type": "builtins.ValueError", "text": error, "frames": ["load_model"], "traceback": "..."}
    return {"process": process, "level": level, "message": message, "exception": exception, "time": 0.0, "pid": 1}


def manager(**codes: int | None) -> SimpleNamespace:
    """What vLLM's manager of engine processes looks like: processes with these exit codes."""
    return SimpleNamespace(processes=[SimpleNamespace(name=name, exitcode=code) for name, code in codes.items()])


def test_nothing_heard_is_no_evidence() -> None:
    """An engine that said nothing leaves nothing."""
    assert Evidence() == Collector().evidence()


def test_an_error_is_kept_with_who_said_it() -> None:
    """The exception of an error record becomes evidence; the record counts as a sign of life."""
    collector = Collector()

    collector.add_record(record("EngineCore failed to start.", level="ERROR", error="No available memory"))

    expected = ErrorRecord("EngineCore", "builtins.ValueError", "No available memory", ("load_model",))
    assert (expected,) == collector.evidence().errors
    assert 1 == collector.heard


def test_what_torch_only_prints_is_not_pushed_out_by_the_trace_after_it() -> None:
    """Its C interface passes no reason on: the printed line has the only numbers, and a C++ trace follows it."""
    collector = Collector()
    shim = 'torch_call_dispatcher( "aten::new_empty", "", stack.data(), 0) API call failed at ops.h, line 939'
    collector.add_output(
        "[rank0]:[E shim_common.cpp:523] Exception in aoti_torch: CUDA out of memory. Tried to allocate 56.00 MiB."
    )
    for number in range(150):
        collector.add_output(f"frame #{number}: torch_call_dispatcher + 0x471")
    failed = record("EngineCore failed to start.", level="ERROR", error=shim)
    failed["exception"]["frames"] = ["capture_model"]
    collector.add_record(failed)

    failure = classify(collector.evidence())

    assert (Kind.out_of_memory, 56 << 20) == (failure.kind, failure.tried_bytes)
    assert 21 == len(collector.evidence().output_tail)


def test_the_end_of_a_process_is_known_by_its_name() -> None:
    """The fork server tells pids; whoever has said something has a name. Others are compilers and the like."""
    collector = Collector()
    collector.add_record(record("hello", process="Worker") | {"pid": 5})
    for pid, code in ((5, -9), (6, -11)):
        collector.add_record(record("process has ended") | {"ended": [pid, code]})

    assert {"Worker": -9} == collector.evidence().exit_codes
    assert Kind.killed is classify(collector.evidence(has_served=True)).kind
    collector.clear()
    assert {} == collector.evidence().exit_codes


def test_the_news_of_a_death_is_complete_when_every_process_has_one() -> None:
    """Who waits for exit codes need not wait longer."""
    collector = Collector()
    collector.add_record(record("process has ended") | {"ended": [5, -9]})

    assert collector.has_ends_of([5])
    assert not collector.has_ends_of([5, 6])


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING"])
def test_an_exception_that_vllm_got_over_explains_nothing(level: str) -> None:
    """A warning with a traceback, as of a missing optional module, is no cause of a failure."""
    collector = Collector()

    collector.add_record(record("could not use it", level=level, error="no kernel image is available"))

    assert () == collector.evidence().errors


def test_the_phase_never_goes_back() -> None:
    """Workers report the same phases at different times; the furthest counts."""
    collector = Collector()

    for message in ("Available KV cache memory: 1 GiB", "Starting to load model", "nothing to see"):
        collector.add_record(record(message))

    assert "measuring memory" == collector.evidence().phase
    assert 3 == collector.heard


def test_the_end_of_the_output_is_kept() -> None:
    """Of the raw output the last lines explain an abort."""
    collector = Collector()

    for number in range(1000):
        collector.add_output(f"line {number}")

    assert tuple(f"line {number}" for number in range(980, 1000)) == collector.evidence().output_tail


def test_a_flood_of_errors_is_bounded() -> None:
    """Memory does not grow with the errors of a long life."""
    collector = Collector()

    for number in range(1000):
        collector.add_record(record("x", level="ERROR", error=str(number)))

    errors = collector.evidence().errors
    assert 50 == len(errors)
    assert "999" == errors[-1].text


def test_a_new_start_forgets_the_last() -> None:
    """What one engine said is not held against the next."""
    collector = Collector()
    collector.add_record(record("Starting to load model", level="ERROR", error="x"))
    collector.add_output("terminate called")

    collector.clear()

    assert Evidence() == collector.evidence()
    assert 0 == collector.heard


def test_evidence_is_a_copy() -> None:
    """What arrives later does not change a verdict that is being made."""
    collector = Collector()
    before = collector.evidence()

    collector.add_output("late")

    assert () == before.output_tail


def test_the_daemons_own_error_is_the_parents() -> None:
    """What the daemon saw itself is there by its full type, and a deadline by its length."""
    evidence = Collector().evidence(OSError("[Errno 28] No space left on device"), timed_out_after_s=5.0)

    assert ErrorRecord("", "builtins.OSError", "[Errno 28] No space left on device") == evidence.parent_error
    assert 5.0 == evidence.timed_out_after_s


def test_exit_codes_are_read_off_vllm_s_manager() -> None:
    """Processes that ended badly are named; those that run or ended well are not."""
    assert {"EngineCore": -9, "EngineCore_DP1": 1} == exit_codes_of(
        manager(EngineCore=-9, EngineCore_DP1=1, EngineCore_DP2=None, EngineCore_DP3=0)
    )
    assert {} == exit_codes_of(None)


def test_exit_codes_are_found_in_the_traceback_of_a_start() -> None:
    """vLLM's message says {} for a killed process, but the frame that raised still holds the process."""

    def start() -> None:
        launch = SimpleNamespace(engine_manager=manager(EngineCore=-9))
        raise RuntimeError(f"Engine core initialization failed. Failed core proc(s): {vars(launch).get('failed')}")

    with pytest.raises(RuntimeError) as raised:
        start()

    assert {"EngineCore": -9} == exit_codes_in(raised.value)
    assert Kind.killed is classify(Collector().evidence(raised.value)).kind


@pytest.mark.parametrize("error", [None, ValueError("never raised")])
def test_an_error_without_a_traceback_has_no_exit_codes(error: BaseException | None) -> None:
    """Nothing to look through is nothing found."""
    assert {} == exit_codes_in(error)


def test_odd_locals_are_passed_over() -> None:
    """A frame whose `launch` is something else is no trap."""

    def start(launch: object) -> None:
        raise RuntimeError

    for launch in (None, 1, SimpleNamespace(engine_manager=None), SimpleNamespace()):
        with pytest.raises(RuntimeError) as raised:
            start(launch)
        assert {} == exit_codes_in(raised.value)
