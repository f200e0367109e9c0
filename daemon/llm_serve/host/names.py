"""What instances are called, and where their files are. Loads nothing that a command would wait for."""

from __future__ import annotations

import re
from pathlib import Path

from llm_serve.core.errors import ConfigError, Problem

CONFIG_DIRECTORY = Path("/etc/llm-serve")
ROUTER = "router"
"""No instance can be called so: the router's own file lies beside theirs."""

# What systemd takes as %i, less what a path or a shell would read another way.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def instance_names(directory: Path = CONFIG_DIRECTORY) -> tuple[str, ...]:
    """Return the names of the instances that have a file, in order."""
    try:
        return tuple(sorted(path.stem for path in directory.glob("*.toml") if _is_instance(path.stem)))
    except OSError:
        return ()


def instance_path(target: str, directory: Path = CONFIG_DIRECTORY) -> Path:
    """Return the file that a command's NAME|FILE means.

    A file when it has a slash, ends in .toml or exists here; else NAME, which is DIRECTORY/NAME.toml.
    """
    if "/" in target or target.endswith(".toml") or Path(target).is_file():
        return Path(target)
    if not _NAME.fullmatch(target):
        message = "is not the name of an instance: letters, digits, _ . and - can be in one"
        raise ConfigError([Problem(target or '""', None, "", message)])
    if target == ROUTER:
        message = "is the router's file, not an instance: see `llm-serve router`"
        raise ConfigError([Problem(str(directory / "router.toml"), None, "", message)])
    return directory / f"{target}.toml"


def _is_instance(name: str) -> bool:
    return name != ROUTER and _NAME.fullmatch(name) is not None
