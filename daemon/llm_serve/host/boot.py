"""What must be there before an engine can be started: places to write, and room in them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from llm_serve.core.environment import opening
from llm_serve.core.errors import ConfigError, HostError, Problem

LEAST_FREE_BYTES = 64 << 20
_LONGEST_RUNTIME_BYTES = 107 - len("/e1000/") - 36
"""What a unix socket's path leaves, when an engine's folder and the UUID that vLLM names its sockets by are off."""
_CACHES = ("VLLM_CACHE_ROOT", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """The folders that vLLM, torch, Triton and the hub write to, by the variable that sets each."""
    found = {name: Path(environ[name]) for name in _CACHES if environ.get(name)}
    if "XDG_CACHE_HOME" not in found:
        found["HOME"] = Path(environ.get("HOME") or "/") / ".cache"
    return found


def check_host(environ: Mapping[str, str], allowed: Collection[str] = ()) -> None:
    """Raise ConfigError for what can never be right, HostError for a place that is full at present.

    That is a place that cannot be written (without this, "Model architectures failed to be inspected"), and a variable
    that opens the engine to clients, unless it is one of `allowed`.
    """
    problems = [
        Problem("environment", None, name, f"is refused: {why}.", f'Unset it, or set server.allow_env = ["{name}"].')
        for name, why in opening(environ, allowed)
    ]
    places = cache_folders(environ) | {"TMPDIR": Path(tempfile.gettempdir())}
    for variable, folder in places.items():
        if (error := _write_error(folder)) is not None:
            hint = f"Give the service user write access, or set {variable} to a folder that it can write to."
            problems.append(
                Problem("environment", None, variable, f"cannot write to {folder}: {error.strerror}.", hint)
            )
        elif (free := _free_bytes(folder)) < LEAST_FREE_BYTES:
            raise HostError(
                f"only {free >> 20} MiB are free on the disk of {folder} ({variable}): free at least 64 MiB."
            )
    if problems:
        raise ConfigError(problems)


def _free_bytes(folder: Path) -> int:
    """Room for this folder, which need not exist: a full disk has none for its entry."""
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free


def _write_error(folder: Path) -> OSError | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        return None if error.errno == errno.ENOSPC else error  # full: reported with figures by the caller
    return None


def runtime_folder(name: str, environ: Mapping[str, str]) -> Path:
    """The private folder for this instance's sockets: systemd's, or one of the user's."""
    given = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    private = environ.get("XDG_RUNTIME_DIR", "")
    base = Path(private or f"/tmp/llm-serve-{os.getuid()}")  # noqa: S108 - made private below
    folder = Path(given) if given else base / "llm-serve" / name
    # In a folder that all may write to, whoever makes the first part could put his own in place of the rest.
    for part in (folder,) if given or private else (base, folder):
        try:
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _runtime_error(f"cannot make {part}: {error.strerror}.") from error
        if part.lstat().st_uid != os.getuid():
            raise _runtime_error(f"{part} belongs to another user.")
    return folder


def claim(runtime: Path) -> int:
    """Make this process the only one that uses the folder, until it ends. Returns the descriptor that holds the claim.

    Two daemons with one folder would remove each other's sockets. The folder itself is locked, so nothing is left.
    """
    if (length := len(os.fsencode(runtime))) > _LONGEST_RUNTIME_BYTES:
        limit = f"{length} bytes are too many for the sockets in it, {_LONGEST_RUNTIME_BYTES} are possible"
        raise _runtime_error(f"{runtime}: {limit}.")
    fd = os.open(runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        message = f"an instance of this name runs already: {runtime} is in use. Stop it, or rename this file."
        raise HostError(message) from None
    return fd


def _runtime_error(message: str) -> ConfigError:
    hint = "Set XDG_RUNTIME_DIR, or RuntimeDirectory= of the unit, to a folder that this user owns, with a short path."
    return ConfigError((Problem("environment", None, "RUNTIME_DIRECTORY", message, hint),))


def state_folder(runtime: Path, environ: Mapping[str, str]) -> Path:
    """The folder that outlives the instance's processes: systemd's; outside of a unit the runtime folder."""
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else runtime
