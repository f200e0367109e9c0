"""`reload`: lets a running instance serve what its file says now; a file that is wrong never reaches it.

The check is the one of `check`, in this process: vLLM's parser is heavy, and the daemon has answers to give meanwhile.
The API keys are the daemon's to judge, who reads them as its own user.
"""

from __future__ import annotations

from llm_serve.cli import control
from llm_serve.cli.check import Verdict, examine_engine, prepare_for_vllm
from llm_serve.core.errors import LlmServeError
from llm_serve.core.plan import EnginePlan
from llm_serve.host.instances import read_instance
from llm_serve.host.names import instance_path


def reload(target: str, json_output: bool) -> int:
    """Check the file, then wait until the instance serves it. Returns 0, or what stands in the way.

    78 a file that is refused, 70 an engine that does not start with it, 75 an instance that is not there or not ready.
    In all of them what served before serves on.
    """
    prepare_for_vllm()
    name = target
    try:
        name = instance_path(target).stem
        if (path := control.find(name)) is None or (now := control.ask(path, "/status")) is None:
            return control.tell(name, _reply(control.TRY_AGAIN, control.NOBODY), json_output=json_output)
        _check(now["source"])
    except LlmServeError as error:
        reply = _reply(error.exit_status, f"{error}\nNothing was changed: the file as it was before serves on.")
        return control.tell(name, reply, json_output=json_output)
    return control.tell(name, control.order(name, "reload", timeout_s=None), json_output=json_output)


def _check(source: str) -> None:
    """Judge the file that the daemon will read."""
    settings, text = read_instance(source)
    examine_engine(Verdict(settings, EnginePlan.from_settings(settings)), text)


def _reply(exit_status: int, message: str) -> dict[str, object]:
    return {"exit_status": exit_status, "message": message}
