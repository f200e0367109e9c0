"""NUMA binding as the installed vLLM does it, in processes that are forked as ours are.

`numactl` is a stand-in where a test puts one on PATH: vLLM only tries its arguments with it, and it is no dependency of
these tests. The binding itself is real.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import ParallelConfig
from vllm.utils import numa_utils

from llm_serve.engine import numa
from llm_serve.host.nvml import Gpu
from llm_serve.host.placement import Placement

pytestmark = pytest.mark.vllm

PLACED = Placement((Gpu(0, "GPU-0", "NVIDIA H200", "00000000:1B:00.0", 1 << 37),), (0,))
Install = Callable[[int], None]


@pytest.fixture
def numactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a numactl on PATH that ends with this status."""

    def install(status: int) -> None:
        program = tmp_path / "numactl"
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


@pytest.fixture
def no_numactl(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty PATH."""
    monkeypatch.setenv("PATH", "/nonexistent")


def config(**options: Any) -> Any:
    """vLLM's own configuration."""
    return ParallelConfig(**options)


def test_vllm_hands_the_arguments_over_by_this_name() -> None:
    """What it would run a program under stands in the environment while a process is started."""
    assert numa_utils._NUMACTL_ARGS_ENV == numa.ARGUMENTS_VARIABLE
    assert {name for name in vars(config()) if name.startswith("numa_bind")} == numa.OPTIONS


@pytest.mark.parametrize(
    ("written", "placement", "expected"),
    [
        ({}, PLACED, (True, [0])),
        ({"seed": 1}, PLACED, (True, [0])),
        ({}, Placement(), (False, None)),
        ({"numa_bind": False}, PLACED, (False, None)),
        ({"numa_bind": True, "numa_bind_nodes": [3]}, PLACED, (False, None)),
        ({"numa_bind_cpus": ["0"]}, PLACED, (False, None)),
        ({"numa_bind": True, "numa_bind_cpus": ["0"]}, PLACED, (True, [0])),
    ],
)
def test_who_writes_a_numa_option_is_obeyed(written: dict[str, Any], placement: Placement, expected: Any) -> None:
    """The nodes of the GPUs are asked for only where the plan leaves them open; what it says has been parsed before."""
    namespace = Namespace(numa_bind=False, numa_bind_nodes=None)
    numa.place(namespace, written, placement)

    assert expected == (namespace.numa_bind, namespace.numa_bind_nodes)


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, False),
        ({"numa_bind_nodes": [0]}, True),
        ({"numa_bind_nodes": [0, 0]}, False),
        ({"numa_bind_nodes": [0, 0], "numa_bind_cpus": ["0"]}, True),
    ],
)
def test_a_list_that_is_too_short_is_refused_before_anything_starts(options: dict[str, Any], is_refused: bool) -> None:
    """vLLM would end the start of the second worker for it."""
    parallel = SimpleNamespace(
        numa_bind=True, numa_bind_nodes=None, numa_bind_cpus=None, distributed_executor_backend="mp",
        local_world_size=2, data_parallel_size_local=1,
    )  # fmt: skip
    vars(parallel).update(options)
    if not is_refused:
        return numa.check(parallel)
    with pytest.raises(ValueError, match=r"^numa_bind_\w+ is too short: it has 1 of the 2 entries"):
        numa.check(parallel)
    numa.check(SimpleNamespace(**vars(parallel) | {"distributed_executor_backend": "ray"}))
    return numa.check(SimpleNamespace(**vars(parallel) | {"numa_bind": False}))


@pytest.mark.usefixtures("no_numactl")
def test_without_numactl_the_engine_goes_on_unbound() -> None:
    """vLLM would end the start: binding is switched off, and the reason is told."""
    parallel = config(numa_bind=True, numa_bind_nodes=[0], numa_bind_cpus=["0"])
    with pytest.raises(RuntimeError, match="numactl is required"):
        numa_utils._get_numactl_executable()

    assert "numactl, by which vLLM tries it, is not installed" == numa.give_up_where_impossible(parallel)
    assert (False, None, None) == (parallel.numa_bind, parallel.numa_bind_nodes, parallel.numa_bind_cpus)
    assert "" == numa.give_up_where_impossible(parallel)


