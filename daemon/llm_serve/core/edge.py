"""What a request may ask of the engine: its body, looked at once, before anything of vLLM's sees it.

One rule holds for every route, because a field that was bounded on one of them and forgotten on its sibling is how
most of vLLM's advisories came about. What can kill or block the engine, run code or reach other machines is refused
unless the instance file opens it; a field that vLLM does not know it ignores, so that it may pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from pydantic_core import from_json, to_json

from llm_serve.core import request_fields as fields
from llm_serve.core.settings import LimitSettings

_MEDIA = frozenset({"audio_url", "image_url", "video_url"})
_REGEX, _GRAMMAR = "structured_outputs.regex", "structured_outputs.grammar"
_GRAMMARS = {"ebnf": _GRAMMAR, "grammar": _GRAMMAR, "lark": _GRAMMAR, "regex": _REGEX}
"""The kinds of objects that are grammars of their own, in structural tags and custom tools; no JSON Schema has them."""
_RAW = {"grammar": _GRAMMAR, "regex": _REGEX, "whitespace_pattern": _REGEX}
"""The same as fields of `structured_outputs`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a body is not let in. `field` is the field that is to blame; empty when it is the body as a whole."""

    message: str
    field: str = ""
    status: int = 400
    code: str = "not_allowed"


class _Refused(Exception):  # noqa: N818 - the way out of a walk
    """Carries a refusal."""

    def __init__(self, message: str, field: str = "", *, status: int = 400, code: str = "not_allowed") -> None:
        super().__init__(message)
        self.refusal = Refusal(message, field, status, code)


def _not_known() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Edge:
    """The limits of `[limits]`, and the settings that open something: vLLM's own switches in `[engine]`.

    `longest_prompt` tells of how many characters a prompt for the engine of the moment may be, 0 before there was one.
    What is longer would be refused after vLLM has parsed it again and put it into a template.
    """

    limits: LimitSettings
    switches: frozenset[str]
    longest_prompt: Callable[[], int] = _not_known

    @classmethod
    def of(
        cls, limits: LimitSettings, engine: Mapping[str, object], longest_prompt: Callable[[], int] = _not_known
    ) -> Edge:
        """The edge that an instance file asks for."""
        opening = {setting for setting, _ in (*fields.SWITCHED.values(), *fields.FETCHED.values())} - {fields.ALLOW}
        names = {setting.removeprefix("engine.") for setting in opening}
        given = {name.partition(".")[0] for name, value in engine.items() if value}
        return cls(limits, frozenset(f"engine.{name}" for name in names & given), longest_prompt)

    def refusal(self, body: bytes) -> Refusal | None:
        """Why this body is not let in; None when it is. What is no request of the right form is vLLM's to refuse."""
        try:
            if body:
                self._check(body)
        except _Refused as refused:
            return refused.refusal
        return None

    def _check(self, body: bytes) -> None:
        limits = self.limits
        opened = body.count(b"[") + body.count(b"{")
        # Each value but the first has one of these in front of it, wherever else they stand.
        if (most := opened + body.count(b",") + 1) > limits.max_values:
            raise _too_much("", f"the body has up to {most} values", limits.max_values, "max_values", status=413)
        try:
            request = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise _Refused(f"the body is not JSON in UTF-8: {error}.", code="invalid_json") from None
        if type(request) is not dict:
            return
        if opened > limits.max_nesting and _is_deeper(request, limits.max_nesting):
            raise _too_much("", "the body is nested more deeply", limits.max_nesting, "max_nesting")
        for name, value in request.items():
            if value is not None and (check := _CHECKS.get(name)) is not None:
                check(self, name, value)
        if request.get("echo"):
            self._switched("prompt_logprobs", request.get("logprobs"), said="`echo` with `logprobs`")
        if limits.unknown_fields == "refuse" and (unknown := request.keys() - fields.KNOWN):
            name = min(unknown)
            raise _Refused(f"`{_shown(name)}` is no field that is known here (limits.unknown_fields).", name[:64])
        if len(body) > min(limits.max_schema_bytes, limits.max_tools_bytes):
            self._check_sizes(request)

    def _check_sizes(self, request: dict[str, Any]) -> None:
        """Only a body that is longer than a limit can have a part that is."""
        for name in fields.DESCRIPTIONS & request.keys():
            is_offered = name == "tools" and request.get("tool_choice") in (None, "auto", "none")
            limit = "max_tools_bytes" if is_offered else "max_schema_bytes"
            most: int = getattr(self.limits, limit)
            if (size := len(to_json(request[name]))) > most:
                raise _too_much(name, f"`{name}` has {size} bytes", most, limit, status=413)

    # What is asked about one field.
    def _switched(self, name: str, value: Any, said: str = "") -> None:
        """A field that something has to open; one that asks for nothing may stay."""
        if value is None or value is False or value in ("", [], {}):
            return
        setting, why = fields.SWITCHED[name]
        if setting not in self.switches and not (setting == fields.ALLOW and name in self.limits.allow):
            remedy = f'limits.allow = ["{name}"]' if setting == fields.ALLOW else setting
            raise _Refused(f"{said or f'`{name}`'} is not allowed here ({remedy}): {why}.", name)

    def _count(self, name: str, value: Any) -> None:
        number = _number(value)
        if number is not None and not number <= self.limits.max_choices:
            raise _too_much(name, f"`{name}` is {_shown(value)}", self.limits.max_choices, "max_choices")

    def _finite(self, name: str, value: Any) -> None:
        number = _number(value)
        if number is not None and not isfinite(number):
            raise _Refused(f"`{name}` must be a finite number, not {_shown(value)}.", name)

    def _token_ids(self, name: str, value: Any) -> None:
        self._length(name, value, "max_token_ids")
        for bias in value.values() if type(value) is dict else ():
            self._finite(name, bias)

    def _label(self, name: str, value: Any) -> None:
        self._length(name, value, "max_token_ids")
        most = self.limits.max_label_chars
        for label in value if type(value) is list else (value,):
            if type(label) is str and len(label) > most:
                raise _too_much(name, f"`{name}` has {len(label)} characters", most, "max_label_chars")

    def _prompt(self, name: str, value: Any) -> None:
        """A text, tokens, many of either, or messages."""
        first = value[0] if type(value) is list and value else None
        if type(first) is str or type(first) is list:
            self._length(name, value, "max_prompts")
        if type(first) is dict:
            self._length(name, value, "max_messages")
        for text in value if type(first) is str or type(first) is list else (value,):
            self._tokens(name, text)
        self._talk(name, value)

    def _tokens(self, name: str, value: Any) -> None:
        """One prompt, as a text or as tokens, of which none is shorter than a character."""
        if type(value) is str or (type(value) is list and value and type(value[0]) is int):
            self._long(name, len(value), "characters" if type(value) is str else "tokens")

    def _long(self, name: str, size: int, of: str = "characters") -> None:
        if size > (most := self.limits.max_prompt_chars or self.longest_prompt() or size):
            raise _too_much(name, f"`{name}` has {size} {of}", most, "max_prompt_chars")

    def _messages(self, name: str, value: Any) -> None:
        self._length(name, value, "max_messages")
        self._talk(name, value)

    def _talk(self, name: str, value: Any) -> None:
        """Messages: of how many parts, how long all together, and what they would have the server fetch."""
        size = len(value) if type(value) is str else 0
        for node in _objects(value):
            content, text = node.get("content"), node.get("text")
            if type(content) is list:
                self._length(name, content, "max_messages")
            size += sum(len(each) for each in (content, text) if type(each) is str)
            if not _MEDIA.isdisjoint(node):
                for key in _MEDIA & node.keys():
                    self._media(name, node[key])
            if type(source := node.get("source")) is dict:
                self._media(name, source)
        self._long(name, size)

    def _media(self, name: str, value: Any) -> None:
        address = value.get("url") if type(value) is dict else value
        if type(address) is not str or address.startswith("data:"):
            return
        setting, why = fields.FETCHED["file" if address[:5].lower() == "file:" else "http"]
        if setting not in self.switches:
            message = (
                f"`{name}` names media by address, {_shown(address)}, which is not allowed here ({setting}): {why}."
            )
            raise _Refused(f"{message} Send it as a data: URL.", name)

    def _tools(self, name: str, value: Any) -> None:
        self._length(name, value, "max_tools")
        self._description(name, value)

    def _template_values(self, _: str, value: Any) -> None:
        if type(value) is dict:
            self._switched("chat_template", value.get("chat_template"))

    def _constraint(self, name: str, value: Any) -> None:
        """`structured_outputs`, and what it hides in text."""
        if type(value) is not dict:
            return
        for key in _RAW.keys() & value.keys():
            self._switched(_RAW[key], value[key], said=f"`{name}.{key}`")
        for key in ("json", "structural_tag"):
            if type(text := value.get(key)) is str:
                self._description(name, _parsed(text))
        self._description(name, value)

    def _description(self, name: str, value: Any) -> None:
        """A schema, a structural tag or a tool: no grammar of its own, and no endless pattern."""
        for node in _objects(value):
            kind = node.get("type")
            if type(kind) is str and kind in _GRAMMARS:
                self._switched(_GRAMMARS[kind], kind, said=f"`{name}` of type {kind}")
            if "pattern" in node:
                self._pattern(name, node["pattern"])
            if "patternProperties" in node and type(patterns := node["patternProperties"]) is dict:
                for pattern in patterns:
                    self._pattern(name, pattern)

    def _pattern(self, name: str, value: Any) -> None:
        if type(value) is str and len(value) > self.limits.max_pattern_chars:
            words = f"`{name}` has a pattern of {len(value)} characters"
            raise _too_much(name, words, self.limits.max_pattern_chars, "max_pattern_chars")

    def _length(self, name: str, value: Any, limit: str) -> None:
        most: int = getattr(self.limits, limit)
        if type(value) in (list, dict) and len(value) > most:
            raise _too_much(name, f"`{name}` has {len(value)} entries", most, limit)


