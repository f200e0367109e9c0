"""Reads shell text as far as that is possible without running it: words, variables, arrays, one command after another.

shlex forgets which words stood in quotes, and that decides whether `$X` in them counts; so the words are read here.
What only a running shell would know (`$(date)`, `$1`, a variable set nowhere) leaves a hole in a word, with its name.
Conditions are not judged: what stands in `if` and `for` is read as if it were run once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HOLE = "\0"
"""Stands around the name of what is not known: it can be in no word."""


class ShellError(ValueError):
    """The text is not shell; the message names the line."""


@dataclass(frozen=True, slots=True)
class Command:
    """One simple command, without its redirections."""

    words: tuple[str, ...]
    env: Mapping[str, str]
    """What was exported before it, or written in front of it."""
    line: int


def commands(text: str, variables: Mapping[str, str]) -> tuple[Command, ...]:
    """Return the commands of a script in its order; `variables` are known before it starts. Raises ShellError."""
    return tuple(_Script(variables).run(_tokens(text)))


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Return a value of a compose file with its `${X:-default}` filled in; `$$` is a dollar."""
    parts = (part if part == "$$" else _Script(variables).in_quotes(part)[0] for part in re.split(r"(\$\$)", text))
    return "".join("$" if part == "$$" else part for part in parts)


def holes(word: str) -> tuple[str, ...]:
    """Return what is not known of a word, as it was written: `$1`, `$(date)`."""
    return tuple(re.findall(f"{_HOLE}([^{_HOLE}]*){_HOLE}", word))


def readable(word: str) -> str:
    """Return a word with its holes as they were written."""
    return word.replace(_HOLE, "")


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    line: int
    is_operator: bool


_BLANK = re.compile(r"(?:[ \t\r]|\\\r?\n)+")
_COMMENT = re.compile(r"#[^\n]*")
_OPERATOR = re.compile(r"\d*(?:>>|>\||>&|<<<|<<-?|<&|<>|>|<)|&>>?|&&|\|\||\|&|;;&?|;&|[;&|()\n]")
_PLAIN = re.compile(r"[^\s'\"\\$`;&|()<>]+")
_NAME = r"[A-Za-z_]\w*"
_SIMPLE = re.compile(rf"\$(?:{_NAME}|[0-9@*#?$!-])")
_CLOSED_BY = {"(": ")", "{": "}", '"': '"', "`": "`"}


def _tokens(text: str) -> Iterator[_Token]:
    newlines = [match.start() for match in re.finditer("\n", text)]
    bodies: list[str] = []  # of here-documents, which begin after the line
    at, wants_delimiter = 0, False
    while at < len(text):
        line = bisect_right(newlines, at - 1) + 1
        if found := _BLANK.match(text, at) or _COMMENT.match(text, at):
            at = found.end()
        elif found := _OPERATOR.match(text, at):
            at = found.end()
            wants_delimiter = found.group().lstrip("0123456789") in ("<<", "<<-")
            yield _Token(found.group(), line, is_operator=True)
            if found.group() == "\n":
                at = _after_bodies(text, at, bodies)
        else:
            end = _word_end(text, at, line)
            if wants_delimiter:
                bodies.append(re.sub(r"""["'\\]""", "", text[at:end]))
                wants_delimiter = False
            yield _Token(text[at:end], line, is_operator=False)
            at = end


def _after_bodies(text: str, at: int, delimiters: list[str]) -> int:
    """Return the place after the here-documents that begin at `at`."""
    while delimiters:
        end = re.compile(rf"^\t*{re.escape(delimiters.pop(0))}[ \t\r]*$\n?", re.MULTILINE).search(text, at)
        at = end.end() if end else len(text)
    return at


def _word_end(text: str, at: int, line: int) -> int:
    while at < len(text) and not (text[at].isspace() or text[at] in ";&|()<>"):
        at = _piece_end(text, at, line)
    return at


