"""Text in the cells of a terminal: how wide it is there, and how it is cut and padded to fit.

What comes from a model's name or an error may hold anything; nothing of it may move the cursor or break a line.
"""

from __future__ import annotations

import unicodedata

_CUT = "…"
_WIDE = frozenset("WF")
_CONTROL = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_MARKS = frozenset({"Mn", "Me"})
"""What has no cell of its own; terminals differ in how they show those that do not compose."""


def plain(text: str) -> str:
    """The text on one line, composed, with what a terminal would not just show taken out; blanks are one each."""
    shown = _without(_CONTROL, " ".join(text.split()))
    shown = _without(_MARKS, unicodedata.normalize("NFC", shown))
    return " ".join(unicodedata.normalize("NFC", shown).split())


def _without(categories: frozenset[str], text: str) -> str:
    return "".join(each for each in text if unicodedata.category(each) not in categories)


def cells(text: str) -> int:
    """How many cells plain text takes."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in _WIDE else 1


def clip(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits, with a sign that it goes on."""
    if cells(text) <= width:
        return text
    kept, room = "", width - 1
    for character in text:
        room -= _cells_of(character)
        if room < 0:
            break
        kept += character
    return f"{kept}{_CUT}" if width > 0 else ""


def pad(text: str, width: int, *, right: bool = False) -> str:
    """The text in so many cells at least, to the left or to the right of them."""
    blanks = " " * (width - cells(text))
    return blanks + text if right else text + blanks


def between(left: str, right: str, width: int) -> str:
    """Both in one line, as far apart as can be; the left one gives way."""
    right = clip(right, width)
    room = width - cells(right)
    return pad(clip(left, max(0, room - 1)), room) + right
