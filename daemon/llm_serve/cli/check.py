"""`llm-serve check NAME|FILE`: judges everything that can be known without loading weights.

It needs no GPU and no network, so that a file can be checked on the machine where it is written. What could
not be judged here is said in a note, never passed over.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from llm_serve.core import spread
from llm_serve.core.budgets import budgets
from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.core.instance_file import check_exposure
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import TABLES, Settings
from llm_serve.host.cpus import keep_to_a_free_one
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.host.names import CONFIG_DIRECTORY
from llm_serve.host.nvml import open_gpus

CREDENTIAL_STORES = ("/etc/credstore", "/etc/credstore.encrypted", "/run/credstore")


@dataclass(slots=True)
class Verdict:
    """What a check of a sound file has found out."""

    settings: Settings
    plan: EnginePlan
    effective: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the verdict as `--json` prints it."""
        tables = self.settings.model_dump(include=set(TABLES))
        return {
            "instance": self.settings.name,
            "file": self.settings.source,
            **tables,
            "plan": self.plan.to_json(),
            "effective": self.effective,
            "budgets": list(budgets(self.settings)),
            "notes": self.notes,
        }


def check(target: str, json_output: bool) -> int:
    """Print the effective plan and return 0, or print every problem to stderr and return 78."""
    prepare_for_vllm()
    try:
        verdict = examine(target)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    answer = json.dumps(verdict.to_json(), indent=2, default=str) if json_output else as_text(verdict)
    print(answer)
    return 0


def prepare_for_vllm() -> None:
    """Set what vLLM and torch look at when they are imported, for a command that runs beside engines that serve."""
    # vLLM logs to stdout, which belongs to the answer.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    keep_to_a_free_one()


def examine(target: str) -> Verdict:
    """Return what is known of a sound file, or raise ConfigError with all its problems."""
    settings, text = read_instance(target)
    problems: list[Problem] = []
    verdict = Verdict(settings, EnginePlan.from_settings(settings))
    verdict.notes += [*_gpus_out_of_sight(settings), *spread.notes(settings)]
    for step in (_examine_keys, examine_engine):
        try:
            step(verdict, text)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return verdict


def _examine_keys(verdict: Verdict, text: str) -> None:
    settings = verdict.settings
    unseen = _keys_out_of_sight(settings)
    if unseen is not None:
        verdict.notes.append(unseen)
        return
    problem = check_exposure(settings, bool(read_api_keys(settings)), text)
    if problem is not None:
        raise ConfigError([problem])


def _keys_out_of_sight(settings: Settings) -> str | None:
    """Return why the keys cannot be judged from here although the service may well have them."""
    path = settings.server.api_keys
    if path is None:
        stores = [Path(store, f"llm-serve.{settings.name}.api-keys") for store in CREDENTIAL_STORES]
        found = [store for store in stores if store.exists()]
        return f"{found[0]} is the service's credential: its keys were not checked" if found else None
    if not Path(path).exists():
        # A file that is only being written here; where it is installed, its keys have to be there.
        is_installed = Path(settings.source).parent == CONFIG_DIRECTORY
        return None if is_installed else f"{path} is not on this machine: its keys were not checked"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read by this user: its keys were not checked"
    return None


def _gpus_out_of_sight(settings: Settings) -> list[str]:
    """Return why the GPUs that the file names cannot be judged from here."""
    if settings.gpu.devices is None:
        return []
    gpus = open_gpus()
    here = {gpu.index for gpu in gpus.devices()}
    gpus.close()
    absent = [str(index) for index in settings.gpu.devices if index not in here]
    if not absent:
        return []
    return [f"GPUs {', '.join(absent)} are not on this machine: whether the plan fits on them was not checked"]


def examine_engine(verdict: Verdict, text: str) -> None:
    """Let vLLM judge the plan. Raises ConfigError with what it says."""
    from llm_serve.engine.forkserver import environment

    # As in a start: some variables of vLLM's and the hub's decide what is valid.
    with environment(verdict.plan.env):
        _examine_arguments(verdict, text)


def _examine_arguments(verdict: Verdict, text: str) -> None:
    # Imports vLLM: seconds that a file with a wrong key should not take.
    from llm_serve.engine.absent_gpus import COMMON, pretend_if_none_is_seen

    if pretend_if_none_is_seen():  # before anything else of vLLM is imported
        verdict.notes.append(f"vLLM sees no GPU here: what it chooses by the GPU is shown as for one of {COMMON}")
    from llm_serve.engine import arguments, attach, weight_cache
    from llm_serve.engine.weights import looks_like_path

    settings, source = verdict.settings, verdict.settings.source
    namespace = arguments.parse_plan(verdict.plan, source=source, text=text)
    verdict.effective = arguments.effective_arguments(namespace)
    if not looks_like_path(settings.model) and not arguments.model_is_at_hand(settings.model):
        verdict.notes.append(f"{settings.model} is not on this machine: its own limits were not checked")
        return
    try:
        _, config = arguments.engine_config(namespace, source=source, text=text)
    except HostError as error:
        verdict.notes.append(f"{error}: the model's own limits were not checked")
    else:
        verdict.effective = arguments.effective_arguments(namespace, config)
        if settings.server.front_ends > 1:
            attach.check(config, source)
        if settings.recovery.keep_weights and (why := weight_cache.obstacle(config)):
            verdict.notes.append(f"recovery.keep_weights has no effect: {why}")
    arguments.check_model(namespace, source=source, text=text)


def as_text(verdict: Verdict) -> str:
    """Return the verdict for people: one option a line, aligned."""
    settings = verdict.settings
    tables = {name: getattr(settings, name).model_dump() for name in TABLES}
    tables |= {"engine": verdict.effective, "engine.env": verdict.plan.to_json()["env"]}
    lines = [f"{settings.source}: good", f"model  {settings.model}"]
    for title, options in tables.items():
        lines += _aligned(title, options)
    lines += ["", "In the worst case", *(f"  {sentence}" for sentence in budgets(settings))]
    lines += ["", *(f"note: {note}" for note in verdict.notes)] if verdict.notes else []
    return "\n".join(lines)


def _aligned(title: str, options: object) -> list[str]:
    if not isinstance(options, dict) or not options:
        return []
    width = max(map(len, options))
    return ["", f"[{title}]", *(f"  {name:<{width}}  {_shown(value)}" for name, value in options.items())]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
