"""Run as a program: loads vLLM once, then tries each attention backend in a fork, and prints what came of it as JSON.

It never touches a GPU itself: a CUDA context made here would be broken in every fork. A fork that hangs says where it
stands before it is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing as mp
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from llm_serve.core.doctor.attention import Outcome, Shape, TorchFacts, Trial
from llm_serve.engine import attention_layer, forkserver
from llm_serve.engine.attention_layer import WrongNumbersError
from llm_serve.host.processes import children

_SURVEY_TIMEOUT_S = 30.0
_DUMP_S = 1.0
_LAST_WORDS_S = 0.1
_LONGEST_DETAIL = 400
_LATENT_HEAD = 576
"""What DeepSeek's models keep of a token."""


@dataclass(frozen=True, slots=True)
class End:
    """How a fork ended: what it returned, or the error, or how it died."""

    value: Any = None
    outcome: Outcome = Outcome.ran
    detail: str = ""
    seconds: float = 0.0


def main() -> None:
    """Answer the question on stdin. Everything that vLLM prints goes to stderr."""
    forkserver.die_with_parent(os.getppid())
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        question = json.load(sys.stdin)
        with tempfile.TemporaryDirectory(prefix="llm-serve-doctor-") as folder:
            shape = Shape(**question["shape"])
            json.dump(answer(shape, question["wanted"], question["timeout_s"], Path(folder)), answers)


def answer(shape: Shape, wanted: list[str], timeout_s: float, folder: Path) -> dict[str, Any]:
    """The facts, as engine/attention.py reads them."""
    attention_layer.register_model()
    survey = Fork(partial(_survey, shape, wanted, folder), _SURVEY_TIMEOUT_S, folder / "survey").end()
    if survey.value is None:
        return _without_trials(f"{survey.detail or survey.outcome.value}")
    able = [name for name, reason in survey.value["candidates"] if not reason]
    tried = {trial.backend: trial for trial in _try_all(able, shape, timeout_s, folder)}
    trials = [tried.get(name) or Trial(name, Outcome.refused, reason) for name, reason in survey.value["candidates"]]
    return {**survey.value, "trials": [asdict(trial) for trial in trials], "error": ""}


def _without_trials(error: str) -> dict[str, Any]:
    return {
        "device": "this machine",
        "torch": asdict(TorchFacts(torch.__version__)),
        "trials": [],
        "latent": [],
        "error": error,
    }


def _try_all(names: list[str], shape: Shape, timeout_s: float, folder: Path) -> Iterator[Trial]:
    """All side by side: most of a trial is waiting for a compiler or for the driver."""
    forks = []
    for name in names:
        place = folder / name
        place.mkdir()
        forks.append(Fork(partial(_try, name, shape, place), timeout_s, place / "output"))
    for name, fork in zip(names, forks, strict=True):
        end = fork.end()
        yield Trial(name, end.outcome, end.detail, round(end.seconds, 2))


def _try(name: str, shape: Shape, folder: Path) -> bool:
    attention_layer.run(attention_layer.engine_config(shape, name, folder), shape)
    return True


def _survey(shape: Shape, wanted: list[str], folder: Path) -> dict[str, Any]:
    """What vLLM says before anything is tried."""
    config = attention_layer.engine_config(shape, None, folder)
    dtype = config.model_config.dtype
    selector = AttentionSelectorConfig(shape.head_size, dtype, config.cache_config.cache_dtype, block_size=None)
    candidates, latent = _candidates(selector), _candidates(selector._replace(use_mla=True, head_size=_LATENT_HEAD))
    known = dict(candidates)
    if not current_platform.is_cpu():
        candidates += [(name, _refusal(name, selector)) for name in wanted if name not in known]
    return {
        "device": _device(),
        "shape": asdict(shape) | {"dtype": str(dtype).removeprefix("torch.")},
        "candidates": candidates,
        "latent": [name for name, reason in latent if not reason],
        "torch": asdict(_torch()),
    }


def _device() -> str:
    if current_platform.is_cpu():
        return "the CPU"
    return f"GPU 0, {torch.cuda.get_device_name(0)}"


def _torch() -> TorchFacts:
    if current_platform.is_cpu():
        return TorchFacts(torch.__version__)
    cuda = torch.cuda
    gpus = tuple(
        (index, cuda.get_device_name(index), cuda.get_device_capability(index)) for index in range(cuda.device_count())
    )
    return TorchFacts(torch.__version__, torch.version.cuda or "", tuple(cuda.get_arch_list()), gpus, _product_error())


def _product_error() -> str:
    """Why a product of two small matrices cannot be computed; empty where it can, or where memory is all that lacks."""
    try:
        ones = torch.ones(16, 16, device="cuda")
        return "" if (ones @ ones == 16).all() else "a product of two matrices is wrong"
    except RuntimeError as error:
        return "" if _outcome(error) == Outcome.no_memory else _words(error)