def _piece_end(text: str, at: int, line: int) -> int:
    """Return the end of the piece of a word that begins at `at`: one quotation, one `${...}`, or plain text."""
    if text[at] == "\\":
        return min(at + 2, len(text))
    if text[at] == "'":
        end = text.find("'", at + 1)
        if end < 0:
            raise _unclosed("'", line)
        return end + 1
    if text[at] == "$":
        if found := _SIMPLE.match(text, at):
            return found.end()
        opener = text[at + 1 : at + 2]
        return _span_end(text, at + 2, _CLOSED_BY[opener], line) if opener in ("(", "{") else at + 1
    if text[at] in '"`':
        return _span_end(text, at + 1, _CLOSED_BY[text[at]], line)
    plain = _PLAIN.match(text, at)
    return plain.end() if plain else at + 1


def _span_end(text: str, at: int, closer: str, line: int) -> int:
    while at < len(text):
        if text[at] == closer:
            return at + 1
        if text[at] == "\\" or text.startswith(("$(", "${"), at) or (text[at] in "'\"`" and closer not in '"`'):
            at = _piece_end(text, at, line)
        elif text[at] == "(" and closer == ")":
            at = _span_end(text, at + 1, ")", line)
        else:
            at += 1
    raise _unclosed(closer, line)


def _unclosed(closer: str, line: int) -> ShellError:
    # Inside of words, and in compose files, there are no lines to count.
    return ShellError(f"line {line}: a closing {closer} is missing" if line else f"a closing {closer} is missing")


_ASSIGNMENT = re.compile(rf"({_NAME})(\+?)=(.*)", re.DOTALL)
_PARAMETER = re.compile(rf"\$(?:({_NAME}|[0-9@*#?$!-])|\{{(.*)\}})", re.DOTALL)
_BRACED = re.compile(rf"({_NAME}|[0-9]+|[@*])(?:\[[@*]\])?(?:(:?)([-=+?])(.*))?", re.DOTALL)
_KEYWORDS = frozenset(
    {"if", "then", "else", "elif", "do", "while", "until", "{", "}", "!", "time", "fi", "done", "esac"}
)
_DECLARING = frozenset({"export", "declare", "typeset", "local", "readonly"})
_ESCAPED_IN_QUOTES = ("\\", '"', "$", "`", "\n")
_REDIRECTS = re.compile(r"\d*[<>].*|&>>?")


