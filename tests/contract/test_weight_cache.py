"""Weights that stay while engines come and go: whose they are, when they go, and that an engine never needs them.

Holders are real processes. What they do is a stand-in, for only on a GPU can they hold anything (tests/gpu/weights.py).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

pytest.importorskip("vllm")

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.weight_cache import daemon, ipc_loader

from llm_serve.core import evidence, policy
from llm_serve.engine import forkserver, weight_cache
from llm_serve.engine.weight_cache import WeightCache, obstacle
from llm_serve.host import processes
from tests.contract.surface import parameters
from tests.daemon import eventually

pytestmark = pytest.mark.vllm


def hold(tell: Connection, config: Any, *_: object) -> None:
    """Load nothing, and lend it for ever; or whatever else `config.do` says."""
    if config.do:
        config.do(tell)
        return
    tell.send("")
    while True:
        time.sleep(60)


def config(do: Callable[[Connection], None] | None = None, **changes: Any) -> Any:
    """As much of a VllmConfig as is looked at; `changes` go by the path's last names, joined by two underscores."""
    made = SimpleNamespace(
        do=do,
        device_config=SimpleNamespace(device_type="cuda"),
        load_config=LoadConfig(),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, data_parallel_size_local=1,
            data_parallel_rank=0, nnodes=1, node_rank=0, distributed_executor_backend="uni",
        ),
        model_config=SimpleNamespace(enable_sleep_mode=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        speculative_config=None,
        lora_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        *names, last = path.split("__")
        at: Any = made
        for name in names:
            at = getattr(at, name)
        setattr(at, last, value)
    return made


def is_lent(to: Any) -> bool:
    """True where an engine of this configuration is sent to the holders."""
    return bool(to.load_config.load_format == "ipc_cache")


@pytest.fixture
def spared() -> set[int]:
    """Pids that nobody ends with an engine."""
    return {1}


@pytest.fixture
def cache(tmp_path: Path, spared: set[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightCache]:
    """One whose holders are forked from this process; the fork server would take a minute to load vLLM."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(forkserver, "process_of_an_engine", lambda target, args: fork.Process(target=target, args=args))
    made = WeightCache(tmp_path / "weights", spared, hold)
    with contextlib.closing(SimpleNamespace(close=made.drop)):
        yield made


def test_engines_of_one_plan_share_one_holder(cache: WeightCache, spared: set[int]) -> None:
    """The second finds what the first has had read, and nobody ends the holder together with an engine."""
    first, second = config(), config()

    cache.lend(first, "plan")
    pids = cache.pids
    cache.lend(second, "plan")

    assert is_lent(first)
    assert is_lent(second)
    assert pids == cache.pids
    assert {1, *pids} == spared
    cache.drop()
    assert {1} == spared
    assert not any(map(processes.is_there, pids))


def test_each_gpu_has_a_holder(cache: WeightCache) -> None:
    """Two by two GPUs are four ranks."""
    sizes: dict[str, Any] = {"parallel_config__tensor_parallel_size": 2, "parallel_config__pipeline_parallel_size": 2}

    cache.lend(config(**sizes, parallel_config__distributed_executor_backend="mp"), "plan")

    assert len(cache.pids) == 4


def test_another_plan_reads_its_own(cache: WeightCache) -> None:
    """What a smaller plan's weights look like is nobody's guess."""
    cache.lend(config(), "plan")
    before = cache.pids

    cache.lend(config(), "smaller plan")

    assert cache.pids
    assert not set(before) & set(cache.pids)
    assert not any(map(processes.is_there, before))


def test_a_holder_that_has_died_is_replaced(cache: WeightCache) -> None:
    """Somebody has killed it; the next engine has a new one, and this is no failure of the cache's."""
    cache.lend(config(), "plan")
    (pid,) = cache.pids
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: cache.pids, lambda pids: not pids, within_s=10, what="it has ended")

    again = config()
    cache.lend(again, "plan")

    assert is_lent(again)
    assert cache.pids != (pid,)


def _complain(tell: Connection) -> None:
    tell.send("OutOfMemoryError: no room")


def _die(tell: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(tell: Connection) -> None:
    raise OSError("no such device")


@pytest.mark.parametrize(
    ("do", "why"),
    [(_complain, "OutOfMemoryError: no room"), (_die, "has ended with -9"), (_fail, "has ended with 1")],
    ids=["complains", "is killed", "raises"],
)
def test_without_a_holder_an_engine_reads_its_weights_itself(
    cache: WeightCache, spared: set[int], do: Callable[[Connection], None], why: str
) -> None:
    """Nothing is left of it, and the journal has the reason."""
    asked = config(do)
    with structlog.testing.capture_logs() as said:
        cache.lend(asked, "plan")

    assert why in said[-1]["event"]
    assert not is_lent(asked)
    assert () == cache.pids
    assert {1} == spared


def test_what_fails_twice_is_not_tried_again(cache: WeightCache) -> None:
    """Each try costs the time of a load."""
    for _ in range(2):
        cache.lend(config(_complain), "plan")
    sound = config()
    cache.lend(sound, "plan")

    assert not is_lent(sound)


def test_starts_that_fail_with_it_count_and_one_that_succeeds_forgives(cache: WeightCache) -> None:
    """An engine that never comes up with lent weights comes up without them."""
    cache.lend(config(), "plan")
    cache.judge(has_come_up=False)
    cache.lend(config(), "plan")
    cache.judge(has_come_up=True)
    cache.judge(has_come_up=False)
    forgiven = config()
    cache.lend(forgiven, "plan")
    cache.judge(has_come_up=False)
    given_up = config()
    cache.lend(given_up, "plan")

    assert is_lent(forgiven)
    assert not is_lent(given_up)


def test_starts_without_it_are_not_its_doing(cache: WeightCache) -> None:
    """A file that does not ask for it has failed starts as well."""
    for _ in range(5):
        cache.judge(has_come_up=False)
    asked = config()
    cache.lend(asked, "plan")

    assert is_lent(asked)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"device_config__device_type": "cpu"}, "no GPU"),
        ({"load_config": LoadConfig(load_format="ipc_cache")}, "load_format"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__nnodes": 2}, "several hosts"),
        ({"parallel_config__distributed_executor_backend": "ray"}, "several hosts"),
        ({"speculative_config": SimpleNamespace()}, "speculative_config"),
        ({"lora_config": SimpleNamespace()}, "enable_lora"),
        ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"offload_config__uva__cpu_offload_gb": 4}, "main memory"),
        ({"offload_config__prefetch__offload_group_size": 4}, "main memory"),
    ],
)
def test_what_stands_in_the_way_is_named(cache: WeightCache, changes: dict[str, Any], why: str) -> None:
    """In the words of the file; an engine is started without it."""
    asked = config(**changes)

    assert why in obstacle(asked)
    assert bool(why) is bool(obstacle(asked))
    cache.lend(asked, "plan")
    assert bool(why) is not bool(cache.pids)