_CHECKS: dict[str, Callable[[Edge, str, Any], None]] = {
    **dict.fromkeys(fields.SWITCHED, Edge._switched),  # noqa: SLF001 - the class's own table
    **dict.fromkeys(fields.COUNTS, Edge._count),  # noqa: SLF001
    **dict.fromkeys(fields.NUMBERS, Edge._finite),  # noqa: SLF001
    **dict.fromkeys(fields.TOKEN_IDS, Edge._token_ids),  # noqa: SLF001
    **dict.fromkeys(fields.LABELS, Edge._label),  # noqa: SLF001
    **dict.fromkeys(fields.PROMPTS, Edge._prompt),  # noqa: SLF001
    **dict.fromkeys(fields.DESCRIPTIONS, Edge._description),  # noqa: SLF001
    **dict.fromkeys(fields.TALKS, Edge._messages),  # noqa: SLF001
    "chat_template_kwargs": Edge._template_values,  # noqa: SLF001
    "structured_outputs": Edge._constraint,  # noqa: SLF001
    "tools": Edge._tools,  # noqa: SLF001
}
"""What is asked about each field that is asked about."""


def _too_much(field: str, what: str, most: int, limit: str, *, status: int = 400) -> _Refused:
    message = f"{what}, and at most {most} are allowed here (limits.{limit})."
    return _Refused(message, field, status=status, code="over_limit")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a value. The arguments that a message shows a tool was called with are not the request's."""
    left = [value]
    while left:
        node = left.pop()
        if type(node) is dict:
            yield node
            is_call = node.get("type") == "tool_use"
            node = [each for key, each in node.items() if key != "input"] if is_call else node.values()
        elif type(node) is not list:
            continue
        left += [each for each in node if type(each) is dict or type(each) is list]


def _is_deeper(value: Any, limit: int) -> bool:
    """True when containers stand in each other more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _number(value: Any) -> float | None:
    """The number that vLLM would read, also from text; None for what it would refuse."""
    if type(value) in (int, float, bool):
        return value if type(value) is not int or abs(value) < _HUGE else _HUGE * (1 if value > 0 else -1)
    try:
        return float(value) if type(value) is str else None
    except ValueError:
        return None


_HUGE = 1 << 63


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    """A value of the client's, short enough for an error and without what could break a line."""
    words = value if type(value) is str else str(value) if abs(value) < _HUGE else "a number beyond all bounds"
    return words if len(words) <= 60 and words.isprintable() else f"{ascii(words[:50])[1:-1]}..."
