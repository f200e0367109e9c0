"""A load test as text: a line a step, what limits the server and what to try, and what to doubt in it."""

from __future__ import annotations

from collections.abc import Iterator

from llm_serve.bench.measure import Report
from llm_serve.core.figures import Figures, Spread
from llm_serve.core.terminal.table import figures, table

_COLUMNS = figures(
    "load", "requests/s", "tokens/s", "TTFT ms P50", "P99", "TPOT ms P50", "P99", "latency s P50", "P99",
    "answered", "errors",
)  # fmt: skip


def as_text(report: Report) -> str:
    """The report for people."""
    title = f"{report.model} at {report.url}: {what(report)}"
    lines = table(_COLUMNS, [_row(each.figures) for each in report.steps])
    return "\n".join([title, "", *lines, "", *_conclusion(report)])


def what(report: Report) -> str:
    """What was asked, in a few words."""
    plan = report.plan
    asked = f"prompts of a file ({len(plan.prompts)})" if plan.prompts else f"scenario {plan.scenario}"
    thinking = {None: "", True: ", thinking", False: ", not thinking"}[plan.asking.thinking]
    return asked + thinking + (", interrupted" if report.is_interrupted else "")


def _row(step: Figures) -> tuple[str, ...]:
    spreads = ((step.ttft_s, 1000, 0), (step.tpot_s, 1000, 1), (step.latency_s, 1, 2))
    times = [cell for spread, factor, digits in spreads for cell in _cells(spread, factor, digits)]
    rates = (_number(step.requests_per_s, 2), _number(step.tokens_per_s, 1))
    return step.load, *rates, *times, str(step.answered), str(sum(step.errors.values()))


def _cells(spread: Spread, factor: int, digits: int) -> Iterator[str]:
    for value in (spread.p50, spread.p99):
        yield _number(None if value is None else value * factor, digits)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _conclusion(report: Report) -> Iterator[str]:
    verdict = report.verdict
    if verdict is None:
        yield "Nothing was measured."
        return
    yield f"Limit at {report.steps[-1].figures.load}: {verdict.limit}"
    yield from (f"  {each}" for each in verdict.evidence)
    yield f"  {verdict.advice}"
    if verdict.not_known:
        yield f"  not told by the server: {'; '.join(verdict.not_known)}"
    yield from (f"error: {line}" for line in _errors(report))
    yield from (f"warning: {line}" for line in warnings(report))


def _errors(report: Report) -> Iterator[str]:
    for each in report.steps:
        yield from (f"{each.figures.load}: {count} x {kind}" for kind, count in each.figures.errors.items())


def warnings(report: Report) -> Iterator[str]:
    """What makes figures of this report doubtful."""
    for step in (each.figures for each in report.steps):
        if trouble := step.generator.trouble:
            yield f"{step.load}: {trouble}"
        if step.rate is not None and step.seconds > 1.1 * report.plan.seconds:
            after_s = step.seconds - report.plan.seconds
            yield f"{step.load}: the last answer came {after_s:.0f} s after the last request, and rates include that"
        if step.sent_late:
            yield f"{step.load}: {step.sent_late} requests were sent more than 10 ms after their time"
        if step.answered and step.tokens_per_s is None:
            yield f"{step.load}: the server does not count tokens (usage): tokens/s and TPOT are not known"
        if 0 < step.answered < 100:
            yield f"{step.load}: a P99 of {step.answered} requests is nearly their maximum: measure for longer"
    sent = sum(each.figures.answered for each in report.steps)
    if report.plan.prompts and sent > len(report.plan.prompts):
        yield "the prompts of the file were used several times: a cache of prefixes makes that faster than it would be"