def test_vllms_daemon_is_called_as_it_is_made() -> None:
    """Names and places of its arguments, and what it says when it is ready."""
    assert ["vllm_config", "global_rank", "local_rank", "distributed_init_method", "socket_dir"] == list(
        parameters(daemon.WeightCacheDaemon)
    )[:5]
    assert "pp_rank" in parameters(daemon.WeightCacheDaemon)
    assert "ready_callback" in parameters(daemon.WeightCacheDaemon.serve_forever)
    assert not inspect.signature(daemon.WeightCacheDaemon.load_model).parameters.keys() - {"self"}
    assert hasattr(
        importlib.import_module("vllm.transformers_utils.config"), "maybe_register_config_serialize_by_value"
    )


def test_vllms_loader_takes_what_it_is_told(cache: WeightCache) -> None:
    """It refuses an extra key that it does not know. And a whole VllmConfig has every part that is looked at."""
    asked = config()
    cache.lend(asked, "plan")
    loader = ipc_loader.IpcModelLoader(asked.load_config)
    fields = importlib.import_module("vllm.config").VllmConfig.__dataclass_fields__

    assert loader.fallback is False
    assert loader.socket_dir == str(cache._folder)
    assert set(vars(config())) - {"do"} <= set(fields)
    offload = importlib.import_module("vllm.config.offload").OffloadConfig()
    assert (0, 0) == (offload.uva.cpu_offload_gb, offload.prefetch.offload_group_size)


def test_only_a_kill_and_a_standstill_leave_weights_as_they_were() -> None:
    """After these alone the same plan follows for sure, and nothing has been computed wrongly."""
    same = {kind for kind in policy.KEEPS_WEIGHTS if policy.RESPONSES[kind][0] is policy.Response.again}

    assert policy.KEEPS_WEIGHTS == same
    assert evidence.Kind.device_error not in policy.KEEPS_WEIGHTS
    assert evidence.Kind.crashed not in policy.KEEPS_WEIGHTS


def test_a_holder_says_what_is_wrong_before_it_ends(tmp_path: Path) -> None:
    """The real one, in a process of its own; it is given nothing that it could work with."""
    heard, tell = multiprocessing.Pipe(duplex=False)
    given = (tell, SimpleNamespace(parallel_config=None), 0, 0, 0, "tcp://127.0.0.1:1", str(tmp_path))
    holder = multiprocessing.get_context("fork").Process(target=weight_cache._hold, args=given)
    holder.start()

    assert "AttributeError" in heard.recv()
    holder.join(10)
    assert holder.exitcode == 0
