"""`stress`: six hardware tests of GPUs, with progress, temperature and power, which stop before it gets too hot."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from llm_serve import picture
from llm_serve.cli import control
from llm_serve.core.devices import Device
from llm_serve.core.errors import HostError
from llm_serve.core.stress import TITLES, Part, Progress, Row, Sizes, occupants, parse_gpus, parse_parts
from llm_serve.core.telemetry import Reading
from llm_serve.host import gpu_gate
from llm_serve.host.doctor.gpus import build, process_facts
from llm_serve.host.nvml import Gpu, Gpus, open_gpus
from llm_serve.stress.measure import OnGpu, Plan, Report, measure
from llm_serve.stress.plot import write_png
from llm_serve.stress.report import as_text, warnings

_WRONG_USAGE, _TRY_AGAIN = 2, 75
_Wanted = TypeVar("_Wanted")


@dataclass(frozen=True, slots=True)
class Given:
    """The options of the command line, as they were given."""

    gpus: str
    tests: str
    seconds: float
    max_celsius: float | None
    beside: bool
    png: Path | None
    json_output: bool


def stress(given: Given) -> int:
    """Test and print. Returns 0, 2, 70 when a test failed, 75 without a GPU to use, or 130 when interrupted."""
    try:
        wanted = _asked("--gpus", parse_gpus, given.gpus) if given.gpus else None
        parts = _asked("--tests", parse_parts, given.tests) if given.tests else tuple(Part)
        picture.check(given.png)
    except ValueError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return _WRONG_USAGE
    gpus = open_gpus()
    try:
        used = _usable(gpus, wanted)
        if not given.beside:
            _check_alone(used)
        sizes = Sizes(load_s=given.seconds, is_shared=given.beside)
        report = asyncio.run(until_interrupted(gpus, used, Plan(parts, sizes, given.max_celsius)))
    except HostError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        gpus.close()
    return show(report, given)


def _asked(option: str, parse: Callable[[str], _Wanted], text: str) -> _Wanted:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


def _usable(gpus: Gpus, wanted: tuple[Device, ...] | None) -> list[Gpu]:
    """The GPUs to test. Raises HostError where they are not there, or torch cannot use them."""
    if gpus.reason:
        raise HostError(f"stress needs an NVIDIA GPU: {gpus.reason}")
    if build().is_for_cpu:
        raise HostError(
            "stress needs a torch that uses GPUs, and the one here is built for CPUs: make setup BACKEND=cuda"
        )
    there = gpus.devices()
    known = gpu_gate.by_name(there)
    if missing := [str(name) for name in wanted or () if name not in known]:
        shown = ", ".join(f"{gpu.index} {gpu.name}" for gpu in there) or "none"
        raise HostError(f"GPU {', '.join(missing)} is not there: the driver shows {shown}")
    if not there:
        raise HostError(f"stress needs an NVIDIA GPU: {'; '.join(gpus.problems())}")
    return list(there) if wanted is None else list(dict.fromkeys(known[name] for name in wanted))


def _check_alone(used: Iterable[Gpu]) -> None:
    """Raise HostError where somebody uses one of these GPUs."""
    processes, unseen = process_facts()
    found = occupants((gpu.index for gpu in used), processes, unseen, _instances())
    if found:
        raise HostError(f"a GPU is in use: {'; '.join(found)}. Stop that, choose others (--gpus), or test --beside it")


def _instances() -> Mapping[str, list[int]]:
    """Running instances, with the GPUs that they use."""
    answers = {name: control.ask(path, "/status") for name, path in control.find_all().items()}
    return {name: [gpu["index"] for gpu in now.get("gpus", ())] for name, now in answers.items() if now}


async def until_interrupted(gpus: Gpus, used: list[Gpu], plan: Plan) -> Report:
    """Test; Ctrl-C ends it with what there is, a second one at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    with _Screen() as screen:
        return await measure(gpus, used, plan, stop, screen)


class _Screen:
    """Progress on stderr: a bar for each GPU on a terminal, and everywhere a line for each test that has ended."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(15), TextColumn("{task.percentage:3.0f} %"))
        self._bars = Bars(*columns, TextColumn("{task.fields[said]}"), console=console, transient=True)
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars.console.is_terminal:
            self._bars.stop()

    def tell(self, on: OnGpu, progress: Progress | None, reading: Reading) -> None:
        """How far a GPU is."""
        task = self._tasks.get(on.gpu.index)
        if task is None:
            task = self._tasks[on.gpu.index] = self._bars.add_task("", total=1, said="")
        doing = TITLES[progress.found.part] if progress else "ends" if on.rows else "starts"
        self._bars.update(
            task,
            description=f"GPU {on.gpu.index} {doing:17}",
            completed=progress.share if progress else bool(on.rows),
            said=_said(progress, reading),
        )

    def over(self, on: OnGpu, row: Row) -> None:
        """A test has ended."""
        speeds = "".join(f", {name} {value:.1f} TFLOPS" for name, value in row.found.tflops.items())
        why = f": {row.reason}" if row.reason else ""
        line = f"GPU {on.gpu.index} {TITLES[row.found.part]:17} {row.verdict}{speeds}{why}"
        self._bars.console.print(line, markup=False, soft_wrap=True)


def _said(progress: Progress | None, reading: Reading) -> str:
    """What a sensor does not tell is left out."""
    found, speed = (progress.found, progress.tflops) if progress else (None, None)
    celsius, watts = reading.temperature_celsius, reading.power_watts
    words = (
        f"{found.errors} ERRORS" if found and found.errors else "",
        "" if celsius is None else f"{celsius:.0f} °C",
        "" if watts is None else f"{watts:.0f} W",
        "" if speed is None else f"{speed:.0f} TFLOPS" if speed >= 100 else f"{speed:.1f} TFLOPS",
        f"{found.allocated_bytes / 2**30:.1f} GiB" if found and found.allocated_bytes and not speed else "",
        "slowed" if reading.slowed_by else "",  # by what, says the report
    )
    return ", ".join(filter(None, words))


def show(report: Report, given: Given) -> int:
    """Print the report, and draw it where that is wanted."""
    if given.json_output:
        doubts = {on.gpu.index: list(warnings(on)) for on in report.on}
        print(json.dumps(report.to_json() | {"warnings": doubts}, indent=2))
    else:
        print(as_text(report))
    if given.png is not None and not picture.written(partial(write_png, report), given.png):
        return report.exit_status or _TRY_AGAIN
    return report.exit_status
