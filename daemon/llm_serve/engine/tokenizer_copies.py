"""Lets the copies of the tokenizer be made while EngineCore starts; vLLM makes them before, 0.6 s of each recovery.

vLLM's pool of copies makes one by itself whenever it is empty. So it is left empty, and asked for as many at once as
vLLM would have made.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from typing import Any


def install() -> None:
    """Replace the function where vLLM's renderer looks it up."""
    renderers: Any = importlib.import_module("vllm.renderers.hf")
    renderers.maybe_make_thread_pool = make_pool


def make_pool(tokenizer: Any, copies: int = 1) -> Any:
    """As vLLM's `maybe_make_thread_pool`, but its copies come later."""
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin, maybe_make_thread_pool

    was_pool = isinstance(tokenizer, ThreadSafeHFTokenizerMixin)
    pool = maybe_make_thread_pool(tokenizer, 0)
    if isinstance(pool, ThreadSafeHFTokenizerMixin) and not was_pool:
        type(pool).free_copies = _copies_of(type(pool))
        for _ in range(copies):
            threading.Thread(target=_borrow_one, args=(pool,), name="tokenizer-copy", daemon=True).start()
    return pool


def is_one_free(tokenizer: Any) -> bool:
    """Whether who asks for a copy now need not wait until one is made, half a second."""
    free = getattr(type(tokenizer), "free_copies", None)
    return free is not None and not free.empty()


def _copies_of(kind: Any) -> Any:
    """The queue that the methods of a pool borrow from; None where vLLM keeps it elsewhere: then none is known free."""
    with contextlib.suppress(KeyError, TypeError):
        borrow = inspect.getclosurevars(kind.__call__).nonlocals["_borrow_from_pool"]
        return inspect.getclosurevars(inspect.unwrap(borrow)).nonlocals["tokenizer_pool"]
    return None


def _borrow_one(pool: Any) -> None:
    with contextlib.suppress(Exception):  # who needs one and gets none is told then
        pool.convert_ids_to_tokens([])
