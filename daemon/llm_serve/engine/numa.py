"""Binds an engine's CPUs and memory to the NUMA nodes of its GPUs, through vLLM's own options.

vLLM 0.32 decides which process belongs on which node, tries it with `numactl`, and then puts `numactl ARGUMENTS` in
front of the Python that it spawns; the arguments travel in the environment. A fork has no command line, so that would
do nothing, and say nothing: what `numactl` would have done is done by `bind`, in the fork.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_serve.host.placement import NO_NUMACTL, Placement, numbers

ARGUMENTS_VARIABLE = "_VLLM_INTERNAL_NUMACTL_ARGS"
OPTIONS = frozenset({"numa_bind", "numa_bind_nodes", "numa_bind_cpus"})

_NODES = Path("/sys/devices/system/node")
_MPOL_BIND, _MOST_NODES = 2, 1024


def place(namespace: Namespace, written: Mapping[str, object], placement: Placement) -> None:
    """Ask vLLM for the nodes of the placement, unless the plan, where `written` stands, says otherwise."""
    is_left_open = written.get("numa_bind") is True and "numa_bind_nodes" not in written
    if placement.nodes and (is_left_open or OPTIONS.isdisjoint(written)):
        namespace.numa_bind, namespace.numa_bind_nodes = True, list(placement.nodes)


def check(config: Any) -> None:
    """Raise ValueError where a list of this ParallelConfig is too short for its GPUs: vLLM finds out much later."""
    if not config.numa_bind or config.distributed_executor_backend not in ("mp", "uni"):
        return
    gpus = config.local_world_size * (config.data_parallel_size_local or 1)
    for name in ("numa_bind_nodes", "numa_bind_cpus"):
        given = getattr(config, name)
        if given is not None and len(given) < gpus:
            raise ValueError(f"{name} is too short: it has {len(given)} of the {gpus} entries, one for each GPU")


def give_up_where_impossible(config: Any) -> str:
    """Switch binding off in this ParallelConfig where vLLM would end the start for it. Returns why, or nothing.

    What a container or a cpuset forbids is no such case: vLLM tries it first, and goes on without.
    """
    if not config.numa_bind or not (why := _obstacle(config)):
        return ""
    config.numa_bind, config.numa_bind_nodes, config.numa_bind_cpus = False, None, None
    return why


def _obstacle(config: Any) -> str:
    if shutil.which("numactl") is None:
        return NO_NUMACTL
    utilities: Any = importlib.import_module("vllm.utils.numa_utils")
    if config.numa_bind_nodes is None and utilities.get_auto_numa_nodes() is None:
        return "vLLM does not find the nodes of the GPUs by itself: name them in engine.numa_bind_nodes"
    return ""


def bind(arguments: str) -> None:
    """Do to this process, which has one thread yet, what `numactl` with these arguments does to a program.

    vLLM has tried them a moment ago. If they fail all the same, the process goes on unbound, and says so.
    """
    for word in arguments.split():
        option, _, value = word.partition("=")
        try:
            if option == "--membind":
                _bind_memory(numbers(value))
            else:
                _bind_cpus(numbers(value) if option == "--physcpubind" else _cpus_of(numbers(value)))
        except OSError as error:
            logging.getLogger("llm_serve.fork_server").warning("numactl %s is not possible here: %s", word, error)


def _cpus_of(nodes: frozenset[int]) -> frozenset[int]:
    return frozenset().union(*(numbers((_NODES / f"node{node}/cpulist").read_text().strip()) for node in nodes))


def _bind_cpus(cpus: frozenset[int]) -> None:
    """Those that this process may use, and no others: whoever has kept it from some has had a reason."""
    os.sched_setaffinity(0, cpus & os.sched_getaffinity(0))


def _bind_memory(nodes: frozenset[int]) -> None:
    """All later allocations of this process come from these nodes."""
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MOST_NODES // bits))()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    libnuma = ctypes.CDLL("libnuma.so.1", use_errno=True)
    if libnuma.set_mempolicy(_MPOL_BIND, mask, ctypes.c_ulong(_MOST_NODES)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
