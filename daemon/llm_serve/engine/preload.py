"""Imported inside the fork server, and only there: loads what every engine process needs, once.

It never touches a GPU: a CUDA context made here would be broken in every fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import pkgutil
import socket
from collections.abc import Iterator

from llm_serve.engine import forkserver, grammars, loading, orphans, relay, startup_plans

_ALWAYS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm.v1.structured_output")
_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.v1.attention.backends.cpu_attn")
_CUDA = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    # What these would load by themselves in the middle of a start, and every start anew.
    "vllm.compilation.backends",
    "vllm.compilation.caching",
    "vllm.compilation.piecewise_backend",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.models.qwen3_vl",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.utils.jit_monitor",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.attention.backends.turboquant_attn",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.worker.gpu.model_states.default",
    "torch.fx.experimental.validator",
    "torch._inductor.compile_fx",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.pad_mm",
    "torch._inductor.fx_passes.fuse_attention",
    "sympy.tensor.tensor",
)
_FRONT_END = ("llm_serve.front_ends.front_end", *loading.DAEMON_IMPORTS)
"""What front ends share the memory of, where they are forked as well; the first engine waits for it."""


def _write_to(output: str) -> None:
    """Send this process's output, and that of all its forks, to the daemon, which knows where logs go."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sink:
        sink.connect(output)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)


def _modules(architectures: list[str]) -> Iterator[str]:
    """The modules to load, in an order in which one that fails leaves most of the others loaded."""
    yield from _ALWAYS
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield from _CPU
    else:
        yield from _CUDA
        yield from _below("torch._inductor.fx_passes.serialized_patterns")
    from vllm.model_executor.models import registry

    for architecture in architectures:
        if known := registry._VLLM_MODELS.get(architecture):  # noqa: SLF001 - its public face imports the model
            yield f"vllm.model_executor.models.{known[0]}"
    if os.environ.get(forkserver.FRONT_ENDS_VARIABLE):
        yield from _FRONT_END


def _below(package: str) -> Iterator[str]:
    """The modules of a package; none where it is missing."""
    with contextlib.suppress(ImportError):
        yield from (
            each.name for each in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
        )


def _load(names: Iterator[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a module that this machine lacks only makes forks slower
            logging.getLogger("llm_serve.fork_server").warning("preload of %s failed: %s", name, error)


def _freeze() -> None:
    """Take what has been loaded out of the collector's sight, in every fork and for good.

    A start makes the collector walk the whole heap seven times, 0.35 s each on a fast machine; in a fork each walk also
    copies the pages that it touches. vLLM takes everything back into sight once graphs are captured: not this.
    """
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def _hash_sources() -> None:
    """Let Triton and torch read their own files now: every process would hash them anew to find what is cached."""
    for module, function in (("triton.runtime.cache", "triton_key"), ("torch._inductor.codecache", "torch_key")):
        with contextlib.suppress(Exception):  # where there is no Triton, or one that keeps this elsewhere
            getattr(importlib.import_module(module), function)()


def _tell_ends() -> None:
    """Have this process, which collects what it has forked, tell the daemon how each of them ended.

    Nobody else knows it of a worker: EngineCore, which has started it, only sees that it is gone.
    """
    waitpid, server, log = os.waitpid, os.getpid(), logging.getLogger("llm_serve.fork_server")

    def and_tell(pid: int, options: int) -> tuple[int, int]:
        found, status = waitpid(pid, options)
        if found and os.getpid() == server and (code := os.waitstatus_to_exitcode(status)):
            level = logging.WARNING if code < 0 else logging.INFO
            how = f"signal {-code}" if code < 0 else f"status {code}"
            more = {"ended": (found, code)}
            log.log(level, "process %d has ended with %s", found, how, extra=more)
        return found, status

    os.waitpid = and_tell


def _log_to(records: str) -> None:
    """Send what is logged here to the daemon as the engine's processes do."""
    logger = logging.getLogger("llm_serve.fork_server")
    logger.addHandler(relay.RelayHandler(records))
    logger.setLevel(logging.INFO)
    logger.propagate = False


# Ctrl-C in a terminal, and `timeout`, signal the whole process group: the daemon must drain before its engine ends.
# Not a session: the kernel (sched_autogroup) shares the CPU between sessions, and on CPUs an engine that spins for its
# worker had left the daemon 0.1 of a core; in one session both get what they need.
os.setpgid(0, 0)
forkserver.become_server()
_write_to(os.environ.get(forkserver.OUTPUT_VARIABLE, ""))
_log_to(os.environ.get(forkserver.RECORDS_VARIABLE, ""))
_load(_modules([name for name in os.environ.get(forkserver.ARCHITECTURES_VARIABLE, "").split(",") if name]))
forkserver.install()
startup_plans.install()
orphans.install()
grammars.install_in_engines()
_hash_sources()
_tell_ends()
_freeze()
