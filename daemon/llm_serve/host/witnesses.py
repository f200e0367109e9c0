"""What the machine saw of an engine's life: kernel, control group and GPUs, from its start on."""

from __future__ import annotations

from dataclasses import replace

from llm_serve.core.evidence import Evidence
from llm_serve.host import processes
from llm_serve.host.cgroup import OomCounter
from llm_serve.host.kernel_log import KernelLog
from llm_serve.host.nvml import Gpu, Gpus


class Witnesses:
    """Asked once at every engine's start and once after its failure."""

    def __init__(self, gpus: Gpus, used: tuple[Gpu, ...]) -> None:
        self.gpus, self.devices = gpus, tuple(gpu.index for gpu in used)
        self._buses = tuple(gpu.pci_bus_id for gpu in used)
        self.begin()

    def begin(self) -> None:
        """Forget what is over; from now on it is another engine."""
        self._oom, self._kernel = OomCounter(), KernelLog(pci_bus_ids=self._buses)
        self.gpus.forget_xids()

    def testify(self, evidence: Evidence) -> Evidence:
        """The evidence with what the machine adds to it. Asks the driver, which may take a while."""
        own = {process.pid for process in processes.descendants()}
        return replace(
            evidence,
            oom_kills=self._oom.kills(),
            kernel_log=self._kernel.lines_since_start(),
            xids=tuple(sorted({*self.gpus.xids(self.devices), *self._kernel.xids()})),
            gpu_holders=self.gpus.holders(self.devices, without=own),
            no_p2p=self.gpus.without_p2p(self.devices),
        )
