"""Keeps an engine's weights in GPU memory while engines come and go: vLLM's own weight cache (`vllm preload`).

A process for each GPU, a holder, reads the weights once, and every engine of the same plan maps its memory (CUDA IPC)
instead of reading them again. vLLM's command would load vLLM anew for that, and stay when the daemon goes; here holders
are forks of the fork server as engines are, their network closed like an engine's, and they end with it.

It only ever saves time: whatever is wrong with it, the engine reads its weights itself, and the journal says why.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil

from llm_serve.engine import forkserver
from llm_serve.host import processes
from llm_serve.host.logs import get_logger

_MOST_FAILURES = 2
_LOOK_EVERY_S = 0.5
_ASK_TIMEOUT_S = 20.0
"""How long an engine waits for a holder that has said it is ready."""

Hold = Callable[..., None]


class WeightCache:
    """The holders of one instance, all for one plan.

    Their sockets are in `folder`. `spared` gets their pids once they have loaded: whoever ends engines leaves those
    alone. `hold` is what they do.
    """

    def __init__(self, folder: Path, spared: set[int], hold: Hold | None = None) -> None:
        self._folder, self._spared, self._hold = folder, spared, hold or _hold
        self._holders: list[Any] = []
        self._held = ""
        self._failures = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that hold weights now, or are loading them."""
        return tuple(holder.pid for holder in self._holders if processes.is_there(holder.pid))

    def lend(self, config: Any, plan: str) -> None:
        """Let the engine of this VllmConfig find its weights here, where that is possible; else say why not.

        `plan` names everything that the weights may depend on. Blocks while they are read for the first time.
        """
        if why := self._obstacle(config) or self._load(config, plan):
            get_logger().warning(f"weights are not kept between engines: {why}")
            return
        found = {"socket_dir": str(self._folder), "fallback": False, "state_timeout_s": _ASK_TIMEOUT_S}
        config.load_config = replace(config.load_config, load_format="ipc_cache", model_loader_extra_config=found)

    def _obstacle(self, config: Any) -> str:
        if self._failures >= _MOST_FAILURES:
            return f"it has failed {self._failures} times; the next start of the daemon tries it again"
        return obstacle(config)

    def _load(self, config: Any, plan: str) -> str:
        """Have this plan's weights held. Returns why that cannot be, or nothing."""
        if self._held == plan and len(self.pids) == len(self._holders):
            return ""
        self.drop()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            why = self._start(config)
        except Exception as error:  # noqa: BLE001 - a layer of vLLM's that is new, whose absence costs only time
            why = f"{type(error).__name__}: {error}"
        if why:
            self.drop()
            self._failures += 1
        else:
            self._held = plan
            self._spared.update(self.pids)
        return why

    def _start(self, config: Any) -> str:
        """Start the holders and wait until each has loaded. Returns what one of them complains about."""
        daemon: Any = importlib.import_module("vllm.model_executor.model_loader.weight_cache.daemon")
        network: Any = importlib.import_module("vllm.utils.network_utils")
        importlib.import_module("vllm.transformers_utils.config").maybe_register_config_serialize_by_value()
        meeting = network.get_distributed_init_method("127.0.0.1", network.get_open_port())
        ranks = daemon.plan_local_ranks(config.parallel_config)
        waiting: dict[connection.Connection, Any] = {}
        with forkserver.environment({"TMPDIR": str(self._folder)}):
            for local_rank, _, pp_rank, tp_rank in ranks:
                rank = pp_rank * config.parallel_config.tensor_parallel_size + tp_rank
                heard, tell = multiprocessing.Pipe(duplex=False)
                call = (tell, config, rank, local_rank, pp_rank, meeting, str(self._folder))
                holder = forkserver.process_of_an_engine(self._hold, call)
                holder.start()
                tell.close()
                self._holders.append(holder)
                waiting[heard] = holder
        return _until_ready(waiting)

    def judge(self, *, has_come_up: bool) -> None:
        """An engine has come up, or has not; where it was lent weights, perhaps because of them."""
        self._failures = 0 if has_come_up else self._failures + bool(self._holders)

    def drop(self) -> None:
        """End the holders; the memory is free a moment later. Blocks for as long as a kill takes."""
        mapped: frozenset[Path] = frozenset()
        with contextlib.suppress(psutil.Error):
            mapped = processes.shared_memory_of([psutil.Process(pid) for pid in self.pids])
        holders, self._holders, self._held = self._holders, [], ""
        for holder in holders:
            holder.kill()
            holder.join()
            self._spared.discard(holder.pid)
        processes.unlink_all(mapped)


def _until_ready(waiting: dict[connection.Connection, Any]) -> str:
    """Wait until every holder has said that it is ready, which is an empty word, or one has said what is wrong."""
    while waiting:
        for heard in connection.wait(list(waiting), _LOOK_EVERY_S):
            assert isinstance(heard, connection.Connection)
            holder = waiting.pop(heard)
            try:
                why = str(heard.recv())
            except EOFError:
                holder.join()
                why = f"the process that was to hold them has ended with {holder.exitcode}"
            finally:
                heard.close()
            if why:
                return why
    return ""


def obstacle(config: Any) -> str:
    """Why the weights of this VllmConfig cannot be kept, or nothing. What only their loading shows comes later."""
    parallel, model, offload = config.parallel_config, config.model_config, config.offload_config
    reasons = {
        "there is no GPU": config.device_config.device_type == "cpu",
        'engine.load_format = "ipc_cache" names a cache already': config.load_config.load_format == "ipc_cache",
        "engine.data_parallel_size is above 1": parallel.data_parallel_size > 1,
        "the engine runs on several hosts": parallel.nnodes > 1
        or parallel.distributed_executor_backend not in ("mp", "uni"),
        "engine.speculative_config has weights of its own": config.speculative_config is not None,
        "engine.enable_lora changes layers": config.lora_config is not None,
        "engine.enable_sleep_mode moves weights": bool(model.enable_sleep_mode),
        "a part of the weights is in main memory": offload.uva.cpu_offload_gb > 0
        or offload.prefetch.offload_group_size > 0,
    }
    return next((why for why, is_so in reasons.items() if is_so), "")


def _hold(  # noqa: PLR0913, PLR0917 - as vLLM's own daemon
    tell: connection.Connection, config: Any, rank: int, local_rank: int, pp_rank: int, meeting: str, folder: str
) -> None:
    """In a holder: load this rank's weights, say so, and lend them until killed."""
    utilities: Any = importlib.import_module("vllm.utils.system_utils")
    utilities.set_process_title("WeightCache", str(rank))
    utilities.decorate_logs("WeightCache")
    daemon: Any = importlib.import_module("vllm.model_executor.model_loader.weight_cache.daemon")
    try:
        cache = daemon.WeightCacheDaemon(config, rank, local_rank, meeting, folder, pp_rank=pp_rank)
        cache.load_model()
        cache.serve_forever(ready_callback=lambda: tell.send(""))
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine does without
        with contextlib.suppress(OSError):
            tell.send(f"{type(error).__name__}: {error}")
