"""A whole stress test: a child for each GPU, its sensors watched meanwhile, and the stop when one gets too hot."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from llm_serve.core.stress import (
    Found,
    Part,
    Progress,
    Row,
    Sample,
    Sight,
    Sizes,
    Verdict,
    exit_status,
    judge,
    limit_celsius,
    not_run,
    too_hot,
)  # fmt: skip
from llm_serve.core.telemetry import Reading
from llm_serve.host.nvml import Gpu, Gpus
from llm_serve.host.telemetry import Telemetry

_SAMPLE_EVERY_S = 0.25
_GRACE_S = 0.5
"""What a child that is to stop has to say what it has found so far."""
_LATE_NEWS_S = 1.0
"""After an error, until the driver's own word of it is in a reading; one is up to two samples old."""
_LEAVE_S = 3.0
"""Between its last word and its end, in which the driver clears up."""
_FIRST_WORD_S, _SILENCE_S = 300.0, 90.0
"""From a child that loads torch, and from one at work."""
_BLIND_S = 5.0
"""How long a GPU may go on whose temperature was known and is not any more."""
_LAST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done on each GPU."""

    parts: tuple[Part, ...] = tuple(Part)
    sizes: Sizes = field(default_factory=Sizes)
    max_celsius: float | None = None
    device: str = "cuda:0"
    """The name that torch has for it in a child, which sees one GPU."""
    program: tuple[str, ...] = ("-m", "llm_serve.stress.child")


@dataclass(slots=True)
class OnGpu:
    """What was found on one GPU so far. `heat` is why it was stopped, where that was for its temperature."""

    gpu: Gpu
    limit_celsius: float
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    heat: str = ""

    def to_json(self) -> dict[str, Any]:
        """One of "gpus" in `--json`."""
        gpu = {"index": self.gpu.index, "uuid": self.gpu.uuid, "name": self.gpu.name}
        return gpu | {
            "limit_celsius": self.limit_celsius,
            "heat": self.heat,
            "tests": [row.to_json() for row in self.rows],
            "samples": [asdict(sample) for sample in self.samples],
        }


@dataclass(slots=True)
class Report:
    """A stress test. `started` is a Unix time."""

    started: float
    on: list[OnGpu]
    seconds: float = 0.0
    is_interrupted: bool = False

    @property
    def verdicts(self) -> list[Verdict]:
        """Of all tests on all GPUs."""
        return [row.verdict for on in self.on for row in on.rows]

    @property
    def exit_status(self) -> int:
        """Of the command."""
        return exit_status(self.verdicts, is_interrupted=self.is_interrupted)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "started": self.started,
            "seconds": round(self.seconds, 1),
            "is_interrupted": self.is_interrupted,
            "exit_status": self.exit_status,
            "gpus": [on.to_json() for on in self.on],
        }


class Screen(Protocol):
    """Where progress is shown."""

    def tell(self, on: OnGpu, progress: Progress | None, reading: Reading) -> None:
        """How far a GPU is, some times a second."""

    def over(self, on: OnGpu, row: Row) -> None:
        """A test has ended."""


async def measure(gpus: Gpus, used: Sequence[Gpu], plan: Plan, stop: asyncio.Event, screen: Screen) -> Report:
    """Test all of these GPUs at the same time, until they are through, too hot, or `stop` is set."""
    began, report = time.monotonic(), Report(time.time(), [])
    telemetry = Telemetry(gpus, used, every_s=_SAMPLE_EVERY_S)
    telemetry.start()
    limits = await asyncio.to_thread(
        lambda: [limit_celsius(plan.max_celsius, gpus.slowdown_celsius(gpu)) for gpu in used]
    )
    report.on = [OnGpu(gpu, limit) for gpu, limit in zip(used, limits, strict=True)]
    runners = [_Runner(on, plan, screen, began) for on in report.on]
    try:
        # A group, because nothing may go on while nobody watches the temperature.
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_watch(telemetry, runners, stop))
            await asyncio.gather(*(group.create_task(runner.run()) for runner in runners))
            watch.cancel()
    finally:
        telemetry.close()
    report.seconds, report.is_interrupted = time.monotonic() - began, stop.is_set()
    return report


async def _watch(telemetry: Telemetry, runners: Sequence[_Runner], stop: asyncio.Event) -> None:
    while True:
        for runner, reading in zip(runners, telemetry.readings(), strict=False):
            runner.hear(reading)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _SAMPLE_EVERY_S)
            for runner in runners:
                runner.end("interrupted")
            await asyncio.sleep(_SAMPLE_EVERY_S)


class _Runner:
    """The tests of one GPU: a child does them, and another one what is left when that has died."""

    def __init__(self, on: OnGpu, plan: Plan, screen: Screen, began: float) -> None:
        self._on, self._plan, self._screen, self._began = on, plan, screen, began
        self._reading = self._before = Reading(on.gpu.index, on.gpu.uuid, on.gpu.name)
        self._progress: Progress | None = None
        self._why_ended = ""
        self._seen_s: float | None = None
        self._is_to_end = asyncio.Event()

    def hear(self, reading: Reading) -> None:
        """Note what the sensors say, and stop a GPU that is too hot."""
        self._reading = reading
        self._sample()
        self._screen.tell(self._on, self._progress, reading)
        now_s = time.monotonic()
        if reading.temperature_celsius is not None:
            self._seen_s = now_s
        is_blind = self._seen_s is not None and now_s - self._seen_s >= _BLIND_S
        words = "stopped: its temperature is not told any more" if is_blind else ""
        words = words or too_hot(reading, self._on.limit_celsius)
        if words and self._progress and not self._on.heat:
            self._on.heat = words
            self.end(words)

    def end(self, why: str) -> None:
        """Stop with what there is."""
        self._why_ended = self._why_ended or why
        self._is_to_end.set()

    async def run(self) -> None:
        """All parts."""
        left = self._plan.parts
        while left and not self._is_to_end.is_set():
            await self._live(left)
            done = len(self._on.rows)
            left = self._plan.parts[done:]
        self._on.rows += [not_run(part, self._why_ended) for part in left]

    async def _live(self, parts: tuple[Part, ...]) -> None:
        """The life of a child. The part that it dies in has failed of that."""
        done = len(self._on.rows)
        with tempfile.TemporaryFile() as output:
            child = await asyncio.create_subprocess_exec(
                sys.executable, *self._plan.program, env=self._environment(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=output,
                start_new_session=True,  # Ctrl-C is for the command, which lets the child end in order
            )  # fmt: skip
            ending = asyncio.create_task(self._end_in_time(child))
            try:
                fault = await self._listen(child, parts)
                ending.cancel()
                is_ordered = self._is_to_end.is_set() and not fault
                code = await _ended(child, _GRACE_S if self._is_to_end.is_set() else _LEAVE_S)
            finally:
                ending.cancel()
                _kill(child)
            fault = fault or f"its process ended with {_status(code)}{_said(output)}"
        if self._progress is not None:
            found = self._progress.found
            await self._over(replace(found, is_cut=True) if is_ordered else replace(found, error=fault))
        elif not is_ordered and len(self._on.rows) == done:
            await self._over(Found(parts[0], error=fault))
            self.end("no process for it says a word")  # nor would the next one

    async def _listen(self, child: asyncio.subprocess.Process, parts: tuple[Part, ...]) -> str:
        """Take what it tells until it ends. Returns what is wrong where it does not."""
        assert child.stdin
        assert child.stdout
        job = {"device": self._plan.device, "parts": parts, "sizes": asdict(self._plan.sizes)}
        patience_s = _FIRST_WORD_S
        with contextlib.suppress(ConnectionError):  # it is gone already, and its output says why
            child.stdin.write(json.dumps(job).encode() + b"\n")
            await child.stdin.drain()
        try:
            while line := await asyncio.wait_for(child.stdout.readline(), patience_s):
                patience_s = _SILENCE_S
                await self._take(Progress.from_json(json.loads(line)))
        except TimeoutError:
            # A GPU that hangs would do so again in the next child.
            self.end(f"no word for {patience_s:.0f} s")
            return f"the GPU did not answer for {patience_s:.0f} s"
        return ""

    async def _end_in_time(self, child: asyncio.subprocess.Process) -> None:
        await self._is_to_end.wait()
        assert child.stdin
        child.stdin.close()
        await asyncio.sleep(_GRACE_S)
        _kill(child)

    async def _take(self, progress: Progress) -> None:
        if self._progress is None:
            self._before = self._reading
        self._progress = progress
        if progress.is_over:
            await self._over(progress.found)

    async def _over(self, found: Found) -> None:
        if found.error:
            await asyncio.sleep(_LATE_NEWS_S)
        self._sample()
        seen = [sample for sample in self._on.samples if sample.part == found.part]
        row = judge(found, Sight.of(seen, self._before, self._reading), self._on.heat)
        self._progress = None
        self._on.rows.append(row)
        self._screen.over(self._on, row)

    def _sample(self) -> None:
        found = self._progress.found if self._progress else None
        self._on.samples.append(
            Sample(
                at_s=round(time.monotonic() - self._began, 3),
                part=found.part if found else None,
                celsius=self._reading.temperature_celsius,
                watts=self._reading.power_watts,
                tflops=self._progress.tflops if self._progress else None,
                slowed_by=self._reading.slowed_by,
            )
        )

    def _environment(self) -> dict[str, str]:
        """The child sees this GPU alone, by a name that does not depend on an order."""
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": self._on.gpu.uuid}


async def _ended(child: asyncio.subprocess.Process, patience_s: float) -> int | None:
    """Its status. It is killed when it takes longer to leave; None when not even that ends it."""
    for patience in (patience_s, _LEAVE_S):
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(child.wait(), patience)
        _kill(child)
    return None


def _kill(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        if child.returncode is None:
            child.kill()


def _status(code: int | None) -> str:
    if code is None:
        return "nothing, not even SIGKILL: the driver keeps it"
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _said(output: IO[bytes]) -> str:
    """The last line that it wrote, for the report."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 4096))
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:_LAST_WORDS]}" if lines else ""
