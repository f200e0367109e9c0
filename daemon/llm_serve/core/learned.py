"""What the ladder learned, as plain values that outlive the process, and which of it still holds later.

A smaller plan answers one file, model, vLLM and machine. A fallback is a fact about the machine and vLLM's version,
whatever the file says. The plan that the file asks for is not kept, only its fingerprint: it may hold secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from llm_serve.core.course import Course, Step
from llm_serve.core.evidence import Kind, Place
from llm_serve.core.plan import EnginePlan

FORMAT = 1
"""Of the values; another number means other rules, so what carries it is not read."""

_CHOICE = {
    "attention_backend": "attention_config",
    "enable_flashinfer_autotune": "kernel_config",
    "enforce_eager": "compilation_config",
    "optimization_level": "compilation_config",
    "cudagraph_capture_sizes": "compilation_config",
    "max_cudagraph_capture_size": "compilation_config",
}
"""Arguments that decide a part of another one: vLLM 0.32 refuses most of them together, or lets one win unsaid."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a learned plan was learned for."""

    settings: str
    """Fingerprint of the plan that the file asks for."""
    vllm: str
    """vLLM's version."""
    gpus: tuple[str, ...]
    """Name and memory of each GPU; ("cpu: NAME OF THE PROCESSOR",) where there is none."""
    model: str
    """Identity of the model's files."""


class Remembered(NamedTuple):
    """What still holds of a course."""

    steps: tuple[Step, ...]
    """In the order in which they were taken."""
    is_proven: bool
    """True when an engine with exactly these steps has answered under exactly this key."""
    why_dropped: str | None
    """A sentence when something was learned and does not hold, or cannot be read."""


class _UnreadableError(ValueError):
    """The values are not a course; the message says what is wrong with them."""


def to_json(course: Course, key: Key) -> dict[str, Any]:
    """The course as JSON values. The asked plan is left out."""
    return {
        "format": FORMAT,
        "key": {**asdict(key), "gpus": list(key.gpus)},
        "is_proven": course.is_proven,
        "steps": [_step_to_json(step) for step in course.steps],
    }


def _step_to_json(step: Step) -> dict[str, Any]:
    return {
        "kind": str(step.kind),
        "place": str(step.place),
        "reason": step.reason,
        "arguments": deepcopy(dict(step.arguments)),
        "env": dict(step.env),
        "is_rung": step.is_rung,
    }


def steps_for(value: object, key: Key, asked: EnginePlan) -> Remembered:
    """The steps of `value`, which `to_json` made at some time, that hold for `key` and the plan asked for now.

    All or nothing of it is understood; whatever `value` is, nothing is raised.
    """
    try:
        learned_for, steps, was_proven = _read(value)
    except _UnreadableError as error:
        return Remembered(steps=(), is_proven=False, why_dropped=f"What was learned cannot be used: {error}.")
    kept = tuple(step for step in steps if _holds(step, learned_for, key, asked))
    is_proven = was_proven and learned_for == key and kept == steps
    return Remembered(kept, is_proven, _why_dropped(learned_for, key, len(steps), len(kept)))


def _holds(step: Step, learned_for: Key, now: Key, asked: EnginePlan) -> bool:
    if learned_for == now:
        return True
    if step.is_rung or (learned_for.vllm, learned_for.gpus) != (now.vllm, now.gpus):
        return False
    # In an unchanged file the step was taken in spite of what is asked; a file that was changed since has the say.
    return learned_for.settings == now.settings or not _overrides(step, asked)


def _overrides(step: Step, asked: EnginePlan) -> bool:
    """True when the step decides what the plan asked for decides itself."""
    chosen = {_CHOICE.get(name, name) for name in asked.arguments}
    return any(_CHOICE.get(name, name) in chosen for name in step.arguments) or bool(step.env.keys() & asked.env.keys())


def _why_dropped(learned_for: Key, now: Key, learned: int, kept: int) -> str | None:
    if kept == learned:
        return None
    changes = {
        "the engine's settings changed": learned_for.settings != now.settings,
        f"vLLM changed from {learned_for.vllm} to {now.vllm}": learned_for.vllm != now.vllm,
        f"the GPUs changed from {_named(learned_for.gpus)} to {_named(now.gpus)}": learned_for.gpus != now.gpus,
        "the model's files changed": learned_for.model != now.model,
    }
    causes = " and ".join(words for words, has_changed in changes.items() if has_changed)
    return f"{learned - kept} of {learned} learned steps are dropped: {causes}."


def _named(gpus: tuple[str, ...]) -> str:
    return f"[{', '.join(gpus)}]"


def _read(value: object) -> tuple[Key, tuple[Step, ...], bool]:
    found = _object(value, "the whole")
    # Before anything else: another format may have other members.
    if type(number := found.get("format")) is not int or number != FORMAT:
        raise _UnreadableError(f"its format is {number!r}, and this version reads {FORMAT}")
    _members(found, "the whole", {"format", "key", "is_proven", "steps"})
    steps = tuple(_step(each, f"step {count}") for count, each in enumerate(_list(found["steps"], "steps"), start=1))
    return _key(found["key"]), steps, _flag(found["is_proven"], "is_proven")


def _key(value: object) -> Key:
    found = _members(_object(value, "key"), "key", set(Key.__dataclass_fields__))
    gpus = tuple(_text(each, "key.gpus") for each in _list(found["gpus"], "key.gpus"))
    settings, vllm, model = (_text(found[name], f"key.{name}") for name in ("settings", "vllm", "model"))
    return Key(settings, vllm, gpus, model)


def _step(value: object, where: str) -> Step:
    found = _members(_object(value, where), where, set(Step.__dataclass_fields__))
    kind, place = _text(found["kind"], f"{where}.kind"), _text(found["place"], f"{where}.place")
    if kind not in Kind.__members__:
        raise _UnreadableError(f"{where}.kind is {kind!r}, which is no kind of failure")
    if place not in Place.__members__:
        raise _UnreadableError(f"{where}.place is {place!r}, which is no part of an engine's life")
    env = _object(found["env"], f"{where}.env")
    return Step(
        kind=Kind(kind),
        place=Place(place),
        reason=_text(found["reason"], f"{where}.reason"),
        arguments=deepcopy(dict(_object(found["arguments"], f"{where}.arguments"))),
        env={name: _text(text, f"{where}.env.{name}") for name, text in env.items()},
        is_rung=_flag(found["is_rung"], f"{where}.is_rung"),
    )


def _members(found: Mapping[str, Any], where: str, names: set[str]) -> Mapping[str, Any]:
    """What is missing, or not known here, may change the meaning of the rest."""
    if different := found.keys() ^ names:
        listed = ", ".join(f"{'no' if name in names else 'an unknown'} {name!r}" for name in sorted(different))
        raise _UnreadableError(f"{where} has {listed}")
    return found


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _wrong(value, where, "an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(value, where, "a list")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, where, "text")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def _wrong(value: object, where: str, wanted: str) -> _UnreadableError:
    return _UnreadableError(f"{where} must be {wanted}, not {type(value).__name__}")
