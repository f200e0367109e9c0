"""`reset`: forgets what recovery learned about an instance, so that its file counts again.

Files are removed and none is written: a daemon that runs finds them gone before it builds its next engine.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from llm_serve.core.errors import ConfigError, Problem
from llm_serve.host import boot
from llm_serve.host.names import instance_path
from llm_serve.host.state_file import FAILURES, LEARNED, StateFile

_SYSTEM_STATE = Path("/var/lib/llm-serve")
_SYSTEM_RUNTIME = Path("/run/llm-serve")
_ANSWER_TIMEOUT_S = 1.0
_TRY_AGAIN = 75


@dataclass(slots=True)
class Outcome:
    """What a reset did."""

    instance: str
    folders: list[str]
    removed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    is_running: bool = False


def reset(target: str, json_output: bool) -> int:
    """Remove what was learned. Returns 0, also when there was nothing, or 75 when something could not be removed."""
    try:
        name = _name(target)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    outcome = _forget(name)
    if json_output:
        print(json.dumps({each: getattr(outcome, each) for each in Outcome.__dataclass_fields__}, indent=2))
    else:
        _print(outcome)
    for message in outcome.failed:
        print(f"llm-serve: {message}", file=sys.stderr)
    return _TRY_AGAIN if outcome.failed else 0


def _name(target: str) -> str:
    """The instance's name. Its file need not be sound, nor be there: memory must go also when the file went."""
    name = instance_path(target).stem
    if not name.strip("."):
        raise ConfigError([Problem(target, None, "", "does not name an instance", "Give NAME or a file NAME.toml")])
    return name


def _forget(name: str) -> Outcome:
    folders = _state_folders(name)
    outcome = Outcome(name, [str(folder) for folder in folders], is_running=_is_running(name))
    # An ordinary user cannot see into the service's folder: that is an obstacle only where he has none of his own.
    there = [folder for folder in folders if os.access(folder, os.F_OK)]
    for file in (StateFile(folder, each) for folder in there or folders for each in (LEARNED, FAILURES)):
        try:
            if file.forget():
                outcome.removed.append(str(file.path))
        except OSError as error:
            outcome.failed.append(f"cannot remove {file.path}: {error.strerror}. {_remedy(error)}")
    return outcome


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "Run it with sudo, or as the user that the instance runs as."
    return "Make the disk writable, and try again."


def _state_folders(name: str) -> list[Path]:
    """Where a daemon of this name keeps its memory: as its environment says if that is ours, its unit, or the user."""
    user = _user_runtime(name)
    folders = [boot.state_folder(user, os.environ), _SYSTEM_STATE / name, user]
    return [folder for folder in dict.fromkeys(folders) if _is_no_trap(folder)]


def _user_runtime(name: str) -> Path:
    """The folder of `boot.runtime_folder`, which is not made here."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    private = Path(os.environ.get("XDG_RUNTIME_DIR") or _shared_base())
    return Path(given) if given else private / "llm-serve" / name


def _shared_base() -> Path:
    return Path(f"/tmp/llm-serve-{os.getuid()}")  # noqa: S108 - looked at by _is_no_trap


def _is_no_trap(folder: Path) -> bool:
    """False where another user has made our folder in /tmp: behind his links are files that he may not remove."""
    base = _shared_base()
    return not folder.is_relative_to(base) or not base.is_dir() or base.lstat().st_uid == os.getuid()


def _is_running(name: str) -> bool:
    return any(_answers(folder / "control.sock") for folder in (_SYSTEM_RUNTIME / name, _user_runtime(name)))


def _answers(path: Path) -> bool:
    """True when a daemon listens there; the socket alone may be what a killed one left."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_ANSWER_TIMEOUT_S)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _print(outcome: Outcome) -> None:
    for path in outcome.removed:
        print(f"removed {path}")
    if not outcome.removed and not outcome.failed:
        print(f"{outcome.instance}: nothing is remembered in {' or '.join(outcome.folders)}.")
    elif outcome.removed and outcome.is_running:
        print(
            f"{outcome.instance} runs, and its engine stays as it is: the file counts again from the next engine start."
        )
    elif outcome.removed:
        print(f"{outcome.instance} begins with what its file asks for at its next start.")
