"""How this process's threads share the interpreter."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

_SWITCH_INTERVAL_S = 0.0005


@contextlib.contextmanager
def loop_first(*, is_kept: bool = True) -> Iterator[None]:
    """Keep the event loop quick while another thread does heavy Python work, such as importing vLLM.

    A thread that computes gives the interpreter away once in an interval, 5 ms by default, and the loop waits for it
    after every system call. A full garbage collection over vLLM's and transformers' objects does not give it away
    at all, for up to 0.25 s, so there is none inside; what is there at the end is looked at by `collect_frozen` only.
    In a process where that cannot be (a fork of the fork server), it must not be kept (`is_kept`).
    """
    interval_s, was_on = sys.getswitchinterval(), gc.isenabled()
    gc.disable()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
        if is_kept:
            gc.freeze()
    finally:
        sys.setswitchinterval(interval_s)
        if was_on:
            gc.enable()


def collect_frozen() -> None:
    """Free what `loop_first` has kept from being looked at and nobody uses any more: an engine that is gone, for one.

    Its objects hold each other, so nothing less frees them: 45 MB an engine. The loop stands still for up to 0.7 s;
    call it while nothing is served. Until the next `loop_first` ends, another call does nothing.
    """
    if gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
