"""Starts engine processes from one preloaded fork server, and knows how to end it.

vLLM starts its processes with `spawn`, and each then imports torch and vllm again: 40 s on two cores. A fork
server that has imported them once brings a rebuild to 8 s. vLLM 0.32 cannot be asked for it (its CPU platform
overwrites the start method with `spawn`), so `install` replaces `get_mp_context` where vLLM looks it up, here
and in the fork server, from which EngineCore starts its workers.

Four things a forked child would otherwise miss are set in `_enter_child`: the environment of the moment it was
started in, the NUMA node that vLLM has chosen (see numa.py), the CPUs and threads that vLLM chose for it (libgomp reads
OMP_* only when it is loaded, which was in the fork server), and its parent's death.
"""

# ruff: noqa: SLF001 - CPython has no public way to stop, find or reuse a fork server

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.util
import multiprocessing as mp
import multiprocessing.context
import multiprocessing.forkserver as stdlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import reduction, resource_tracker, spawn
from pathlib import Path
from typing import Any

from llm_serve.engine import numa
from llm_serve.engine.relay import Receiver
from llm_serve.host import closed_network

ARCHITECTURES_VARIABLE = "LLM_SERVE_ARCHITECTURES"
OUTPUT_VARIABLE = "LLM_SERVE_ENGINE_OUTPUT"
RECORDS_VARIABLE = "LLM_SERVE_ENGINE_RECORDS"
PARENT_VARIABLE = "LLM_SERVE_DAEMON"
_PATCHED_MODULES = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
)
FRONT_ENDS_VARIABLE = "LLM_SERVE_FRONT_ENDS"
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


def start(env: Mapping[str, str], architectures: Iterable[str], receiver: Receiver, folder: Path) -> int:
    """Start the fork server with `env` and return its pid at once; it loads vLLM and these model classes by itself.

    Call it from the main thread: the server dies with the thread that started it. Its own socket, and those of its
    forks, go into `folder`, which multiprocessing would else leave behind among the temporary files.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    mp.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    stdlib._forkserver.set_forkserver_preload(["llm_serve.engine.preload"])
    extra = dict(env) | {
        ARCHITECTURES_VARIABLE: ",".join(architectures),
        OUTPUT_VARIABLE: str(receiver.output_socket),
        RECORDS_VARIABLE: str(receiver.records_socket),
        PARENT_VARIABLE: str(os.getpid()),
        "LD_PRELOAD": _libraries_to_preload(env.get("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))),
        # A pool started in the server would not exist in its forks, which would then wait for it for ever.
        "OMP_NUM_THREADS": "1",
    }
    with environment(extra):
        stdlib.ensure_running()
    return running_pid() or 0


def running_pid() -> int | None:
    """The fork server's pid, or None when none was started."""
    pid: int | None = stdlib._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def is_running() -> bool:
    """True while the fork server lives; somebody may have killed it."""
    pid = running_pid()
    with contextlib.suppress(ChildProcessError):
        # Only looked at: it is for the library to collect.
        return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def stop() -> None:
    """Kill the fork server and forget it; its forks die with it (PR_SET_PDEATHSIG)."""
    server: Any = stdlib._forkserver
    if server._forkserver_pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()


def forget(shared_memory: Iterable[Path]) -> None:
    """Take files that we have removed off the list of the resource tracker, which would complain at its end."""
    for path in shared_memory:
        is_semaphore = path.name.startswith("sem.")
        name = f"/{path.name.removeprefix('sem.')}"
        with contextlib.suppress(OSError, ValueError):
            resource_tracker.unregister(name, "semaphore" if is_semaphore else "shared_memory")


_server = 0
"""The fork server's pid, known in its forks; 0 where the server has not loaded this module."""


def become_server() -> None:
    """This process is the fork server of the daemon that has started it: it ends with it, and adopts its orphans."""
    global _server  # noqa: PLW0603 - a fork has nothing else from its parent
    _server = os.getpid()
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    adopt_orphans()


def install() -> None:
    """Make every later vLLM process of this process a fork of the fork server."""
    stdlib.ForkServer.ensure_running = _ensure_running  # type: ignore[method-assign]
    context = _Context()
    for name in _PATCHED_MODULES:
        if (module := sys.modules.get(name)) is not None:
            module.get_mp_context = lambda: context  # type: ignore[attr-defined]


def start_process(target: Callable[..., Any], args: tuple[Any, ...], env: Mapping[str, str]) -> Any:
    """Fork a process of ours that runs `target` with this environment, and return it once it is there.

    Blocks while the server still loads. Sockets among `args` are handed over.
    """
    inner: tuple[Any, ...] = (dict(env), target, args, {})
    process = multiprocessing.context.ForkServerProcess(target=_enter_child, args=inner)
    process.start()
    return process


