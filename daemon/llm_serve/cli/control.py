"""Running instances, asked over their control sockets, which only their own user and root may connect to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT_S = 5.0
TRY_AGAIN = 75
NOBODY = "does not run here, or not for this user."


def places() -> list[Path]:
    """Where instances have their folders: the service's and this user's."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/llm-serve-{os.getuid()}"  # noqa: S108 - see boot.runtime_folder
    return [Path("/run/llm-serve"), Path(base) / "llm-serve"]


def find(name: str) -> Path | None:
    """The control socket of an instance that runs, or has been killed; None when there is none."""
    return next((path for place in places() if _is_there(path := place / name / "control.sock")), None)


def find_all() -> dict[str, Path]:
    """Every control socket by its instance's name."""
    found: dict[str, Path] = {}
    for place in reversed(places()):
        with contextlib.suppress(OSError):
            sockets = (folder / "control.sock" for folder in place.iterdir())
            found |= {path.parent.name: path for path in sockets if _is_there(path)}
    return found


def _is_there(path: Path) -> bool:
    """Also where this user may not look: who asks there is told so."""
    try:
        return path.exists()
    except PermissionError:
        return True


class _Connection(http.client.HTTPConnection):
    """HTTP over the control socket."""

    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the path instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_TIMEOUT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(self.timeout)


def fetch(path: Path, what: str, *, method: str = "GET", timeout_s: float | None = ANSWER_TIMEOUT_S) -> bytes:
    """The body of an answer, with any status. Without `timeout_s` it may take any time.

    Raises PermissionError where the socket is another user's, TimeoutError where somebody listens and does not answer,
    and OSError where nobody listens, or what is said is no HTTP.
    """
    connection = _Connection(path, timeout_s)
    try:
        connection.request(method, what)
        return connection.getresponse().read()
    except BlockingIOError as error:  # so many ask already that no more are let in
        raise TimeoutError(str(error)) from error
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def ask(
    path: Path, what: str, *, method: str = "GET", timeout_s: float | None = ANSWER_TIMEOUT_S
) -> dict[str, Any] | None:
    """The answer of whoever listens there, None when nobody does."""
    try:
        return _object(fetch(path, what, method=method, timeout_s=timeout_s))
    except (OSError, ValueError):
        return None


def _object(body: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(body)
    return value


def silence(error: Exception) -> str:
    """Why there was no answer, for `NAME ...`."""
    if isinstance(error, PermissionError):
        return "is another user's: ask as root (sudo), or as the user that it runs as."
    if isinstance(error, TimeoutError):
        return "runs and does not answer: its journal may say why."
    return NOBODY


def order(name: str, what: str, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> dict[str, Any]:
    """What became of an order to an instance: `exit_status` and `message`, also when nobody is there to take it."""
    if (path := find(name)) is None:
        return {"exit_status": TRY_AGAIN, "message": NOBODY}
    try:
        return _object(fetch(path, f"/{what}", method="POST", timeout_s=timeout_s))
    except (OSError, ValueError) as error:
        return {"exit_status": TRY_AGAIN, "message": silence(error)}


def tell(name: str, reply: dict[str, Any], *, json_output: bool) -> int:
    """Print what became of an order, on stderr if nothing did. Returns the exit status."""
    status = int(reply["exit_status"])
    if json_output:
        print(json.dumps({"instance": name, **reply}, indent=2))
    elif status:
        print(f"llm-serve: {name}: {reply['message']}", file=sys.stderr)
    else:
        print(f"{name}: {reply['message']}")
    return status
