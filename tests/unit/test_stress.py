"""The verdicts of a stress test, its limits, and who is in its way."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.doctor.gpus import ProcessFacts
from llm_serve.core.stress import (
    Found,
    Part,
    Progress,
    Range,
    Sample,
    Sight,
    Verdict,
    budget_bytes,
    exit_status,
    judge,
    limit_celsius,
    not_run,
    occupants,
    parse_gpus,
    parse_parts,
    too_hot,
)
from llm_serve.core.telemetry import THROTTLE_REASONS, Reading

GIB = 1 << 30


# Verdicts.
@pytest.mark.parametrize(
    ("found", "sight", "heat", "verdict", "reason"),
    [
        ({}, Sight(), "", "passed", ""),
        ({"is_cut": True}, Sight(), "", "stopped", ""),
        ({"errors": 1}, Sight(), "", "failed", "1 wrong value"),
        ({"errors": 2, "notes": ("a", "b")}, Sight(), "", "failed", "2 wrong values (a; b)"),
        ({"errors": 2, "is_cut": True}, Sight(), "", "failed", "2 wrong values"),
        ({"error": "CUDA error: x"}, Sight(), "", "failed", "CUDA error: x"),
        ({"error": "CUDA error: x"}, Sight(xids={"31": 1, "43": 2}), "", "failed", "CUDA error: x; Xid 31; Xid 43 (2 times)"),
        ({}, Sight(ecc_errors={"uncorrected": 1}), "", "failed", "1 uncorrected ECC error"),
        ({}, Sight(ecc_errors={"corrected": 2}), "", "passed", "2 corrected ECC errors"),
        ({"is_cut": True}, Sight(), "stopped at 91 °C", "failed", "stopped at 91 °C"),
        ({}, Sight(slowed_by=("power limit",)), "", "passed", ""),
    ],
)  # fmt: skip
def test_verdicts(found: dict[str, object], sight: Sight, heat: str, verdict: str, reason: str) -> None:
    """Whatever is wrong fails a part, and all of it is said; a slow-down does not, and corrected errors are only told."""
    row = judge(Found(Part.load, **found), sight, heat)  # type: ignore[arg-type]

    assert (verdict, reason) == (row.verdict, row.reason)


FOUND = st.builds(
    Found,
    st.sampled_from(Part),
    errors=st.integers(0, 2),
    error=st.sampled_from(["", "x"]),
    is_cut=st.booleans(),
    notes=st.tuples(st.text(max_size=3)),
    tflops=st.dictionaries(st.sampled_from(["fp16", "fp32"]), st.floats(0, 1e3)),
)


@given(found=FOUND, xids=st.dictionaries(st.just("79"), st.just(1)), heat=st.sampled_from(["", "hot"]))
def test_nothing_that_is_wrong_passes(found: Found, xids: dict[str, int], heat: str) -> None:
    """A part fails exactly where something is wrong, and never without a reason."""
    row = judge(found, Sight(xids=xids), heat)

    is_wrong = bool(found.errors or found.error or xids or heat)
    assert is_wrong == (row.verdict is Verdict.failed)
    assert not is_wrong or row.reason
    assert is_wrong or found.is_cut == (row.verdict is Verdict.stopped)
    assert json.loads(json.dumps(row.to_json()))["verdict"] == row.verdict


@given(found=FOUND, share=st.floats(0, 1), is_over=st.booleans())
def test_progress_survives_the_way_from_a_child(found: Found, share: float, is_over: bool) -> None:
    """As a line of JSON."""
    progress = Progress(share, found, 1.5, is_over)

    assert progress == Progress.from_json(json.loads(json.dumps(asdict(progress))))


@pytest.mark.parametrize(
    ("verdicts", "is_interrupted", "status"),
    [
        (["passed", "passed"], False, 0),
        (["passed", "passed"], True, 0),
        (["passed", "failed", "not run"], False, 70),
        (["passed", "failed", "stopped"], True, 70),
        (["passed", "stopped", "not run"], True, 130),
        ([], True, 130),
        (["passed", "not run"], False, 70),
        ([], False, 70),
    ],
)
def test_exit_statuses(verdicts: list[str], is_interrupted: bool, status: int) -> None:
    """0 only where all was run and passed; a failure weighs more than Ctrl-C."""
    assert status == exit_status(map(Verdict, verdicts), is_interrupted=is_interrupted)


@given(st.lists(st.sampled_from(Verdict)), st.booleans())
def test_success_is_that_all_has_passed(verdicts: list[Verdict], is_interrupted: bool) -> None:
    """In any order."""
    assert (set(verdicts) == {Verdict.passed}) == (exit_status(verdicts, is_interrupted=is_interrupted) == 0)


def test_a_part_that_was_not_run_has_its_reason() -> None:
    """And no figures."""
    row = not_run(Part.load, "too hot")

    assert ("not run", "too hot", 0) == (row.verdict, row.reason, row.found.iterations)


# What was seen.
def reading(celsius: float | None = None, *reasons: str, **more: object) -> Reading:
    """Of one GPU."""
    return Reading(0, "GPU-0", "L4", temperature_celsius=celsius, throttle_reasons=reasons, **more)  # type: ignore[arg-type]


def sample(celsius: float | None, watts: float | None, *slowed_by: str) -> Sample:
    """At some moment."""
    return Sample(0.0, Part.load, celsius, watts, None, slowed_by)


def test_what_was_seen_is_a_range_and_what_was_added() -> None:
    """Errors from before do not count, and a sensor that sometimes does not answer is no zero."""
    before = reading(ecc_errors={"corrected": 5, "uncorrected": 1}, xids={"13": 1})
    after = reading(ecc_errors={"corrected": 7, "uncorrected": 1}, xids={"13": 1, "79": 2})
    samples = [sample(43, None, "power limit"), sample(None, 300), sample(79, 344, "power limit", "too hot")]

    sight = Sight.of(samples, before, after)

    assert Range(43, 79) == sight.celsius
    assert Range(300, 344) == sight.watts
    assert ("power limit", "too hot") == sight.slowed_by
    assert {"79": 2} == sight.xids
    assert {"corrected": 2} == sight.ecc_errors


def test_counters_that_were_not_known_before_are_no_news() -> None:
    """ECC counts go over the life of a GPU; those of Xids begin with the command."""
    sight = Sight.of([], reading(), reading(ecc_errors={"uncorrected": 3}, xids={"31": 1}))

    assert ({}, {"31": 1}, Range(None, None)) == (sight.ecc_errors, sight.xids, sight.celsius)


@given(st.lists(st.none() | st.floats(-20, 200)))
def test_a_range_holds_all_that_is_known(values: list[float | None]) -> None:
    """And nothing else."""
    found = Range.of(values)
    known = [value for value in values if value is not None]

    assert (found.least is None) == (not known)
    assert not known or (found.least in known and found.most in known)
    assert all((found.least or 0) <= value <= (found.most or 0) for value in known)


# Heat.
@pytest.mark.parametrize(
    ("asked", "slowdown", "limit"),
    [(None, None, 90), (None, 95, 92), (None, 87, 84), (75, 95, 75), (None, 0, 90), (None, 255, 90), (100, None, 100)],
)
def test_the_limit(asked: float | None, slowdown: float | None, limit: float) -> None:
    """What was asked for, else below the device's own, unless that is no temperature."""
    assert limit == limit_celsius(asked, slowdown)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (reading(89.9), ""),
        (reading(90), "stopped at 90 °C, the limit is 90"),
        (reading(101), "stopped at 101 °C, the limit is 90"),
        (reading(None), ""),
        (reading(80, "sw_power_cap", "sw_thermal_slowdown", "hw_slowdown"), ""),
        (reading(80, "hw_thermal_slowdown"), "stopped at 80 °C: the hardware slows itself down for its heat"),
        (reading(None, "hw_thermal_slowdown"), "stopped: the hardware slows itself down for its heat"),
    ],
)
def test_a_gpu_is_stopped_at_its_limit_or_by_its_hardware(now: Reading, words: str) -> None:
    """Not for its power limit, and not for a sensor that it does not have."""
    assert "hw_thermal_slowdown" in THROTTLE_REASONS
    assert words == too_hot(now, 90)


