"""Reads vLLM's own words into options of an instance file, as vLLM's parser would, and says what became of old ones.

Which options exist, and what each takes, is the installed vLLM's knowledge: it comes in as a catalogue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from llm_serve.core import former_flags
from llm_serve.core.instance_file import nearest
from llm_serve.core.launch import NotImportable, Remark
from llm_serve.core.plan import HIDDEN, SECRET_NAME
from llm_serve.core.shell import holes, readable


@dataclass(frozen=True, slots=True)
class Option:
    """What a file can write under [engine], or what llm-serve has another place for."""

    takes: Literal["nothing", "one", "maybe", "many"]
    kind: Literal["switch", "number", "text", "json"]
    elsewhere: str = ""
    """Where llm-serve does this; empty where it is vLLM's."""
    same_as: str = ""
    """The usual name, of an option that has two."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the installed vLLM understands."""

    options: Mapping[str, Option]
    short: Mapping[str, str] = field(default_factory=dict)
    """`-tp` -> tensor_parallel_size"""
    variables: frozenset[str] = frozenset()
    """The names of its own environment variables."""
    version: str = ""


@dataclass(slots=True)
class Flags:
    """What vLLM's words said."""

    model: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """By vLLM's names of today; also the options that are llm-serve's business."""
    remarks: list[Remark] = field(default_factory=list)


def read_flags(args: tuple[str, ...], catalogue: Catalogue) -> Flags:
    """Return what the words after `vllm serve` mean. Raises NotImportable where they have no model."""
    flags = _Reader(args, catalogue).read()
    model = flags.values.pop("model", None)
    flags.model = str(model) if model is not None else flags.model
    if flags.model is None:
        raise NotImportable("the command names no model")
    if open_parts := holes(flags.model):
        raise NotImportable(f"the model is not known: {', '.join(open_parts)} is set nowhere in the text. Set it there")
    return flags


