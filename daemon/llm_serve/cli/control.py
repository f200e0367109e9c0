"""Running instances, asked over their control sockets, which only their own user and root may connect to."""

from __future__ import annotations

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
    return next((path for place in places() if (path := place / name / "control.sock").exists()), None)


def find_all() -> dict[str, Path]:
    """Every control socket by its instance's name."""
    return {path.parent.name: path for place in reversed(places()) for path in place.glob("*/control.sock")}


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


def ask(
    path: Path, what: str, *, method: str = "GET", timeout_s: float | None = ANSWER_TIMEOUT_S
) -> dict[str, Any] | None:
    """The answer of whoever listens there, None when nobody does. Without `timeout_s` it may take any time."""
    connection = _Connection(path, timeout_s)
    try:
        connection.request(method, what)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return answer


def order(name: str, what: str, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> dict[str, Any]:
    """What became of an order to an instance: `exit_status` and `message`, also when nobody is there to take it."""
    path = find(name)
    reply = ask(path, f"/{what}", method="POST", timeout_s=timeout_s) if path else None
    return reply or {"exit_status": TRY_AGAIN, "message": NOBODY}


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
