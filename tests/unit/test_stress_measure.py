"""A stress test from the parent's side: children that die, hang or do not stop, sensors that rise, errors that are counted.

No GPU is here: NVIDIA's library is a stand-in, and so are most children, since a real one cannot be made to die on cue.
Real children are run by test_cli_stress.py.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_serve.core.stress import Part, Progress, Row, Sizes
from llm_serve.core.telemetry import Reading
from llm_serve.stress import measure as module
from llm_serve.stress.measure import OnGpu, Plan, Report, measure
from llm_serve.stress.plot import write_png
from llm_serve.stress.report import as_text
from tests.patience import patient
from tests.stress_machine import Sensors

THREE = (Part.operations, Part.matmul, Part.load)

_CHILD = """
import json, os, resource, signal, sys, time
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
job = json.loads(sys.stdin.readline())

def tell(part, share, **found):
    print(json.dumps({"share": share, "tflops": 9.5, "is_over": share == 1, "found": {
        "part": part, "seconds": 0.1, "iterations": 7, "errors": 0, "tflops": {"fp16": 9.5}, "allocated_bytes": 1,
        "notes": [], "error": "", "is_cut": False} | found}), flush=True)

def in_matmul():
    %s

for part in job["parts"]:
    tell(part, 0.5)
    if part == "matmul":
        in_matmul()
    tell(part, 1)
"""


@pytest.fixture(autouse=True)
def _no_late_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has no word that comes late."""
    monkeypatch.setattr(module, "_LATE_NEWS_S", 0.05)


class Screen:
    """Remembers what it was to show."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.rows: list[Row] = []

    def tell(self, on: OnGpu, progress: Progress | None, reading: Reading) -> None:
        """Some times a second."""
        self.shares += [progress.share] if progress else []

    def over(self, on: OnGpu, row: Row) -> None:
        """A test has ended."""
        self.rows.append(row)


def run(
    in_matmul: str = "pass",
    sensors: Sensors | None = None,
    *,
    code: str = _CHILD,
    max_celsius: float | None = None,
    interrupted_after_s: float | None = None,
    screen: Screen | None = None,
) -> Report:
    """A test of three parts, of which the second is this."""
    sensors = sensors or Sensors()
    program = code % in_matmul if "%s" in code else code
    plan = Plan(THREE, Sizes(), max_celsius, program=("-c", program))

    async def whole() -> Report:
        stop = asyncio.Event()
        if interrupted_after_s is not None:
            asyncio.get_running_loop().call_later(interrupted_after_s, stop.set)
        return await measure(sensors, sensors.devices(), plan, stop, screen or Screen())

    return asyncio.run(whole())


def verdicts(report: Report) -> list[str]:
    """Of the first GPU."""
    return [row.verdict for row in report.on[0].rows]


def test_all_parts_of_all_gpus_are_run_at_the_same_time() -> None:
    """Each row has its figures, and the sensors' range in its time."""
    screen = Screen()
    report = run("time.sleep(0.6)", Sensors(2), screen=screen)

    assert [["passed"] * 3] * 2 == [[row.verdict for row in on.rows] for on in report.on]
    assert 6 == len(screen.rows)
    assert 0.5 in screen.shares
    rows = [on.rows[1] for on in report.on]
    assert [(40.0, 200.0), (41.0, 205.0)] == [(row.sight.celsius.most, row.sight.watts.most) for row in rows]
    assert report.seconds < patient(1.8)
    assert {9.5} == {sample.tflops for sample in report.on[0].samples if sample.part is Part.matmul}
    assert 0 == report.exit_status


def test_a_child_that_dies_costs_one_test() -> None:
    """The signal and its last words are the reason; another child does what is left."""
    report = run("print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)")

    assert ["passed", "failed", "passed"] == verdicts(report)
    row = report.on[0].rows[1]
    assert "its process ended with SIGSEGV: last words" == row.reason
    assert (7, {"fp16": 9.5}) == (row.found.iterations, row.found.tflops)
    assert 70 == report.exit_status


def test_a_child_that_ends_with_a_status_says_it() -> None:
    """As after an exception that nobody catches."""
    assert "its process ended with status 3" == run("os._exit(3)").on[0].rows[1].reason


def test_a_child_that_never_says_a_word_is_tried_once() -> None:
    """Torch that cannot be loaded cannot be loaded six times."""
    report = run(code="import no_such_module")

    assert ["failed", "not run", "not run"] == verdicts(report)
    assert "status 1: ModuleNotFoundError: No module named 'no_such_module'" in report.on[0].rows[0].reason
    assert "no process for it says a word" == report.on[0].rows[1].reason