class _Reader:
    """One pass over vLLM's words."""

    def __init__(self, args: tuple[str, ...], catalogue: Catalogue) -> None:
        self._args, self._at = args, 0
        self._catalogue = catalogue
        self._flags = Flags()
        self._is_after_secret = False
        self._dotted_names: set[str] = set()

    def read(self) -> Flags:
        while self._at < len(self._args):
            word = self._args[self._at]
            self._at += 1
            if word == "--":
                continue
            if not word.startswith("-") or word == "-":
                self._positional(word)
            else:
                self._flag(word)
        return self._flags

    def _positional(self, word: str) -> None:
        if self._flags.model is None:
            self._flags.model = word
        else:
            # After a secret it may be one more of them.
            self._remark(HIDDEN if self._is_after_secret else _short(readable(word)), "belongs to no option")

    def _flag(self, word: str) -> None:
        written, equals, text = word.partition("=")
        given = [text] if equals else []
        self._is_after_secret = SECRET_NAME.search(written.replace("-", "_")) is not None
        name, path = self._name(written)
        if name is None:
            self._unknown(written, given)
        elif path:
            self._dotted(name, path, given)
        else:
            self._option(written, name, given)

    def _name(self, written: str) -> tuple[str | None, str]:
        """Return (option, rest of a dotted path); None for what vLLM does not know."""
        if not written.startswith("--"):
            # vLLM's own shorthand: -O3
            head, dot, path = written.partition(".")
            if re.fullmatch(r"-O\w*", written):
                self._args = (*self._args[: self._at], *filter(None, [written[2:]]), *self._args[self._at :])
                return "optimization_level", ""
            return self._catalogue.short.get(head), path if dot else ""
        head, _, path = written[2:].partition(".")
        name = head.replace("-", "_")
        options = self._catalogue.options
        is_former = name in former_flags.DROPPED or name in former_flags.RENAMED or name in former_flags.SWITCHED
        if name in options or is_former or name == "task":
            return (name, path) if name in options else (None, "")
        positive = name.removeprefix("no_")
        if positive != name and positive in options and options[positive].kind == "switch":
            return positive, ""
        # As argparse does: the beginning of one name is enough.
        longer = {each for each in options if each.startswith(name)}
        return (longer.pop(), path) if len(longer) == 1 else (None, "")

    def _option(self, written: str, name: str, given: list[str]) -> None:
        option = self._catalogue.options[name]
        if option.kind == "switch":
            given = given or self._truth_that_follows()
            is_negated = written.startswith(("--no-", "--no_")) and not name.startswith("no_")
            self._set(name, (given[:1] in ([], ["true"], ["True"], ["1"])) is not is_negated)
            return
        given = given or self._values(option)
        if not given and option.takes == "one":
            self._remark(written, "has no value")
        elif any(map(holes, given)) and name != "api_key":
            self._remark(self._shown(written, name, given), f"{_known_there(given)}: write its value")
        else:
            converted = [_converted(each, option.kind) for each in given]
            if name not in self._dotted_names:
                self._set(name, converted if option.takes == "many" else converted[0] if converted else True)

    def _truth_that_follows(self) -> list[str]:
        """Earlier versions took `--enable-chunked-prefill false`."""
        word = self._args[self._at] if self._at < len(self._args) else ""
        if word in ("true", "false", "True", "False"):
            self._at += 1
            return [word]
        return []

    def _values(self, option: Option) -> list[str]:
        """Take the words that an option of this kind takes."""
        most = {"nothing": 0, "one": 1, "maybe": 1, "many": len(self._args)}[option.takes]
        values: list[str] = []
        while len(values) < most and self._at < len(self._args) and _is_value(self._args[self._at]):
            values.append(self._args[self._at])
            self._at += 1
        return values

    def _dotted(self, name: str, path: str, given: list[str]) -> None:
        """`--compilation-config.mode 3`, and `--x.list+ a,b`, which appends."""
        given = given or self._values(Option("one", "text"))
        if not given or holes(given[0]):
            self._remark(self._shown(f"--{name}.{path}", path, given), _known_there(given) if given else "has no value")
            return
        if name not in self._dotted_names:
            # As vLLM does: what is given with dots counts, and replaces what is given as a whole.
            self._dotted_names.add(name)
            self._flags.values.pop(name, None)
        is_list = path.endswith("+")
        value = given[0].split(",") if is_list else _json_or_text(given[0])
        self._set(f"{name}.{path.removesuffix('+')}", value)

    def _unknown(self, written: str, given: list[str]) -> None:
        name = written.lstrip("-").replace("-", "_")
        if name not in former_flags.SWITCHES:
            given = given or self._values(Option("many", "text"))
        else:
            given = given or self._truth_that_follows()
        shown = self._shown(written, name, given)
        if name == "task" and given and given[0] in former_flags.TASKS:
            for option, value in former_flags.TASKS[given[0]].items():
                self._set(option, value)
            self._remark(shown, "runner and convert say it now")
        elif name in former_flags.SWITCHED:
            self._set(*former_flags.SWITCHED[name])
            self._remark(shown, f"is {former_flags.SWITCHED[name][0]} now")
        elif name in former_flags.RENAMED and given and not any(map(holes, given)):
            self._renamed(name, given, shown)
        elif name in former_flags.DROPPED:
            self._remark(shown, f"vLLM has it no longer; {former_flags.DROPPED[name]}")
        else:
            match = nearest(name, tuple(self._catalogue.options))
            meant = f". Did you mean {match}?" if match else ""
            self._remark(shown, f"vLLM {self._catalogue.version} does not know it{meant}")

    def _renamed(self, name: str, given: list[str], shown: str) -> None:
        path = former_flags.RENAMED[name]
        if name == "guided_decoding_backend":
            backend, *extras = re.split("[:,]", given[0])
            self._set(path, backend)
            if "disable-any-whitespace" in extras:
                self._set(*former_flags.SWITCHED["guided_decoding_disable_any_whitespace"])
        elif name == "speculative_model" and given[0] == "[ngram]":
            self._set("speculative_config.method", "ngram")
        else:
            option = self._catalogue.options.get(path)
            is_many = option is not None and option.takes == "many"
            values = [_json_or_text(each) for each in given]
            self._set(path, values if is_many else values[0])
        note = former_flags.NOTES.get(name)
        self._remark(shown, f"is {path} now" + (f"; {note}" if note else ""))

    def _set(self, path: str, value: Any) -> None:
        """Set an option, or a place in its table; what was set before is replaced, as vLLM does."""
        name, *keys = path.split(".")
        option = self._catalogue.options.get(name)
        name = option.same_as or name if option else name
        if not keys:
            self._flags.values[name] = _modern(name, value)
            return
        table = self._flags.values.get(name)
        if not isinstance(table, dict):
            table = self._flags.values[name] = {}
        for key in keys[:-1]:
            inner = table.get(key)
            table[key] = inner if isinstance(inner, dict) else {}
            table = table[key]
        table[keys[-1]] = _joined(table.get(keys[-1]), value)

    def _shown(self, written: str, name: str, given: list[str]) -> str:
        values = [HIDDEN] if given and SECRET_NAME.search(name) else [_short(readable(each)) for each in given]
        return " ".join([written, *values])

    def _remark(self, what: str, why: str) -> None:
        self._flags.remarks.append(Remark("engine", what, why))