class _Script:
    """What a script has set so far."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        # "$@" in a start script is what its caller adds: nothing.
        self._values: dict[str, list[str]] = {"@": [], "*": []} | {name: [value] for name, value in variables.items()}
        self._exported: set[str] = set()
        self._exports_all = False

    def run(self, tokens: Iterator[_Token]) -> Iterator[Command]:
        """Yield the commands, each with the environment that it would have."""
        words: list[_Token] = []
        is_target = False  # of a redirection
        for token in tokens:
            if token.is_operator and _REDIRECTS.fullmatch(token.text):
                is_target = True
            elif token.text == "(" and token.is_operator and words and re.fullmatch(rf"{_NAME}\+?=", words[-1].text):
                self._set_array(words.pop().text, tokens)
            elif token.is_operator:
                yield from self._finish(words)
                words = []
            elif is_target:
                is_target = False
            else:
                words.append(token)
        yield from self._finish(words)

    def _set_array(self, start: str, tokens: Iterator[_Token]) -> None:
        name, elements = start.rstrip("+="), self._values.get(start.rstrip("+="), []) if "+" in start else []
        for token in tokens:
            if token.text == ")" and token.is_operator:
                break
            elements = elements if token.is_operator else [*elements, *self.fields(token.text)]
        self._values[name] = elements

    def _finish(self, tokens: list[_Token]) -> Iterator[Command]:
        while tokens and tokens[0].text in _KEYWORDS:
            tokens = tokens[1:]
        own: dict[str, str] = {}
        while tokens and (found := _ASSIGNMENT.fullmatch(tokens[0].text)):
            own[found.group(1)] = self._assigned(found)
            tokens = tokens[1:]
        if not tokens:
            self._set(own, is_exported=self._exports_all)
        elif tokens[0].text in _DECLARING:
            self._declare([token.text for token in tokens])
        elif [token.text for token in tokens[:2]] in (["set", "-a"], ["set", "+a"]):
            self._exports_all = tokens[1].text == "-a"
        elif tokens[0].text == "unset":
            for token in tokens[1:]:
                self._values.pop(token.text, None)
        else:
            words = tuple(field for token in tokens for field in self.fields(token.text))
            known = {name: " ".join(self._values[name]) for name in sorted(self._exported & self._values.keys())}
            if words:
                yield Command(words, known | own, tokens[0].line)

    def _declare(self, words: list[str]) -> None:
        is_exported = self._exports_all or words[0] == "export" or "-x" in words
        for word in words[1:]:
            if found := _ASSIGNMENT.fullmatch(word):
                self._set({found.group(1): self._assigned(found)}, is_exported=is_exported)
            elif is_exported:
                self._exported.add(word)

    def _assigned(self, found: re.Match[str]) -> str:
        before = " ".join(self._values.get(found.group(1), [])) if found.group(2) else ""
        return before + " ".join(self.fields(found.group(3), is_split=False))

    def _set(self, values: Mapping[str, str], *, is_exported: bool) -> None:
        for name, value in values.items():
            self._values[name] = [value]
        if is_exported:
            self._exported |= values.keys()

    def fields(self, raw: str, *, is_split: bool = True) -> list[str]:
        """Return the words that one word of the text becomes: none, one, or more."""
        done: list[str] = []
        current: str | None = None
        at = 0
        while at < len(raw):
            end = _piece_end(raw, at, 0)
            for index, field in enumerate(self._piece(raw[at:end], is_first=at == 0, is_split=is_split)):
                if index:
                    done.append(current or "")
                    current = None
                current = (current or "") + field
            at = end
        return done if current is None else [*done, current]

    def _piece(self, piece: str, *, is_first: bool, is_split: bool) -> list[str]:
        """What one piece of a word becomes; the empty list is nothing at all, not even an empty word."""
        if piece[0] == "'":
            return [piece[1:-1]]
        if piece[0] == '"':
            return self.in_quotes(piece[1:-1])
        if piece[0] == "\\":
            return [] if piece[1:] == "\n" else [piece[1:]]
        if piece[0] == "`" or piece.startswith("$("):
            return [f"{_HOLE}{piece}{_HOLE}"]
        if piece == "$" or "$" not in piece:
            is_home = is_first and piece.startswith("~") and piece[1:2] in ("", "/")
            return [self._home() + piece[1:] if is_home else piece]
        value = self._parameter(piece)
        return [field for each in value for field in each.split()] if is_split else [" ".join(value)]

    def _home(self) -> str:
        return "".join(self._values.get("HOME", ["~"]))

    def in_quotes(self, text: str) -> list[str]:
        """Return what stands in double quotes: one word, but as many as an array or `$@` has."""
        done, current, at = [], "", 0
        while at < len(text):
            if text[at] == "\\" and text[at + 1 : at + 2] in _ESCAPED_IN_QUOTES:
                end, value = at + 2, [text[at + 1].strip("\n")]
            else:
                end = _piece_end(text, at, 0) if text[at] in "$`" else at + 1
                value = self._quoted(text[at:end])
            if not value and text[at:end] == text:
                return []
            for index, each in enumerate(value):
                if index:
                    done.append(current)
                    current = ""
                current += each
            at = end
        return [*done, current]

    def _quoted(self, piece: str) -> list[str]:
        if piece.startswith(("$(", "`")):
            return [f"{_HOLE}{piece}{_HOLE}"]
        if len(piece) == 1:
            return [piece]
        value = self._parameter(piece)
        return value if "@" in piece else [" ".join(value)]

    def _parameter(self, piece: str) -> list[str]:
        """Return the value of `$X` or `${X...}`: a list, for arrays have many. A hole where it is not known."""
        hole = [f"{_HOLE}{piece}{_HOLE}"]
        whole = _PARAMETER.fullmatch(piece)
        if whole is None:
            return hole
        if whole.group(1):
            return self._values.get(whole.group(1), hole)
        braced = _BRACED.fullmatch(whole.group(2))
        return hole if braced is None else self._braced(braced, hole)

    def _braced(self, found: re.Match[str], hole: list[str]) -> list[str]:
        name, colon, operator, word = found.groups()
        value = self._values.get(name)
        is_set = value is not None and (not colon or "".join(value) != "")
        if operator == "+":
            return self.in_quotes(word) if is_set else []
        if value is not None and (is_set or operator == "?"):
            return value
        if operator not in ("-", "="):
            return hole
        default = [" ".join(self.in_quotes(_unquoted(word)))]
        if operator == "=":
            self._values[name] = default
        return default


def _unquoted(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word
