"""Small JSON files that outlive the daemon: what was learned, and the last failures.

A reader sees the old value or the new one, whole, whatever ends the writer or the machine in between. A file that is
damaged is worth less than a start without it, so nothing here raises for it: there is a warning, and the file is
ignored. One process writes; any may forget.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LEARNED = "learned.json"
FAILURES = "failures.json"
MAX_BYTES = 1 << 20
MAX_FAILURES = 10

_FAILURES_FORMAT = 1
_WHEN_IGNORED = {
    LEARNED: "The plan starts from the instance file.",
    FAILURES: "The failures in it are not shown.",
}
_WHEN_UNWRITTEN = {
    LEARNED: "What was learned is lost when the daemon ends.",
    FAILURES: "This failure is in the journal only.",
}
_BULK = ("output_tail", "kernel_log")


class _UnusableError(Exception):
    """The file is no state that can be believed; the message says why."""


class StateFile:
    """One file of a state folder."""

    def __init__(self, folder: Path, name: str = LEARNED) -> None:
        self._folder, self._name = folder, name
        self.path = folder / name

    def read(self) -> tuple[dict[str, Any] | None, str | None]:
        """The value, if there is one, and a warning, if the file is there and cannot be believed.

        (None, None) means that there is no file.
        """
        try:
            return _decode(self._content()), None
        except FileNotFoundError:
            return None, None
        except OSError as error:
            # What O_NOFOLLOW answers for a link.
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else f"it cannot be read: {error.strerror}"
        except _UnusableError as error:
            reason = str(error)
        return None, f"{self.path} is ignored: {reason}. {_WHEN_IGNORED.get(self._name, '')}".rstrip()

    def write(self, value: Mapping[str, Any]) -> str | None:
        """Put `value`, which is made of JSON values, in the old one's place. Returns a warning if that was impossible.

        After it, the value is on the disk, not only on its way there.
        """
        try:
            content = _encode(value)
            if len(content) > MAX_BYTES:
                return self._unwritten(f"{len(content)} bytes are more than the {MAX_BYTES} that are read back")
            self._replace(content)
        except OSError as error:
            return self._unwritten(error.strerror or str(error))
        except (TypeError, ValueError, RecursionError) as error:
            return self._unwritten(f"it is not made of JSON values ({error})")
        return None

    def forget(self) -> bool:
        """Remove the file, and what killed writers left. Returns whether there was one; raises OSError."""
        self._remove_leftovers()
        try:
            self.path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        with contextlib.suppress(OSError):
            self._sync_folder()
        return True

    def _unwritten(self, reason: str) -> str:
        return f"{self.path} cannot be written: {reason}. {_WHEN_UNWRITTEN.get(self._name, '')}".rstrip()

    def _content(self) -> bytes:
        # Without O_NONBLOCK the opening of a named pipe waits for a writer.
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise _UnusableError("it is not a regular file")
            if found.st_uid != os.geteuid():
                raise _UnusableError(f"it belongs to another user (id {found.st_uid})")
            with open(fd, "rb", closefd=False) as file:
                content = file.read(MAX_BYTES + 1)
        finally:
            os.close(fd)
        if len(content) > MAX_BYTES:
            raise _UnusableError(f"it is larger than {MAX_BYTES} bytes")
        return content

    def _replace(self, content: bytes) -> None:
        self._remove_leftovers()
        temporary = self._folder / f".{self._name}.{secrets.token_hex(8)}.tmp"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123 - Path.open() takes no permissions
                file.write(content)
                file.flush()
                # Else a power cut can leave the new name with nothing behind it.
                os.fsync(fd)
            os.replace(temporary, self.path)  # noqa: PTH105 - os, as all around it
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._sync_folder()

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob(f".{self._name}.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _sync_folder(self) -> None:
        """The name is in the folder, which has to reach the disk like the file."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def append_failure(folder: Path, entry: Mapping[str, Any]) -> str | None:
    """Remember one more failure, {"time", "failure", "evidence"}, and forget all but the last ten.

    They are whole while they fit into the file; else the oldest lose what their processes wrote and did first.
    Returns a warning if earlier ones cannot be read, or this one not be written.
    """
    file = StateFile(folder, FAILURES)
    value, ignored = file.read()
    entries = [_plain(entry), *_failures(value)][:MAX_FAILURES]
    unwritten = file.write(_fitting(entries))
    return " ".join(warning for warning in (ignored, unwritten) if warning) or None


def _failures(value: dict[str, Any] | None) -> list[dict[str, Any]]:
    found = (value or {}).get("failures")
    if value is None or value.get("format") != _FAILURES_FORMAT or not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, dict)]


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry as JSON values: for people, words are better than the loss of what is no JSON."""
    text = json.dumps(
        dict(entry), skipkeys=True, default=lambda each: dict(each) if isinstance(each, Mapping) else str(each)
    )
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain


def _fitting(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The first version that fits into the file; the smallest if none does."""
    value: dict[str, Any] = {}
    for some in _smaller(entries):
        value = {"format": _FAILURES_FORMAT, "failures": some}
        if len(_encode(value)) <= MAX_BYTES:
            break
    return value


def _smaller(entries: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    yield entries
    kept = list(entries)
    for index in reversed(range(len(kept))):
        kept[index] = _without_bulk(kept[index])
        yield list(kept)
    while len(kept) > 1:
        kept.pop()
        yield list(kept)
    yield [{name: value for name, value in kept[0].items() if name != "evidence"}]


def _without_bulk(entry: dict[str, Any]) -> dict[str, Any]:
    evidence = entry.get("evidence")
    if not isinstance(evidence, dict):
        return entry
    kept = {name: value for name, value in evidence.items() if name not in _BULK}
    if isinstance(errors := kept.get("errors"), list):
        kept["errors"] = [{**each, "frames": []} if isinstance(each, dict) else each for each in errors]
    return {**entry, "evidence": kept}


def _encode(value: Mapping[str, Any]) -> bytes:
    """The value beside its checksum, as text for people."""
    plain = json.loads(json.dumps(dict(value), allow_nan=False))
    text = json.dumps(
        {"checksum": _checksum(plain), "value": plain}, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False
    )
    # Bytes of a foreign program that were no text came here as lone surrogates; JSON has an escape for those.
    return f"{text}\n".encode(errors="backslashreplace")


def _decode(content: bytes) -> dict[str, Any]:
    if not content:
        raise _UnusableError("it is empty")
    try:
        return _verified(json.loads(content.decode()))
    except UnicodeDecodeError:
        raise _UnusableError("it is damaged: not UTF-8") from None
    except RecursionError:
        raise _UnusableError("it is damaged: nested too deeply") from None
    except ValueError as error:
        raise _UnusableError(f"it is cut off or damaged: not JSON ({error})") from None


def _verified(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise _UnusableError("it holds no JSON object")
    if found.keys() != {"checksum", "value"} or not isinstance(value := found["value"], dict):
        raise _UnusableError("it was not written by llm-serve")
    if found["checksum"] != _checksum(value):
        raise _UnusableError("its checksum does not fit: it was damaged, or changed by hand")
    return value


def _checksum(value: dict[str, Any]) -> str:
    """One changed bit can make another number that is valid too, so syntax alone proves nothing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
