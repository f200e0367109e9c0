"""`bench`: a load test of any OpenAI-compatible server, and what limits it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_serve import picture
from llm_serve.bench.client import Asking, Server
from llm_serve.bench.load import Tally
from llm_serve.bench.measure import Plan, Report, measure
from llm_serve.bench.plot import write_png
from llm_serve.bench.report import as_text, warnings
from llm_serve.bench.server import find
from llm_serve.core.errors import ConfigError, LlmServeError, Problem
from llm_serve.core.workload import DEFAULT_TOKENS, SCENARIOS, Ask, Step, from_file
from llm_serve.host import open_files

_WRONG_USAGE, _TRY_AGAIN = 2, 75


@dataclass(frozen=True, slots=True)
class Given:
    """The options of the command line, as they were given."""

    target: str
    scenario: str
    prompts: Path | None
    tokens: int | None
    streams: str
    rates: str
    constant: bool
    seconds: float
    requests: int | None
    warm_up: int
    thinking: bool | None
    ignore_eos: bool
    completions: bool
    model: str | None
    timeout_s: float
    seed: int
    json_output: bool
    png: Path | None


def bench(given: Given) -> int:
    """Measure and print. Returns 0, 2, 78, or 75 when there was no answer at all."""
    try:
        plan = _plan(given)
    except ValueError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return _WRONG_USAGE
    except LlmServeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    try:
        server = find(given.target, os.environ)
        report = asyncio.run(_until_interrupted(server, plan))
    except LlmServeError as error:
        print(f"llm-serve: {error}", file=sys.stderr)
        return error.exit_status
    return _print(report, given)


def _plan(given: Given) -> Plan:
    """What is to be done. Raises ValueError for wrong usage, ConfigError for a wrong file of prompts."""
    if given.scenario not in SCENARIOS:
        raise ValueError(f"--scenario {given.scenario}: there are {', '.join(SCENARIOS)}")
    if given.streams and given.rates:
        raise ValueError("--streams and --rates are two different tests: give one of them")
    if given.rates and given.requests is not None:
        raise ValueError("--requests belongs to --streams: a rate lasts --seconds")
    picture.check(given.png)
    streams = (Step(streams=int(each)) for each in _numbers("--streams", given.streams, is_whole=True))
    rates = (Step(rate=each) for each in _numbers("--rates", given.rates, is_whole=False))
    return Plan(
        scenario=given.scenario,
        prompts=_prompts(given),
        steps=(*streams, *rates),
        seconds=given.seconds,
        requests=given.requests,
        warm_up=given.warm_up,
        is_even=given.constant,
        seed=given.seed,
        timeout_s=given.timeout_s,
        model=given.model,
        asking=Asking("", completions=given.completions, ignore_eos=given.ignore_eos, thinking=given.thinking),
    )


def _numbers(option: str, text: str, *, is_whole: bool) -> tuple[float, ...]:
    """The numbers of a list like 1,8,64, from little load to much."""
    try:
        values = tuple(float(int(each)) if is_whole else float(each) for each in text.split(",")) if text else ()
    except ValueError:
        values = (0.0,)
    if not all(0 < value <= 1e6 for value in values):
        raise ValueError(f"{option} {text}: must be numbers above 0 like 1,8,64")
    return tuple(sorted(values))


def _prompts(given: Given) -> tuple[Ask, ...]:
    if given.prompts is None:
        if given.tokens is not None:
            raise ValueError("--tokens belongs to --prompts: a scenario has lengths of its own")
        return ()
    try:
        text = given.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError([Problem(str(given.prompts), None, "", f"cannot be read: {words}")]) from error
    return from_file(text, str(given.prompts), given.tokens or DEFAULT_TOKENS)


async def _until_interrupted(server: Server, plan: Plan) -> Report:
    """Measure; Ctrl-C ends it with what there is, a second one at once."""
    open_files.allow(max((4096, *(2 * (step.streams or 0) for step in plan.steps))))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    loop.add_signal_handler(signal.SIGINT, interrupted)
    return await measure(server, plan, stop, _Screen().tell)


class _Screen:
    """Progress on stderr: one line that changes on a terminal, one line a step elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._tally: Tally | None = None

    def tell(self, what: str, tally: Tally | None) -> None:
        """Say how far `what` is; without a tally, that it is over."""
        self._tally = tally or self._tally
        if self._tally is None or not (self._is_terminal or tally is None):
            return
        failed = sum(sample.error is not None for sample in self._tally.samples)
        answered = len(self._tally.samples) - failed
        line = f"{what}: {answered} answered, {failed} failed, {self._tally.running} running"
        ends = "\n" if tally is None else ""
        print(f"\r{line:78}{ends}" if self._is_terminal else line, end=ends, file=sys.stderr, flush=True)


def _print(report: Report, given: Given) -> int:
    if given.json_output:
        print(json.dumps(report.to_json() | {"warnings": list(warnings(report))}, indent=2))
    else:
        print(as_text(report))
    if given.png is not None and report.steps and not picture.written(partial(write_png, report), given.png):
        return _TRY_AGAIN
    return 0 if any(each.figures.answered for each in report.steps) else _TRY_AGAIN