def test_where_vllm_finds_no_nodes_the_engine_goes_on_unbound(numactl: Install) -> None:
    """As on one node, in a sandbox, or under CPUAffinity=; with nodes by name there is nothing to find."""
    numactl(0)
    searching, named = config(numa_bind=True), config(numa_bind=True, numa_bind_nodes=[0])

    assert "engine.numa_bind_nodes" in numa.give_up_where_impossible(searching)
    assert "" == numa.give_up_where_impossible(named)
    assert (False, True) == (searching.numa_bind, named.numa_bind)


FORK = """
import ctypes, json, os, sys
from types import SimpleNamespace

def tell(path):
    mode = ctypes.c_int()
    mask = (ctypes.c_ulong * 16)()
    ctypes.CDLL("libnuma.so.1").get_mempolicy(ctypes.byref(mode), mask, 1024, None, 0)
    told = {"cpus": sorted(os.sched_getaffinity(0)), "policy": mode.value, "nodes": mask[0],
            "left": "_VLLM_INTERNAL_NUMACTL_ARGS" in os.environ, "late": os.environ.get("LATE")}
    open(path, "w").write(json.dumps(told))

if __name__ == "__main__":
    from vllm.utils import numa_utils
    from llm_serve.engine import forkserver

    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    parallel = SimpleNamespace(
        numa_bind=True, numa_bind_nodes=[0], numa_bind_cpus=json.loads(sys.argv[2]), pipeline_parallel_size=1,
        tensor_parallel_size=1, distributed_executor_backend="mp", data_parallel_backend="mp", nnodes_within_dp=1,
        data_parallel_rank_local=0, data_parallel_index=0,
    )
    forkserver.install()
    process = forkserver._Context().Process(target=tell, args=(sys.argv[1],))
    with numa_utils.configure_subprocess(SimpleNamespace(parallel_config=parallel), 0, process_kind="worker"):
        os.environ["LATE"] = "set before the start"
        process.start()
    process.join(60)
    forkserver.stop()
"""
_DEFAULT, _BIND = 0, 2


def forked(tmp_path: Path, cpus: list[str] | None = None) -> dict[str, Any]:
    """What a process sees of itself that vLLM starts on node 0, in our way."""
    script, told = tmp_path / "fork.py", tmp_path / "told"
    script.write_text(FORK)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(told), json.dumps(cpus)]
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=120)
    assert told.exists(), done.stderr
    return dict(json.loads(told.read_text()))


ALL = sorted(os.sched_getaffinity(0))


def test_a_fork_is_bound_as_numactl_would_have(tmp_path: Path, numactl: Install) -> None:
    """Its memory comes from the node, its CPUs are the node's, and its own children decide for themselves."""
    numactl(0)
    told = forked(tmp_path)

    assert {"cpus": ALL, "policy": _BIND, "nodes": 1, "left": False, "late": "set before the start"} == told


def test_a_fork_takes_the_cpus_that_the_file_names(tmp_path: Path, numactl: Install) -> None:
    """numa_bind_cpus, with the memory of the node."""
    numactl(0)
    told = forked(tmp_path, [str(ALL[-1])])

    assert ([ALL[-1]], _BIND) == (told["cpus"], told["policy"])


def test_what_a_container_forbids_is_not_done(tmp_path: Path, numactl: Install) -> None:
    """numactl fails whatever it is asked: vLLM gives up on binding, and the process runs."""
    numactl(1)
    told = forked(tmp_path)

    assert (ALL, _DEFAULT) == (told["cpus"], told["policy"])


@pytest.mark.parametrize("arguments", ["--cpunodebind=77 --membind=77", "--physcpubind=999", "--membind=500"])
def test_what_fails_in_the_fork_is_told_and_no_more(
    arguments: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node may have gone since vLLM tried; an engine that is not bound still serves."""
    # Another test may have set logging up as the fork server, or as vLLM, does.
    monkeypatch.setattr(logging.getLogger("llm_serve.fork_server"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="llm_serve.fork_server")
    before = os.sched_getaffinity(0)
    numa.bind(arguments)

    assert before == os.sched_getaffinity(0)
    assert len(arguments.split()) == caplog.text.count("is not possible here")


def test_without_arguments_nothing_is_bound(caplog: pytest.LogCaptureFixture) -> None:
    """As in every engine that nobody has asked to bind."""
    numa.bind("")

    assert "" == caplog.text