def process_of_an_engine(target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A process that is an engine's as those are that vLLM starts, but starts with us. Not started yet.

    It gets the environment of the moment of its `start()`.
    """
    return _Context().Process(target=target, args=args)


class Handed:
    """A descriptor among the arguments of `start_process`; there, it is a descriptor of the new process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _take_over, (reduction.DupFd(self._descriptor),)


def _take_over(handed: Any) -> int:
    return int(handed.detach())


def outlive_the_server(name: str) -> None:
    """In a fork that is no engine's: be called `name`, and do not end when the server does."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, 0)
    libc.prctl(_PR_SET_NAME, name.encode())


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Any:
    """Set variables for the length of a block. Processes started inside inherit them, and vLLM looks at them again."""
    before = {name: os.environ.get(name) for name in changes}
    forget_settings()
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def remember_settings() -> None:
    """Let vLLM read its environment variables once, until the next `environment`: now with every token, several times.

    Call it when an engine has been built.
    """
    with contextlib.suppress(Exception):  # of a value that means nothing, whoever uses it tells
        importlib.import_module("vllm.envs").enable_envs_cache()


def forget_settings() -> None:
    """Let vLLM, where it is loaded, read its environment variables whenever it wants one."""
    envs: Any = sys.modules.get("vllm.envs")
    if hasattr(envs, "disable_envs_cache"):
        envs.disable_envs_cache()


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that made it ends, whatever ends it.

    `parent` is its pid, which only the parent itself knows for sure: it may be gone already, and 1 is a parent like any
    other in a container.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent died, so that they can be found, killed and reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _libraries_to_preload(already: str) -> str:
    """What vLLM's CPU platform puts into LD_PRELOAD for a spawned worker: a fork cannot load it any more."""
    vllm, torch = _package("vllm"), _package("torch")
    allocator = sorted((vllm / "libs").glob("libtcmalloc_minimal*.so*")) if vllm else []
    if not allocator or not torch:
        return already
    openmp = sorted([*(torch.parent / "torch.libs").glob("libgomp*.so*"), *(torch / "lib").glob("libgomp*.so*")])
    chosen = [] if "tcmalloc" in already else allocator[:1]
    chosen += [] if "omp" in already else openmp[:1]
    return ":".join([*map(str, chosen), *([already] if already else [])])


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


_stdlib_ensure_running = stdlib.ForkServer.ensure_running


def _ensure_running(self: Any) -> None:
    """A fork reuses the server that made it. CPython up to 3.13 would start a second one (it looks at its pid)."""
    with _own_interpreter():
        if self._forkserver_pid is None and self._forkserver_address and self._forkserver_alive_fd is not None:
            resource_tracker.ensure_running()
            return
        _stdlib_ensure_running(self)


@contextlib.contextmanager
def _own_interpreter() -> Iterator[None]:
    """Around the start of a process vLLM puts `numactl` in Python's place: that is not meant for the server."""
    chosen = spawn.get_executable()
    spawn.set_executable(sys.executable)
    try:
        yield
    finally:
        spawn.set_executable(chosen)


class _EnvironmentOfStart:
    """Arrives as the variables of the moment in which it is sent: some of vLLM's are set around `start()` alone."""

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        return dict, (dict(os.environ),)


class _Context(multiprocessing.context.ForkServerContext):
    """The fork-server context whose processes, all of them an engine's, start in `_enter_engine`."""

    def Process(  # type: ignore[override]  # noqa: N802 - the library's name
        self, *, target: Any = None, args: Any = (), kwargs: Any = None, **more: Any
    ) -> Any:
        inner = (_EnvironmentOfStart(), target, args, kwargs or {})
        return multiprocessing.context.ForkServerProcess(target=_enter_engine, args=inner, **more)


def _enter_engine(env: dict[str, str], *call: Any) -> Any:
    # Before the first thread: what closes the network holds for this one and all that come of it.
    if broker := env.get(closed_network.VARIABLE):
        closed_network.confine(Path(broker))
    return _enter_child(env, *call)


def _enter_child(env: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    die_with_parent(_server or os.getppid())
    _be_killed_before_the_daemon()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    numa.bind(os.environ.pop(numa.ARGUMENTS_VARIABLE, ""))  # it is this process's, not its children's
    _take_cpus(env)
    forget_settings()
    return target(*args, **kwargs)


def _be_killed_before_the_daemon() -> None:
    """The unit lowers the daemon's OOM score; its engine should be what the kernel takes first."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(score.read_text()) < 0:
            score.write_text("0")


def _take_cpus(env: Mapping[str, str]) -> None:
    """Do what libgomp would have done with vLLM's OMP settings, had it been loaded in this process."""
    cpus = {int(cpu) for cpu in env.get("GOMP_CPU_AFFINITY", "").split()}
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)
    torch: Any = sys.modules.get("torch")
    threads = env.get("OMP_NUM_THREADS", "")
    if torch is not None:
        available = len(os.sched_getaffinity(0))
        torch.set_num_threads(int(threads) if threads.isdigit() else available)