def _known_there(given: list[str]) -> str:
    return f"{', '.join(each for word in given for each in holes(word))} is set nowhere in the text"


def _is_value(word: str) -> bool:
    """As argparse sees it: a negative number is a value, other words that begin with - are options."""
    return not word.startswith("-") or word == "-" or re.fullmatch(r"-\d+(\.\d*)?|-\.\d+", word) is not None


def _joined(before: Any, value: Any) -> Any:
    """Lists one after the other, tables key by key; else the later one."""
    if isinstance(before, list) and isinstance(value, list):
        return [*before, *value]
    if not (isinstance(before, dict) and isinstance(value, dict)):
        return value
    return before | {key: _joined(before.get(key), each) for key, each in value.items()}


def _converted(word: str, kind: str) -> Any:
    if kind == "json":
        return _json_or_text(word)
    return _number(word) if kind == "number" else word


_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _number(word: str) -> Any:
    """Return the number that vLLM reads, `16k` included; what is none stays text ("auto")."""
    if re.fullmatch(r"[+-]?[0-9]{1,18}", word):
        return int(word)
    if (found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([kmgtKMGT])", word)) and (
        "." not in word or word[-1].islower()
    ):
        return int(float(found.group(1)) * _FACTORS[found.group(2)])
    is_float = re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.?[0-9]+)(e[+-]?[0-9]+)?", word, re.IGNORECASE)
    return float(word) if is_float and isfinite(float(word)) else word


def _json_or_text(word: str) -> Any:
    """Return what JSON says; a word that is none, or that TOML has no form for (null, infinity), stays text."""
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return word
    return value if not isinstance(value, str) and all(map(_has_toml_form, _leaves(value))) else word


def _has_toml_form(leaf: Any) -> bool:
    return leaf is not None and not (isinstance(leaf, float) and not isfinite(leaf))


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for each in inner:
            yield from _leaves(each)


def _modern(name: str, value: Any) -> Any:
    """Return a value in today's form."""
    if name == "compilation_config" and isinstance(value, int):
        return {"mode": value}
    if (
        name == "limit_mm_per_prompt"
        and isinstance(value, str)
        and re.fullmatch(r"\w+=[0-9]{1,9}(,\w+=[0-9]{1,9})*", value)
    ):
        return {kind: int(count) for kind, _, count in (each.partition("=") for each in value.split(","))}
    if name == "attention_backend" and isinstance(value, str):
        return former_flags.BACKENDS.get(value, value)
    return value


def _short(word: str) -> str:
    quoted = word if re.fullmatch(r"[\w@%+=:,./-]+", word) else f"'{word}'"
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."
