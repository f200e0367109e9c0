"""What a load test asks: kinds of requests and their turns, prompts, steps of load, and when requests arrive."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_serve.core.errors import ConfigError, Problem

DEFAULT_STREAMS = (1, 8, 64, 256)
DEFAULT_TOKENS = 150
_TEXT = (
    "river engine morning letter winter garden window bridge market silver doctor summer island valley teacher paper "
    "harbour mountain station kitchen village forest captain music copper lantern orchard railway thunder weather"
)
_WORDS = tuple(_TEXT.split())

Luck = Callable[[], float]
"""A number in [0, 1) at each call."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: how long its question is, in words, and its answer, in tokens."""

    words: int
    tokens: int


SHORT, CHAT, LONG = Kind(words=30, tokens=50), Kind(words=120, tokens=150), Kind(words=600, tokens=400)
SCENARIOS: Mapping[str, tuple[Kind, ...]] = {"short": (SHORT,), "chat": (CHAT,), "mixed": (*4 * (SHORT,), LONG)}
"""The kinds of each scenario, which take turns: `mixed` is four short ones and a long one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the messages of a chat, or one prompt, and the most tokens of its answer."""

    prompt: str | tuple[Mapping[str, Any], ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of load: so many requests always running, or so many coming each second whatever becomes of them."""

    streams: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return "1 stream" if self.streams == 1 else f"{self.streams} streams"


def made_up(scenario: str, luck: Luck) -> Iterator[Ask]:
    """Requests of a scenario, for ever, no two alike from the first word on: a cache of prefixes is no help."""
    kinds, number = SCENARIOS[scenario], 0
    while True:
        kind = kinds[number % len(kinds)]
        words = " ".join(_WORDS[int(luck() * len(_WORDS))] for _ in range(kind.words))
        yield Ask(f"{int(luck() * 1e9)}-{number}: tell a story with these words: {words}.", kind.tokens)
        number += 1


def from_file(text: str, source: str, tokens: int = DEFAULT_TOKENS) -> tuple[Ask, ...]:
    """The requests that a file lists, one a line, or ConfigError with every line that is wrong.

    A line is a prompt, or a JSON object with `prompt` or `messages` and, where it likes, `max_tokens`.
    """
    asks, problems = list[Ask](), list[Problem]()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            asks.append(_of_line(line.strip(), tokens))
        except ValueError as error:
            problems.append(Problem(source, number, "", str(error)))
    if not asks and not problems:
        problems.append(Problem(source, None, "", "has no prompt in it", "Write one prompt a line"))
    if problems:
        raise ConfigError(problems)
    return tuple(asks)


def _of_line(line: str, tokens: int) -> Ask:
    if not line.startswith("{"):
        return Ask(line, tokens)
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if unknown := given.keys() - {"prompt", "messages", "max_tokens"}:
        raise ValueError(f"unknown key {min(unknown)}: a request has prompt or messages, and max_tokens")
    prompt, messages, most = given.get("prompt"), given.get("messages"), given.get("max_tokens", tokens)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"max_tokens must be a number from 1, not {most!r}")
    if isinstance(prompt, str) and prompt and messages is None:
        return Ask(prompt, most)
    if isinstance(messages, list) and messages and all(map(_is_message, messages)) and prompt is None:
        return Ask(tuple(messages), most)
    raise ValueError("must have either prompt, a text, or messages, a list of objects with role and content")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def closed_steps(max_num_seqs: int | None, max_queued: int | None = None) -> tuple[Step, ...]:
    """The steps of a closed loop where nobody chose any: up to what the engine runs at once, and twice that.

    Twice, because a limit shows only beyond it; but never as many that the server would have to refuse some.
    """
    streams: Sequence[int] = DEFAULT_STREAMS
    if max_num_seqs is not None and max_num_seqs <= DEFAULT_STREAMS[-1]:
        beyond = max_num_seqs + min(max_num_seqs, max_num_seqs if max_queued is None else max_queued)
        streams = sorted({*(each for each in DEFAULT_STREAMS if each < max_num_seqs), max_num_seqs, beyond})
    return tuple(Step(streams=each) for each in streams)


def arrivals(rate: float, seconds: float, luck: Luck | None) -> Iterator[float]:
    """When requests come, in seconds from the beginning: evenly; with luck as a Poisson process, by chance."""
    at = 0.0
    while at < seconds:
        yield at
        at += 1 / rate if luck is None else -math.log(1 - luck()) / rate
