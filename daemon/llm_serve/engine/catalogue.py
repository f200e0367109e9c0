"""What the installed vLLM understands, for who reads command lines: its options, their kinds, its variables.

The parser is asked, not copied: what an option makes of `{}` and of `1` says which kind of value it takes.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from llm_serve.core.flags import Catalogue, Option
from llm_serve.engine import arguments

_TAKES: dict[Any, Literal["nothing", "one", "maybe", "many"]] = {0: "nothing", "?": "maybe", "+": "many", "*": "many"}


def catalogue() -> Catalogue:
    """Return what the installed vLLM understands. Imports vLLM: seconds."""
    from vllm import __version__, envs

    actions = arguments.known_options()
    options = {name: _option(name, action) for name, action in actions.items()}
    short = {flag: action.dest for action in actions.values() for flag in action.option_strings if flag[:2] != "--"}
    return Catalogue(options, short, frozenset(envs.environment_variables), __version__)


def _option(name: str, action: argparse.Action) -> Option:
    takes = _TAKES.get(action.nargs, "one")
    return Option(
        takes,
        "switch" if takes == "nothing" else _kind(action),
        elsewhere=arguments.OWNED.get(name, ""),
        same_as=action.dest if action.dest != name and action.dest in arguments.known_options() else "",
    )


def _kind(action: argparse.Action) -> Literal["number", "text", "json"]:
    if not isinstance(_converted(action, "{}"), str | None):
        return "json"
    return "number" if isinstance(_converted(action, "1"), int | float) else "text"


def _converted(action: argparse.Action, word: str) -> Any:
    """Return what an option makes of a word; None where it takes no such word."""
    convert: Any = action.type or str
    try:
        return convert(word)
    except Exception:  # noqa: BLE001 - each option has its own converter, and none a promise
        return None


def refusal(name: str, value: object) -> str | None:
    """Return why vLLM would refuse this value of an option, alone and on any machine; None where it would not."""
    for message, hint in arguments.option_problems(name, value):
        return f"{message}. {hint}" if hint else message
    return None
