"""What README tells its reader to type, to set and to write: read out of README itself, so that tests can hold it to that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+#\s.*$")
_NO_COMMAND = (
    re.compile(r"[A-Za-z0-9_.]+ = \S+"),  # a setting and its value
    re.compile(r"(GET|POST) /\S+"),  # a request
    re.compile(r"\[\w+\] \w+"),  # a setting, with its table
)
_SENTENCES = (
    "vllm serve",
    ": waiting for the engine, 30 s",
    'Status: "starting: loading weights, 40% (engine start 1)"',
)
"""What has blanks in it and is nothing to type: whom we compare ourselves with, what a stream and systemd say."""


@dataclass(frozen=True)
class Command:
    """A line that a reader may copy into a shell, and where it stands."""

    text: str
    section: str


def commands(text: str) -> list[Command]:
    """Every command, in order: indented lines, fenced lines that are not TOML, and code of two words or more.

    It is the exceptions that are listed here, not the programs: what is new counts as a command.
    """
    found, section = [], ""
    for block in _blocks(text):
        if block.startswith("#"):
            section = block.splitlines()[0].lstrip("# ")
        if block.startswith(("    ", "```")):
            lines = [line.strip() for line in block.splitlines() if not line.startswith("```")]
            found += [Command(_COMMENT.sub("", line), section) for line in lines]
        else:
            found += [Command(code, section) for code in _codes(block) if _is_command(code)]
    return found


def options(text: str) -> set[str]:
    """Every option that is named by itself: `--json`, and `--rates` of `--rates 5,10`."""
    return {code.split()[0] for block in _blocks(text) for code in _codes(block) if code.startswith("--")}


def configuration(text: str) -> str:
    """The instance file that is shown, first of all."""
    return fragments(text)[0]


def fragments(text: str) -> list[str]:
    """All TOML that is shown: the file, and parts of others."""
    return [body for language, body in _FENCE.findall(text) if language == "toml"]


def _blocks(text: str) -> list[str]:
    """Paragraphs, tables and blocks of code, without the TOML."""
    without = _FENCE.sub(
        lambda fence: "" if fence[1] == "toml" else f"```\n{fence[2].replace(chr(10) * 2, chr(10))}```", text
    )
    return [block for block in re.split(r"\n{2,}", without) if block.strip()]


def _codes(block: str) -> list[str]:
    return re.findall(r"`([^`]+)`", " ".join(block.split("\n")))


def _is_command(code: str) -> bool:
    if " " not in code or code.startswith("--") or code in _SENTENCES:
        return False
    return not any(pattern.fullmatch(code) for pattern in _NO_COMMAND)
