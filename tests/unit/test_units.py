"""The shipped units, held to what the oldest systemd that is served understands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted(path for path in (ROOT / "systemd").iterdir() if path.is_file())
NEWER = {("Service", "RestartSteps"), ("Service", "RestartMaxDelaySec")}
"""Of systemd 254. Older ones warn, and pause RestartSec each time."""


def directives(text: str) -> Iterator[tuple[str, str]]:
    """(section, name) of every assignment of a unit."""
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line.strip()):
            section = found[1]
        elif found := re.match(r"(\w+)=", line):
            yield section, found[1]


def known_to_249() -> set[tuple[str, str]]:
    """All that systemd 249 has, as it says itself."""
    known, section = set(), ""
    for line in (ROOT / "packaging/systemd-249.txt").read_text().splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        elif not line.startswith("#"):
            known |= {(section, word) for word in line.split()}
    return known


def test_systemd_249_knows_every_directive_but_those_that_it_may_ignore() -> None:
    used = {each for unit in UNITS for each in directives(unit.read_text())}

    assert NEWER == used - known_to_249()


def test_a_directive_of_a_newer_systemd_is_noticed() -> None:
    """The list is of 249 and no later: 250, 251, 253 and 254 each brought one of these."""
    newer = {"ExitType", "ExtensionDirectories", "OpenFile", "RestartMode"}
    text = "[Service]\n" + "".join(f"{name}=x\n" for name in newer)

    assert newer == {name for _, name in set(directives(text)) - known_to_249()}


def test_no_service_is_of_a_type_that_249_does_not_know() -> None:
    """`notify-reload` (253) would become `simple`, without any readiness, and only a line in the journal says so."""
    types = {found for unit in UNITS for found in re.findall(r"^Type=(\S+)", unit.read_text(), re.MULTILINE)}

    assert "notify" in types
    assert types <= {"simple", "exec", "forking", "oneshot", "dbus", "notify", "idle"}
