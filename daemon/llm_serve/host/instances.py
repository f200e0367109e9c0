"""Finds instance files and API keys on this machine, and reads them.

Everything that can be wrong with a file as a file is said here; what is wrong in it, the core says.
A key never reaches a message, a log or a repr.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.settings import Settings
from llm_serve.host.names import CONFIG_DIRECTORY, instance_names, instance_path

CREDENTIAL = "api-keys"
MIN_KEY_CHARACTERS = 8


def read_instance(target: str, directory: Path = CONFIG_DIRECTORY) -> tuple[Settings, str]:
    """Return the settings of NAME|FILE and the text they were read from, or raise ConfigError."""
    path = instance_path(target, directory)
    text = read_text(path, directory)
    return parse_instance(text, source=str(path), name=path.stem), text


def read_text(path: Path, directory: Path = CONFIG_DIRECTORY) -> str:
    """Return the text of a file of settings, or raise ConfigError with why it cannot be read, and who could.

    `directory` is where an instance of a similar name may be.
    """
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise _refused(path, "does not exist", _which_exist(path, directory)) from error
    except IsADirectoryError as error:
        raise _refused(path, "is a folder, not a file", None) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([Problem(str(path), line, "", "is not UTF-8", "Save it as UTF-8")]) from error
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}", _who_may_read(error)) from error


def _refused(path: Path, message: str, hint: str | None) -> ConfigError:
    return ConfigError([Problem(str(path), None, "", message, hint)])


def _who_may_read(error: OSError) -> str | None:
    return "Let this user read it, or use sudo" if isinstance(error, PermissionError) else None


def _which_exist(path: Path, directory: Path) -> str:
    names = instance_names(directory)
    if not names:
        return f"There is no instance in {directory} yet"
    nearest = get_close_matches(path.stem, names, n=1)
    meant = f"Did you mean {nearest[0]}? " if nearest else ""
    return f"{meant}Instances in {directory}: {', '.join(names)}"


def read_api_keys(settings: Settings, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the keys that clients may use: of server.api_keys, else of the systemd credential, else none.

    Raises ConfigError when a file of keys is named and cannot be used: a server that was meant to have
    keys must not come up without them.
    """
    if settings.server.api_keys is not None:
        return _keys_of(Path(settings.server.api_keys), settings, guarded=True)
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(credentials) / CREDENTIAL if credentials else None
    if credential is not None and credential.exists():
        # systemd keeps the folder to the unit's user; the mode of the file in it is systemd's affair.
        return _keys_of(credential, settings, guarded=False)
    return ()


def _keys_of(path: Path, settings: Settings, *, guarded: bool) -> tuple[str, ...]:
    try:
        mode = path.stat().st_mode
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        # Not chained: the error holds the bytes of the keys.
        raise _key_error(settings, [f"{path} is not UTF-8"]) from None
    except OSError as error:
        raise _key_error(settings, [f"{path} cannot be read: {error.strerror}"]) from error
    keys = tuple(_keys_in(text))
    problems = list(_key_problems(path, text))
    if guarded and mode & stat.S_IROTH:
        problems.insert(0, f"{path} can be read by every user: `chmod o-r {path}`")
    if problems:
        raise _key_error(settings, problems)
    return keys


def _keys_in(text: str) -> Iterator[str]:
    """Yield each key once, in the order of the file."""
    lines = (line.strip() for line in text.splitlines())
    yield from dict.fromkeys(line for line in lines if line and not line.startswith("#"))


def _key_problems(path: Path, text: str) -> Iterator[str]:
    if not any(_keys_in(text)):
        yield f"{path} has no key in it"
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < MIN_KEY_CHARACTERS:
            yield f"{path}:{number}: the key is shorter than {MIN_KEY_CHARACTERS} characters"
        # A header carries visible ASCII; any other key could never be sent by a client.
        if not all("!" <= character <= "~" for character in key):
            yield f"{path}:{number}: a key must not have blanks or other than ASCII characters"


def _key_error(settings: Settings, messages: list[str]) -> ConfigError:
    return ConfigError(Problem(settings.source, None, "server.api_keys", message) for message in messages)
