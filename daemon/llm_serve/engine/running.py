"""One running engine, as everybody knows it who has to do with it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from llm_serve.host import processes

if TYPE_CHECKING:
    from llm_serve.engine.steps import StepWatch


@dataclass
class Engine:
    """One running engine: vLLM's client, and what must go when it goes."""

    epoch: int
    llm: Any
    args: Namespace
    tasks: tuple[str, ...]
    folders: tuple[Path, ...]
    steps: StepWatch
    processes: list[psutil.Process] = field(default_factory=list)

    @property
    def is_dead(self) -> bool:
        """True once vLLM itself has noticed; a frozen engine is not dead."""
        return bool(self.llm.errored)

    def compiler_marks(self) -> tuple[float, int]:
        """CPU seconds and bytes of processes that the engine has started since it was ready: compilers, mostly."""
        known = {process.pid for process in self.processes}
        below = [child for process in self.processes for child in processes.children(process)]
        return processes.progress_mark([child for child in below if child.pid not in known])

    def exit_codes(self) -> dict[str, int]:
        """Exit codes of engine processes that have ended, where vLLM knows them."""
        from llm_serve.engine.evidence import exit_codes_of

        return exit_codes_of(getattr(self.llm.engine_core.resources, "engine_manager", None))
