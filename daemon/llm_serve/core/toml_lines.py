"""On which line of a TOML text each key stands.

tomllib gives values without places, and a message without a line sends people searching. This scanner reads
just enough of TOML to follow tables, keys and the extent of values. It trusts that tomllib has accepted
the text, and ends quietly where it does not understand: a missing line is worth less than a second opinion.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress

Path = tuple[str, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})|' r"'''.*?'''(?:'{0,2})|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]\}#\r\n]*")


class _NotUnderstood(Exception):  # noqa: N818 - ends a scan; nobody outside sees it
    """The text is not TOML as this scanner knows it."""


def key_lines(text: str) -> list[tuple[Path, int]]:
    """Return every key path of `text` with its line, in the order of the text.

    A path holds keys as TOML reads them; elements of arrays have their index as a key, as in
    `("gpu", "devices", "0")`. A path that is written more than once is there more than once.
    """
    scanner = _Scanner(text)
    with suppress(_NotUnderstood, RecursionError):
        scanner.scan()
    return scanner.found


def normalised(key: str) -> str:
    """Return the key as llm-serve compares it: `-` and `_` are alike."""
    return key.replace("-", "_")


def locate(text: str, dotted_path: str) -> int | None:
    r"""Return the line on which `dotted_path` is first written, or None when it is not written.

    >>> locate('model = "m"\n[engine]\nmax-num-seqs = 4', "engine.max_num_seqs")
    3
    """
    wanted = normalised(dotted_path)
    for path, line in key_lines(text):
        if normalised(".".join(path)) == wanted:
            return line
    return None


def locate_within(text: str, dotted_path: str) -> int | None:
    """Return the line of `dotted_path`, or of the innermost part of it that is written."""
    lines = {normalised(join(path)): line for path, line in reversed(key_lines(text))}
    wanted = normalised(dotted_path)
    while wanted:
        if wanted in lines:
            return lines[wanted]
        wanted = wanted.rpartition(".")[0]
    return None


class _Scanner:
    """One pass over one text; `found` grows as keys are met."""

    def __init__(self, text: str) -> None:
        self.found: list[tuple[Path, int]] = []
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._array_lengths: dict[Path, int] = {}
        self._tables_met: set[Path] = set()

    def scan(self) -> None:
        table: Path = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> Path:
        line, is_array = self._line(), self._peek("[[")
        self._at += 2 if is_array else 1
        keys = self._key()
        self._expect("]]" if is_array else "]")
        table = self._inside_arrays(keys[:-1]) + keys[-1:]
        if is_array:
            index = self._array_lengths.get(table, 0)
            self._array_lengths[table] = index + 1
            self._note(table, line)
            table = (*table, str(index))
        self._note_with_parents(table, len(keys), line)
        return table

    def _inside_arrays(self, keys: Path) -> Path:
        """A header that goes through an array of tables means the array's latest element."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._array_lengths:
                path = (*path, str(self._array_lengths[path] - 1))
        return path

    def _pair(self, prefix: Path) -> None:
        line = self._line()
        keys = self._key()
        self._expect("=")
        path = prefix + keys
        self._note_with_parents(path, len(keys), line)
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._peek("["):
            self._array(path)
        elif self._peek("{"):
            self._inline_table(path)
        elif self._peek('"') or self._peek("'"):
            self._take(_STRING)
        else:
            self._take(_SCALAR)

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while not self._closed_by("]"):
            element = (*path, str(index))
            self._note(element, self._line())
            self._value(element)
            index += 1
            self._closing_comma("]")

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while not self._closed_by("}"):
            self._pair(path)
            self._closing_comma("}")

    def _closed_by(self, bracket: str) -> bool:
        self._skip(_BLANK)
        if self._peek(bracket):
            self._at += 1
            return True
        return False

    def _closing_comma(self, bracket: str) -> None:
        self._skip(_BLANK)
        if not self._peek(bracket):
            self._expect(",")

    def _key(self) -> Path:
        """Read `a.b."c d"`, with the blanks that TOML allows around the dots."""
        parts: list[str] = []
        while True:
            self._skip(_SPACE)
            parts.append(_unquoted(self._take(_KEY_PART)))
            self._skip(_SPACE)
            if not self._peek("."):
                return tuple(parts)
            self._at += 1

    def _note_with_parents(self, path: Path, written: int, line: int) -> None:
        """Note the path, and before it each parent that this line brings into being."""
        for length in range(max(1, len(path) - written + 1), len(path)):
            parent = path[:length]
            if parent not in self._tables_met:
                self._note(parent, line)
        self._note(path, line)

    def _note(self, path: Path, line: int) -> None:
        self._tables_met.add(path)
        self.found.append((path, line))

    def _line(self) -> int:
        return bisect_right(self._newlines, self._at - 1) + 1

    def _peek(self, mark: str) -> bool:
        return self._text.startswith(mark, self._at)

    def _expect(self, mark: str) -> None:
        if not self._peek(mark):
            raise _NotUnderstood
        self._at += len(mark)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None or not match.group():
            raise _NotUnderstood
        self._at = match.end()
        return match.group()


def _unquoted(part: str) -> str:
    """Return the key that a bare or quoted part means; tomllib knows the escapes."""
    if part[0] not in "\"'":
        return part
    try:
        (key,) = tomllib.loads(f"{part} = 0")
    except tomllib.TOMLDecodeError as error:
        raise _NotUnderstood from error
    return key


def join(path: Sequence[object]) -> str:
    """Return the dotted name of a path of keys and indices."""
    return ".".join(map(str, path))


def duplicates(text: str, table: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (first spelling, second, line of the second) for keys of `table` that differ in `-` only."""
    spellings: dict[str, str] = {}
    for path, line in key_lines(text):
        if len(path) != len(table) + 1 or tuple(map(normalised, path[:-1])) != table:
            continue
        key = path[-1]
        first = spellings.setdefault(normalised(key), key)
        if first != key:
            yield first, key, line
