"""What a part of the stress test stands on: one torch device, its memory, and the ways to tell and to be stopped."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_serve.core.stress import Found, Progress, Sizes, budget_bytes

_TELL_EVERY_S = 0.2


def _leave(what: str, tensor: Any) -> None:
    """Change nothing."""


@dataclass(slots=True)
class Rig:
    """One device. On the CPU, where the tests of the tests run, there is as much memory as `sizes` says."""

    device: torch.device
    sizes: Sizes
    send: Callable[[Progress], None]
    is_stopped: Callable[[], bool]
    touch: Callable[[str, Any], None] = _leave
    """Called with every tensor between its writing and its checking; a test of the tests flips a bit here."""
    _told_s: float = field(default=float("-inf"))

    @property
    def is_cuda(self) -> bool:
        """False on the CPU."""
        return bool(self.device.type == "cuda")

    def budget_bytes(self) -> int:
        """How much memory a part may take now."""
        if not self.is_cuda:
            return self.sizes.device_bytes
        free, total = torch.cuda.mem_get_info(self.device)
        return budget_bytes(free, total, is_shared=self.sizes.is_shared)

    def synchronize(self) -> None:
        """Wait until everything that was launched is done. Raises what went wrong in it."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory that no tensor uses any more back to the driver."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def tell(self, share: float, found: Found, tflops: float | None = None) -> None:
        """Say how far a part is; a few times a second, however often it is called."""
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            self.send(Progress(min(1.0, share), found, tflops))

    def is_dead(self) -> bool:
        """True when the device answers nothing any more, as after an illegal access: only a new process helps."""
        gc.collect()  # what an error's traceback held
        try:
            self.release()
            self.synchronize()
        except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
            return True
        return False