# Room.
@pytest.mark.parametrize(
    ("free_gib", "total_gib", "is_shared", "gib"),
    [(140, 141, False, 132.95), (24, 24, False, 22.8), (4, 4, False, 3.5), (0.4, 24, False, 0), (10, 141, True, 5)],
)
def test_the_budget(free_gib: float, total_gib: float, is_shared: bool, gib: float) -> None:
    """Most of what is free; beside somebody, half."""
    found = budget_bytes(int(free_gib * GIB), int(total_gib * GIB), is_shared=is_shared)

    assert gib == pytest.approx(found / GIB, abs=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), ("2,0", (2, 0)), (" 1 , 3", (1, 3)), ("0000:1b:00.0", ("00000000:1B:00.0",))],
)
def test_gpus_are_named_as_in_a_file(text: str, expected: tuple[object, ...]) -> None:
    """By index, UUID or address."""
    assert expected == parse_gpus(text)


@pytest.mark.parametrize("text", ["", "a", "0,", "-1", "0,0", "1.5", "٣"])
def test_what_names_no_gpu_is_refused(text: str) -> None:
    """With what is wrong."""
    with pytest.raises(ValueError, match=r"must name each GPU by|names a GPU twice"):
        parse_gpus(text)


def test_tests_keep_their_own_order() -> None:
    """And one that there is not is named, with those that there are."""
    assert (Part.matmul, Part.load) == parse_parts("load, matmul")
    with pytest.raises(
        ValueError, match=r"^no test is called burn: there are operations, allocation, matmul, memory, precision, load$"
    ):
        parse_parts("load,burn")


ENGINE = ProcessFacts(7, "VLLM::EngineCore", used_bytes={0: GIB // 2})
TRAINING = ProcessFacts(8, "python", "bob", used_bytes={0: GIB, 1: GIB})
DESKTOP = ProcessFacts(9, "Xorg", used_bytes={0: GIB // 4})


@pytest.mark.parametrize(
    ("gpus", "processes", "unseen", "instances", "expected"),
    [
        ([0], [], {}, {}, []),
        ([0], [DESKTOP], {0: GIB * 3 // 2}, {}, []),
        ([0], [ENGINE], {}, {}, ["VLLM::EngineCore (pid 7) holds 512 MiB of GPU 0"]),
        ([1], [ENGINE], {}, {}, []),
        ([0, 1], [TRAINING], {}, {}, ["python (pid 8) of bob holds 1.0 GiB of GPU 0, 1.0 GiB of GPU 1"]),
        ([0], [TRAINING], {}, {}, []),
        ([0], [], {0: 3 * GIB, 1: 3 * GIB}, {}, ["nobody that can be seen from here holds 3.0 GiB of GPU 0"]),
        ([0], [], {}, {"qwen": [0, 1], "llama": [2]}, ["the instance qwen runs on it"]),
        ([3], [], {}, {"cpu": []}, []),
    ],
)
def test_who_is_in_the_way(
    gpus: list[int], processes: list[ProcessFacts], unseen: dict[int, int], instances: dict[str, list[int]], expected: list[str]
) -> None:  # fmt: skip
    """Engines however small, others who hold more than a desktop, on the GPUs that are to be tested."""
    assert expected == occupants(gpus, processes, unseen, instances)