def _candidates(selector: AttentionSelectorConfig) -> list[tuple[str, str]]:
    """The backends that vLLM would choose from, the best first, each with its reasons against it."""
    if current_platform.is_cpu():
        path = current_platform.get_attn_backend_cls(None, selector)
        return [(each.name, "") for each in AttentionBackendEnum if each.value == path]
    capability = current_platform.get_device_capability()
    valid, invalid = current_platform.get_valid_backends(capability, selector)
    ranks = {each.backend.name: (each.priority, "") for each in valid}
    ranks |= {backend.name: (rank, ", ".join(reasons)) for backend, (rank, reasons) in invalid.items()}
    return [(name, reason) for name, (_, reason) in sorted(ranks.items(), key=lambda item: item[1][0])]


def _refusal(name: str, selector: AttentionSelectorConfig) -> str:
    """Why vLLM would not take a backend that it does not think of by itself; empty when it would."""
    try:
        backend = AttentionBackendEnum[name].get_class()
        capability = current_platform.get_device_capability()
        return ", ".join(backend.validate_configuration(device_capability=capability, **selector._asdict()))
    except Exception as error:  # noqa: BLE001 - a module that is not for this machine may fail in any way
        return _words(error)


class Fork:
    """Runs `task` in a fork from its making on; what the fork prints goes to the file `output`."""

    def __init__(self, task: Callable[[], Any], timeout_s: float, output: Path) -> None:
        self._deadline, self._timeout_s, self._output = time.monotonic() + timeout_s, timeout_s, output
        self._receiver, sender = mp.Pipe(duplex=False)
        # Not through multiprocessing: it would run this process's own exit handlers in the fork.
        self.pid = os.fork()
        if not self.pid:
            _in_fork(task, sender, output)
        sender.close()

    def end(self) -> End:
        """What it returned, or how else it ended; it and its children are gone afterwards."""
        if not self._receiver.poll(max(0.0, self._deadline - time.monotonic())):
            return End(outcome=Outcome.timed_out, detail=_stand(self.pid, self._output), seconds=self._timeout_s)
        try:
            end: End = self._receiver.recv()
        except EOFError:
            return End(outcome=Outcome.crashed, detail=_death(self.pid, self._output))
        _kill(self.pid)
        return end


def _in_fork(task: Callable[[], Any], sender: Any, output: Path) -> None:
    """Run the task, send what came of it, and leave without a trace."""
    begun = time.monotonic()
    try:
        forkserver.die_with_parent(os.getppid())
        fd = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # else it would only write elsewhere: a library may have put its own handlers over it
        faulthandler.enable(fd)
        faulthandler.register(signal.SIGUSR1, fd, all_threads=False, chain=False)
        sender.send(End(task(), seconds=time.monotonic() - begun))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
        with contextlib.suppress(OSError):
            sender.send(End(None, _outcome(error), _words(error), time.monotonic() - begun))
    finally:
        os._exit(0)


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, WrongNumbersError):
        return Outcome.wrong
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return Outcome.no_memory
    is_refused = isinstance(error, ValueError) and "is not valid for this configuration" in str(error)
    return Outcome.refused if is_refused else Outcome.failed


def _words(error: BaseException) -> str:
    """The first and the last line of it: compilers put the command first and the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else ""
    return f"{type(error).__name__}: {words}"[:_LONGEST_DETAIL] if words else type(error).__name__


def _stand(pid: int, output: Path) -> str:
    """Where a fork stands, after which it is killed."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(_DUMP_S)
    busy = sorted({child.name() for child in _living(pid)})
    _kill(pid)
    waits = f" < waiting for {', '.join(busy)}" if busy else ""
    return f"{_innermost(output) or 'code that does not say where it is'}{waits}"[:_LONGEST_DETAIL]


def _innermost(output: Path) -> str:
    """The last frames of the stack that faulthandler has written there; empty where it has not."""
    frames = re.findall(r'File "[^"]*?([^/"]+)", line (\d+) in (\S+)', _text(output))
    return " < ".join(f"{function} ({file}:{line})" for file, line, function in frames[:4])


def _living(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return children(psutil.Process(pid))
    return []


def _death(pid: int, output: Path) -> str:
    """The signal with where it struck, or the status with the last thing that it said."""
    code = _kill(pid)
    if code < 0:
        return f"{signal.Signals(-code).name} in {_innermost(output) or 'code that does not say where it is'}"
    said = [line.strip() for line in _text(output).splitlines() if line.strip()]
    return f"status {code}; {said[-1]}"[:_LONGEST_DETAIL] if said else f"status {code}"


def _kill(pid: int) -> int:
    """End the fork and what it has started. Returns its exit code as Python writes them."""
    for process in _living(pid):
        with contextlib.suppress(psutil.Error):
            process.kill()
    # It may be on its way out with a better reason; and one that a driver keeps in the kernel is not waited for.
    for patience_s in (_LAST_WORDS_S, _DUMP_S):
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
    return -signal.SIGKILL


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


if __name__ == "__main__":
    main()
