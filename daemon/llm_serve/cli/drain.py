"""`drain` and `resume`: stop and resume the admission of requests to an engine that goes on."""

from __future__ import annotations

import sys
import time
from typing import Any

from llm_serve.cli import control
from llm_serve.core.errors import ConfigError
from llm_serve.host.names import instance_path

_LOOK_EVERY_S = 0.1


def drain(target: str, wait: bool, json_output: bool) -> int:
    """Let new requests wait. With `wait`, return when those in flight have finished.

    Returns 0, also when admission was stopped already; 75 when nobody is there, or somebody resumed or stopped the
    instance meanwhile; 78 for what names no instance.
    """
    try:
        name = instance_path(target).stem
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    reply = control.order(name, "drain")
    if wait and not reply["exit_status"]:
        reply = _wait(name, reply)
    return control.tell(name, reply, json_output=json_output)


def resume(target: str, json_output: bool) -> int:
    """Let requests through again. Returns 0, also when they were let through already, or 75 when nobody is there."""
    try:
        name = instance_path(target).stem
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return control.tell(name, control.order(name, "resume"), json_output=json_output)


def _wait(name: str, reply: dict[str, Any]) -> dict[str, Any]:
    """The reply when nothing is in flight any more, or why that is not waited for any longer."""
    while True:
        path = control.find(name)
        now = control.ask(path, "/status") if path else None
        if now is None:
            return {"exit_status": control.TRY_AGAIN, "message": "has ended while its requests were waited for."}
        if not now["is_drained"]:
            return {"exit_status": control.TRY_AGAIN, "message": "admission was resumed meanwhile."}
        if now["requests_in_flight"] <= now["requests_held"]:
            held = now["requests_held"]
            return reply | {"message": f"{reply['message']} Nothing is in flight; {held} wait.", "requests_held": held}
        time.sleep(_LOOK_EVERY_S)