def test_a_gpu_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is asked of it."""
    monkeypatch.setattr(module, "_SILENCE_S", 0.4)

    report = run("time.sleep(60)")

    assert ["passed", "failed", "not run"] == verdicts(report)
    assert report.on[0].rows[1].reason.startswith("the GPU did not answer for")
    assert report.seconds < patient(5)


@pytest.mark.parametrize(
    "in_matmul",
    [
        "sys.stdin.read(); tell('matmul', 1, is_cut=True, iterations=8); sys.exit()",
        "time.sleep(60)",
    ],
    ids=["it stops", "it does not"],
)
def test_an_interrupted_test_ends_within_a_second(in_matmul: str) -> None:
    """What has run is in the report, with the figures of the one that was running."""
    began = time.monotonic()
    report = run(in_matmul, interrupted_after_s=1.0)
    seconds = time.monotonic() - began

    assert ["passed", "stopped", "not run"] == verdicts(report)
    assert report.on[0].rows[1].found.iterations in (7, 8)
    assert (True, 130) == (report.is_interrupted, report.exit_status)
    assert seconds < patient(2.0)


def test_a_gpu_that_gets_too_hot_is_stopped() -> None:
    """At the limit, with what it was; the other one, which is cooler, goes on."""
    sensors = Sensors(heating=20.0)
    report = run("sys.stdin.read(); tell('matmul', 1, is_cut=True); sys.exit()", sensors, max_celsius=60)

    row = report.on[0].rows[1]
    assert ["passed", "failed", "not run"] == verdicts(report)
    assert re.fullmatch(r"stopped at \d+ °C, the limit is 60", row.reason)
    assert row.reason.endswith("°C, the limit is 60")
    assert row.reason == report.on[0].rows[2].reason
    assert (70, False) == (report.exit_status, report.is_interrupted)
    assert report.seconds < patient(5)


def test_a_gpu_whose_temperature_is_lost_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that never told it: see below."""
    monkeypatch.setattr(module, "_BLIND_S", 0.5)
    sensors, screen = Sensors(), Screen()
    told = screen.tell

    def tell(on: OnGpu, progress: Progress | None, reading: Reading) -> None:
        told(on, progress, reading)
        sensors.news = {"temperature_celsius": None}

    screen.tell = tell  # type: ignore[method-assign]

    report = run("time.sleep(60)", sensors, screen=screen)

    assert ["passed", "failed", "not run"] == verdicts(report)
    assert "stopped: its temperature is not told any more" == report.on[0].rows[1].reason


def test_the_limit_is_a_little_below_the_devices_own() -> None:
    """Where it tells one."""
    assert 85 == run(sensors=Sensors(slowdown=88)).on[0].limit_celsius
    assert 90 == run().on[0].limit_celsius


def test_errors_that_the_driver_counts_are_in_the_verdict() -> None:
    """An Xid and ECC errors that come while a test runs; the next one has none of them."""
    sensors = Sensors()
    sensors.news = {"ecc_errors": {"uncorrected": 5}}
    screen = Screen()
    told: Callable[..., None] = screen.tell

    def tell(on: OnGpu, progress: Progress | None, reading: Reading) -> None:
        told(on, progress, reading)
        if progress and progress.found.part is Part.matmul:
            sensors.news = {"ecc_errors": {"uncorrected": 6}, "xids": {"48": 1}}

    screen.tell = tell  # type: ignore[method-assign]
    report = run("time.sleep(0.9)", sensors, screen=screen)

    assert ["passed", "failed", "passed"] == verdicts(report)
    assert "Xid 48; 1 uncorrected ECC error" == report.on[0].rows[1].reason


def test_a_screen_that_fails_leaves_no_child_unwatched() -> None:
    """Nothing may go on while nobody looks at the temperature."""
    screen: Any = Screen()
    screen.tell = None
    began = time.monotonic()

    with pytest.raises(ExceptionGroup):
        run("time.sleep(60)", screen=screen)

    assert time.monotonic() - began < patient(5)


def test_a_report_of_sensors_that_say_nothing(tmp_path: Path) -> None:
    """It says so, and can be drawn."""
    sensors = Sensors()
    sensors.news = {"temperature_celsius": None, "power_watts": None}

    report = run(sensors=sensors)
    write_png(report, tmp_path / "a.png")

    assert "warning: its temperature is not known: heat would not have stopped it" in as_text(report)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
