"""What systemd knows of instances, for those whose daemon is not there to be asked."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_BOOTED = Path("/run/systemd/system")
_TIMEOUT_S = 3.0
_PROPERTIES = "Id,LoadState,ActiveState,SubState,Result,ExecMainStatus,StatusText,StateChangeTimestampMonotonic"


@dataclass(frozen=True, slots=True)
class Unit:
    """One llm-serve@NAME.service: its state in a word, why, and since when (a Unix time), as far as it is known."""

    state: str
    why: str
    since: float | None


def units(names: Iterable[str]) -> dict[str, Unit]:
    """What systemd says of the instances of these names, and of others that it has. Empty where there is no systemd."""
    if not _BOOTED.is_dir():
        return {}
    wanted = [f"llm-serve@{name}.service" for name in names]
    command = ["systemctl", "show", f"--property={_PROPERTIES}", "--", "llm-serve@*.service", *wanted]
    try:
        shown = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return read(shown.stdout, time.time() - time.monotonic())


def read(text: str, booted_at: float) -> dict[str, Unit]:
    """The units in what `systemctl show` prints, by their instance's name; what has no unit file is left out."""
    found = {}
    for block in text.split("\n\n"):
        told = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        name = told.get("Id", "").removeprefix("llm-serve@").removesuffix(".service")
        if name and told.get("LoadState") == "loaded":
            found[name] = _unit(told, booted_at)
    return found


def _unit(told: Mapping[str, str], booted_at: float) -> Unit:
    changed_us = int(told.get("StateChangeTimestampMonotonic") or 0)
    since = booted_at + changed_us / 1e6 if changed_us else None
    active, status = told.get("ActiveState", ""), told.get("ExecMainStatus", "0")
    if told.get("SubState") == "auto-restart":
        return Unit("restarting", _words("systemd starts it again", told), since)
    if active == "failed":
        return Unit("failed", _words(f"{told.get('Result')}, exit status {status}", told), since)
    if active == "inactive":
        return Unit("stopped", "systemd does not run it", since)
    return Unit(active, f"systemd says {active} ({told.get('SubState')})", since)


def _words(why: str, told: Mapping[str, str]) -> str:
    """With what the daemon has said last."""
    return f"{why}: {told['StatusText']}" if told.get("StatusText") else why
