"""Makes vLLM fail on cue, for faults that nothing real causes on a CPU.

Python runs this in every process that has this folder on its PYTHONPATH. LLM_SERVE_FAULT_FILE names a JSON file that
is read at each of the functions below: {"at": "execute_model", "do": "oom", "times": 1, "after": 0, "token": null}. With
a token, only a batch that brings a prompt with it is meant: a request that kills. Each time a fault
is made, a line is added to that file's name + ".made": a test looks there whether its fault has really happened.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from importlib.util import spec_from_loader  # noqa: F401 - imported early: the finder below must not import
from pathlib import Path
from types import ModuleType
from typing import Any

_FILE = os.environ.get("LLM_SERVE_FAULT_FILE", "")
_WHERE = {
    "vllm.v1.worker.cpu_worker": ("CPUWorker", ("init_device", "load_model", "determine_available_memory")),
    "vllm.v1.worker.cpu_model_runner": ("CPUModelRunner", ("profile_run", "initialize_kv_cache", "warming_up_model")),
    "vllm.v1.worker.gpu_worker": ("Worker", ("init_device",)),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner", ("execute_model",)),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner", ("execute_model",)),
    "vllm.v1.core.sched.scheduler": ("Scheduler", ("schedule",)),
    "vllm.v1.engine.output_processor": ("OutputProcessor", ("process_outputs",)),
}


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.57 GiB of which 300.06 MiB "
        "is free. Including non-PyTorch memory, this process has 23.26 GiB memory in use."
    )


def _error() -> None:
    raise RuntimeError("injected")


def _spin() -> None:
    while True:
        pass


def _illegal() -> None:
    """A kernel of the CUDA context of this process writes past its memory; no other process is touched."""
    import torch

    far = torch.tensor([1 << 40], device="cuda")
    torch.zeros(1, device="cuda").index_put_((far,), torch.ones(1, device="cuda"))
    torch.cuda.synchronize()


def _reach_out(address: str) -> None:
    """Connect to the address, and write down what came of it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        said = "connected"
    except OSError as error:
        said = type(error).__name__
    Path(f"{_FILE}.said").write_text(said)


_DO: dict[str, Callable[[], None]] = {
    "oom": _out_of_memory,
    "error": _error,
    "spin": _spin,
    "sleep": lambda: time.sleep(3600),
    "exit": lambda: os._exit(1),
    "abort": os.abort,
    "illegal": _illegal,
}


def _brings(token: int, scheduled: Any) -> bool:
    """True when one of the batch's new requests has this token in its prompt."""
    return any(token in (new.prompt_token_ids or ()) for new in scheduled.scheduled_new_reqs)


def _fault(name: str, args: tuple[Any, ...]) -> None:
    try:
        order = json.loads(Path(_FILE).read_text())
    except (OSError, ValueError):
        return
    token = order.get("token")
    if order.get("at") != name or (token is not None and not _brings(token, args[1])):
        return
    made = Path(_FILE + ".made")
    seen = made.read_text().splitlines() if made.exists() else []
    passed = seen.count("passed")
    if passed < order.get("after", 0):
        made.write_text("\n".join([*seen, "passed"]) + "\n")
        return
    if len(seen) - passed >= order.get("times", 1):
        return
    with made.open("a") as lines:
        lines.write(f"{name} {order['do']} {os.getpid()}\n")
    if (address := order["do"].removeprefix("reach out to ")) != order["do"]:
        _reach_out(address)
    else:
        _DO[order["do"]]()


def _wrapped(name: str, method: Any) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        _fault(name, args)
        return method(*args, **options)

    # The classification reads the names of frames: the fault must look as if it came from the function itself.
    run.__code__ = run.__code__.replace(co_name=name)
    run.__name__ = name
    return run


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the functions as soon as their module has been loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _WHERE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                owner, methods = _WHERE[name]
                for each in methods:
                    found = getattr(getattr(module, owner), each, None)
                    if found is not None:
                        setattr(getattr(module, owner), each, _wrapped(each, found))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _FILE:
    sys.meta_path.insert(0, _Finder())
