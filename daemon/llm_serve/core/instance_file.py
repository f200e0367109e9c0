"""Reads the text of an instance file into Settings, or names everything that is wrong with it.

All problems are reported at once, each with its line: whoever edits the file over ssh, with a service down,
should not meet them one by one. It never decides what may stand in `[engine]`: the installed vLLM does.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any

from pydantic import BaseModel, ValidationError

from llm_serve.core import environment, spread
from llm_serve.core.budgets import over_budget
from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.settings import (
    GpuSettings,
    LimitSettings,
    LogSettings,
    NetworkSettings,
    RecoverySettings,
    ServerSettings,
    Settings,
)
from llm_serve.core.toml_lines import Path, duplicates, join, locate, locate_within, normalised

__all__ = ["check_exposure", "in_words", "load_toml", "locate", "nearest", "parse_instance"]

TABLES: Mapping[str, type[BaseModel]] = {
    "server": ServerSettings,
    "limits": LimitSettings,
    "recovery": RecoverySettings,
    "gpu": GpuSettings,
    "network": NetworkSettings,
    "log": LogSettings,
}
TOP_LEVEL = ("model", "engine", *TABLES)

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACE_IN_MESSAGE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


def parse_instance(text: str, *, source: str, name: str) -> Settings:
    """Return the settings that `text` means, or raise ConfigError with all that is wrong with it."""
    raw = load_toml(text, source)
    reader = _Reader(text, source)
    tables = reader.normalised_tables(raw)
    env = reader.environment(tables.get("engine"), _allowed_env(tables.get("server")))
    settings = reader.validated(tables, env, name)
    for path, message, hint in (*over_budget(settings), *spread.problems(settings)):
        reader.refuse(path, message, hint)
    if reader.problems:
        raise ConfigError(sorted(reader.problems, key=lambda problem: (problem.line or 0, problem.path)))
    return settings


def check_exposure(
    settings: Settings,
    has_keys: bool,  # noqa: FBT001 - one fact about one server, and every call names it
    text: str | None = None,
) -> Problem | None:
    """Return the problem of a server that everyone on the network could use without a key, if it is one.

    Keys may come from systemd, so whoever has looked for them says whether there are any.
    """
    listen = settings.server.listen_on
    if has_keys or listen.is_loopback:
        return None
    return Problem(
        file=settings.source,
        line=None if text is None else locate(text, "server.listen"),
        path="server.listen",
        message=f"{listen} can be reached from other machines, and there are no API keys",
        hint='Set server.api_keys or the systemd credential "api-keys", or listen on 127.0.0.1',
    )


def nearest(key: str, known: Mapping[str, object] | tuple[str, ...] | frozenset[str]) -> str | None:
    """Return the known key that `key` was most likely meant to be, or None when none is like it."""
    by_word = {each.lower(): each for each in sorted(known)}
    matches = get_close_matches(normalised(key).lower(), by_word, n=1, cutoff=0.6)
    return by_word[matches[0]] if matches else None


def load_toml(text: str, source: str) -> dict[str, Any]:
    """Return the tables of `text`, or raise ConfigError with the line on which it ceases to be TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(text, source, str(error))]) from error
    except RecursionError as error:
        raise ConfigError([Problem(source, None, "", "tables or arrays are nested too deeply")]) from error


def _syntax_problem(text: str, source: str, message: str) -> Problem:
    place = _PLACE_IN_MESSAGE.search(message)
    line = int(place.group(1)) if place and place.group(1) else text.count("\n") + 1
    words = _PLACE_IN_MESSAGE.sub("", message)
    hint = "Text has to stand in quotes" if words.startswith("Invalid value") else None
    return Problem(source, line, "", f"not TOML: {words[:1].lower()}{words[1:]}", hint)


