"""How threads share the interpreter, and what garbage collection leaves alone."""

from __future__ import annotations

import gc
import weakref

from llm_serve.host import interpreter


class _Ring:
    """Something that only a garbage collection can free."""

    def __init__(self) -> None:
        self.me = self


def test_what_a_block_has_frozen_is_freed_when_asked_for() -> None:
    """An engine that is gone outlives every ordinary collection, and `collect_frozen` frees it."""
    with interpreter.loop_first():
        ring = _Ring()
    gone = weakref.ref(ring)
    del ring
    gc.collect()
    assert gone() is not None

    interpreter.collect_frozen()

    assert gone() is None
    assert 0 == gc.get_freeze_count()
