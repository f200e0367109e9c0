"""`doctor`: looks at the machine, and at what an instance asks of it; each finding with its remedy.

Nothing is changed: what it needs to try, it tries in files that go with it and in processes that it ends. Kernels that
a trial compiles stay in this user's caches.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import partial

from llm_serve.core.doctor import attention as attention_findings
from llm_serve.core.doctor import instance as judge
from llm_serve.core.doctor.findings import Finding, State, exit_status, gib, good, not_known, problem
from llm_serve.core.doctor.limits import judge_place
from llm_serve.core.errors import ConfigError
from llm_serve.core.settings import Settings
from llm_serve.host.doctor import checks, instance, limits
from llm_serve.host.doctor.checks import Check
from llm_serve.host.doctor.gpus import build
from llm_serve.host.instances import read_instance
from llm_serve.host.names import CONFIG_DIRECTORY, instance_names

_WIDTH = 110
_MARKS = {State.good: "good", State.note: "NOTE", State.problem: "PROBLEM", State.not_known: "not known"}


def doctor(target: str | None, *, trials: bool | None, timeout_s: float, json_output: bool) -> int:
    """Print every finding. Returns 0, 75 where there is a problem, or 78 where the instance's file is refused."""
    settings, refusals = None, []
    if target is not None:
        try:
            settings, _ = read_instance(target)
        except ConfigError as error:
            refusals = [_refused(str(each)) for each in error.problems]
    sections = [("Instance", refusals)] if refusals else []
    sections += checks.run(list(_checks(settings, trials=trials, timeout_s=timeout_s)))
    findings = [finding for _, found in sections for finding in found]
    status = exit_status(findings, is_file_refused=bool(refusals))
    if json_output:
        print(json.dumps(_as_json(findings, status), indent=2))
    else:
        print("\n".join(_as_text(sections)))
    sys.stdout.flush()
    return status


def _refused(message: str) -> Finding:
    return problem(
        "instance.file", message, "The instance does not start (exit 78).", "Correct the file; llm-serve check NAME"
    )


def _checks(settings: Settings | None, *, trials: bool | None, timeout_s: float) -> Iterator[Check]:
    machine = checks.of_machine(os.environ)
    # The longest first, so that the others go on beside it.
    if trials is False:
        yield Check("attention", "Attention backends", _not_tried)
    else:
        yield _attention(settings, timeout_s, is_forced=bool(trials))
    if settings is not None:
        yield Check("instance", f"Instance {settings.name}", partial(_instance, settings))
        yield from (check for check in machine if check.name != "disk")
    else:
        yield Check("port", "Ports", _ports)
        yield from machine


def _attention(settings: Settings | None, timeout_s: float, *, is_forced: bool) -> Check:
    from llm_serve.engine import attention

    question = attention.question(settings, timeout_s=timeout_s)

    def look() -> Iterator[Finding]:
        if busy := "" if is_forced else _busy_gpu(settings):
            means = "Trials take up to 4 GiB, which an engine there may be about to need."
            yield not_known(
                "attention", f"no backend was tried: {busy}", means, "llm-serve doctor --trials tries all the same"
            )
            return
        yield from attention_findings.judge(attention.ask(question))

    return Check("attention", "Attention backends, tried", look, question.total_s + checks.LOOK_TIMEOUT_S)


def _busy_gpu(settings: Settings | None) -> str:
    """Why the GPU on which backends would be tried should be left alone; empty where it need not."""
    rooms = instance.gpu_rooms()
    devices = instance.wish(settings).devices if settings else None
    index = (devices or sorted(rooms) or (0,))[0]
    room = rooms.get(index) if isinstance(index, int) else None
    if room is None or not attention_findings.in_use(room.total_bytes - room.free_bytes, room.free_bytes):
        return ""
    return f"{gib(room.free_bytes)} of {gib(room.total_bytes)} are free on GPU {index}"


def _not_tried() -> list[Finding]:
    return [not_known("attention", "no backend was tried, as asked (--no-trials)")]


def _ports() -> Iterator[Finding]:
    """Every instance that has a file; where there is none, the address that one would have by default."""
    names = instance_names()
    if CONFIG_DIRECTORY.exists() and not os.access(CONFIG_DIRECTORY, os.R_OK | os.X_OK):
        yield not_known("port", f"{CONFIG_DIRECTORY} cannot be read by this user", cure="sudo llm-serve doctor")
        return
    for name in names:
        try:
            settings, _ = read_instance(name)
        except ConfigError as error:
            yield from (_refused(str(each)) for each in error.problems)
            continue
        yield from judge.judge_port(instance.port(settings, is_running=_is_running(name)), f"port.{name}")
    if not names:
        settings = Settings(name="none", source="", model="none")
        yield from judge.judge_port(instance.port(settings, is_running=False))


def _is_running(name: str) -> bool:
    from llm_serve.cli import control

    return (path := control.find(name)) is not None and instance.listens(path)


def _instance(settings: Settings) -> Iterator[Finding]:
    from llm_serve.engine.weights import check_tokenizer, check_weights

    is_running = _is_running(settings.name)
    yield good("instance.file", f"{settings.source} can be read; llm-serve check asks vLLM about the rest")
    yield from judge.judge_port(instance.port(settings, is_running=is_running), "instance.port")
    problems: list[str] = []
    for step in (check_weights, check_tokenizer):
        try:
            step(settings.model)
        except ConfigError as error:
            problems += [each.message for each in error.problems]
    model = instance.model(settings, tuple(problems), os.environ)
    yield from judge.judge_model(model)
    gpus, is_for_gpu = instance.gpu_rooms(), not build().is_for_cpu
    if is_for_gpu or settings.gpu.devices is not None:
        yield from judge.judge_gpus(instance.wish(settings), gpus, is_running=is_running)
    memory = instance.memory(settings, model.weight_bytes, gpus, is_for_gpu=is_for_gpu)
    yield from judge.judge_memory(memory, is_running=is_running)
    for place in instance.places(settings, os.environ):
        yield from judge_place(place, instance.service_user(settings) or limits.user_name())


def _as_json(findings: Iterable[Finding], status: int) -> dict[str, object]:
    found = list(findings)
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": limits.user_name(),
        "is_root": not os.geteuid(),
        "exit_status": status,
        "counts": {state.value: sum(each.state is state for each in found) for state in State},
        "findings": [finding.to_json() for finding in found],
    }


def _as_text(sections: Iterable[tuple[str, list[Finding]]]) -> Iterator[str]:
    count = dict.fromkeys(State, 0)
    for title, findings in sections:
        if findings:
            yield title
        for finding in findings:
            count[finding.state] += 1
            yield from _lines(finding)
    if os.geteuid():
        more = "root also sees the processes of others, the kernel's log and the service's folders"
        yield f"Asked as {limits.user_name()}: {more}."
    yield ", ".join(f"{number} {state.value}" for state, number in count.items())


def _lines(finding: Finding) -> Iterator[str]:
    words = f"{finding.check}: {finding.found}"
    yield from textwrap.wrap(words, _WIDTH, initial_indent=f"  {_MARKS[finding.state]:9}  ", subsequent_indent=" " * 13)
    for label, text in (("means", finding.means), ("cure", finding.cure)):
        # A command must stay on one line: else it cannot be copied.
        lines = textwrap.wrap(text, _WIDTH - 20, break_long_words=False) if label == "means" else [text] if text else []
        for number, line in enumerate(lines):
            yield f"{'':13}{label + ':' if not number else '':6} {line}"