class _Reader:
    """Collects the problems of one text."""

    def __init__(self, text: str, source: str) -> None:
        self.problems: list[Problem] = []
        self._text = text
        self._source = source

    def refuse(self, path: str, message: str, hint: str | None = None, line: int | None = None) -> None:
        line = line if line is not None else locate_within(self._text, path)
        self.problems.append(Problem(self._source, line, path, message, hint))

    def normalised_tables(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file with `_` in the names of tables and options; values stay as they are."""
        top = self._normalised(raw, ())
        for key in (*TABLES, "engine"):
            if isinstance(top.get(key), dict):
                top[key] = self._normalised(top[key], (key,))
        return top

    def _normalised(self, table: Mapping[str, Any], path: Path) -> dict[str, Any]:
        for first, second, line in duplicates(self._text, path):
            self.refuse(
                join((*path, normalised(second))),
                f"is written twice, as {first} and as {second}: - and _ mean the same",
                "Keep one of them",
                line,
            )
        return {normalised(key): value for key, value in table.items()}

    def environment(self, engine: Any, allowed: Collection[str]) -> dict[str, str]:
        """Return `[engine.env]` as text, and take it out of `engine`."""
        env = engine.pop("env", {}) if isinstance(engine, dict) else {}
        if not isinstance(env, dict):
            self.refuse("engine.env", f"must be a table, not {_shown(env)}")
            return {}
        for name, value in env.items():
            for message, hint in _env_problems(name, value, allowed):
                self.refuse(f"engine.env.{name}", message, hint)
        return {name: str(value) for name, value in env.items()}

    def validated(self, tables: dict[str, Any], env: dict[str, str], name: str) -> Settings:
        """Return the settings, with defaults where an option was refused, so that the rest can be judged."""
        self._engine_values(tables.get("engine"))
        self._unknown_keys(tables)
        known = {key: value for key, value in tables.items() if key in TOP_LEVEL}
        try:
            settings = Settings(**known, engine_env=env, name=name, source=self._source)
        except ValidationError as error:
            for path, message in in_words(error):
                self.refuse(path, message)
            sound = _without(known, error)
            settings = Settings(**sound, engine_env=env, name=name, source=self._source)
        if settings.gpu.devices is not None and "CUDA_VISIBLE_DEVICES" in env:
            self.refuse("engine.env.CUDA_VISIBLE_DEVICES", "contradicts gpu.devices", "Keep one of them")
        return settings

    def _unknown_keys(self, tables: Mapping[str, Any]) -> None:
        for key in tables.keys() - set(TOP_LEVEL):
            self.refuse(key, "unknown option", _hint(key, "", TOP_LEVEL))
        for table, model in TABLES.items():
            values = tables.get(table)
            if isinstance(values, dict):
                for key in values.keys() - model.model_fields.keys():
                    self.refuse(f"{table}.{key}", "unknown option", _hint(key, table, tuple(model.model_fields)))

    def _engine_values(self, engine: Any) -> None:
        """Arguments of vLLM's travel as text and JSON, which have no dates and no infinity."""
        if isinstance(engine, dict):
            for path, value in _leaves(engine, ("engine",)):
                if isinstance(value, float) and not isfinite(value):
                    self.refuse(join(path), f"must be a finite number, not {value}")
                elif not isinstance(value, str | int | float):
                    self.refuse(join(path), f"must not be a date or a time, not {value}", "Write it in quotes")


def _without(tables: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return the tables less what the error refuses; a model that is missing gets a name to go on with."""
    sound = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    for item in error.errors(include_url=False):
        table, *option = item["loc"]
        if option and isinstance(sound.get(str(table)), dict):
            sound[str(table)].pop(option[0], None)
        else:
            sound.pop(str(table), None)
    return {"model": "?", **sound}


def _leaves(value: Any, path: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def _hint(key: str, table: str, known: tuple[str, ...]) -> str | None:
    """The nearest name in the same table, else the table in which the name exists."""
    for other, model in TABLES.items():
        if other != table and key in model.model_fields:
            return f"It belongs under [{other}]"
    if key == "model":
        return "It stands at the top of the file, before the first table"
    match = nearest(key, known)
    if match is not None:
        return f"Did you mean {match}?"
    return "vLLM's arguments stand under [engine]" if table in ("", "server") else None


def _allowed_env(server: Any) -> Collection[str]:
    """What the file allows, as far as it can be read; what is wrong with it is told elsewhere."""
    names = server.get("allow_env") if isinstance(server, dict) else None
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def _env_problems(name: str, value: Any, allowed: Collection[str]) -> Iterator[tuple[str, str | None]]:
    if not _ENV_NAME.fullmatch(name):
        yield "is not a name that an environment variable can have", None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        yield f"must be text or a number, not {_shown(value)}", 'Write "1" or "0" for a switch'
    elif "\0" in str(value):
        yield "must not contain a NUL character", None
    elif name in environment.UNSAFE and name not in allowed and not environment.is_off(value):
        hint = f'Remove the line, or set server.allow_env = ["{name}"]'
        yield f"is refused: {environment.UNSAFE[name]}", hint
    if name == "VLLM_API_KEY":
        yield "is refused: the engine needs no key, the server does", "Use server.api_keys"
    if name in environment.SET_BY_US:
        yield "is refused: llm-serve sets it for each engine it starts", "Remove the line"


_WORDS = {
    "missing": "is required",
    "string_type": "must be text in quotes, not {input}",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be an absolute path, not {input}",
    "int_type": "must be a whole number, not {input}",
    "int_from_float": "must be a whole number, not {input}",
    "float_type": "must be a number, not {input}",
    "finite_number": "must be a finite number, not {input}",
    "bool_type": "must be true or false, not {input}",
    "tuple_type": "must be a list, not {input}",
    "dict_type": "must be a table, not {input}",
    "model_type": "must be a table, not {input}",
    "model_attributes_type": "must be a table, not {input}",
    "greater_than": "must be more than {gt}, not {input}",
    "greater_than_equal": "must be at least {ge}, not {input}",
    "less_than_equal": "must be at most {le}, not {input}",
    "literal_error": "must be one of {expected}, not {input}",
}


def in_words(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for each thing pydantic refused, but for unknown keys: their nearest is the caller's."""
    for item in error.errors(include_url=False):
        kind, path = item["type"], join(item["loc"])
        if kind == "extra_forbidden":
            continue
        if kind == "value_error":
            yield path, item["msg"].removeprefix("Value error, ")
            continue
        bounds = {key: _number(value) for key, value in item.get("ctx", {}).items()}
        template = _WORDS.get(kind, item["msg"].replace("{", "{{").replace("}", "}}"))
        yield path, template.format(input=_shown(item["input"]), **bounds)


def _number(value: Any) -> Any:
    """Bounds without the `.0` that the file would not have."""
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    """Return a value as the file writes it, short enough for a line of a log."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    words = f'"{value}"' if isinstance(value, str) else str(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
