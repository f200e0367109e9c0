"""Has schemas, patterns and grammars of requests looked at beside the event loop, and compiled behind everybody else.

vLLM makes a grammar of each to see whether it can: fractions of a millisecond for what people write, more than a second
for what somebody thought up, in which the loop would answer nobody. xgrammar lets other threads go on meanwhile. One
thread does it for all, so that those who send such things wait for each other; what was quick before is looked at by
vLLM where it always was. The engine compiles what was found good, in threads of its own, and those step back as well.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from llm_serve.host.cpus import step_back

_QUICK_S = 0.005
_REMEMBERED = 256
_DONE = "llm_serve_grammar_is_checked"
"""An attribute of SamplingParams, which vLLM leaves room for; it does not travel to the engine, nor into a clone."""

_aside = ThreadPoolExecutor(1, "grammars", initializer=step_back)
_quick: OrderedDict[int, None] = OrderedDict()


def install() -> None:
    """Let vLLM skip the check where it was done. A second call does nothing."""
    module: Any = importlib.import_module("vllm.sampling_params")
    kind = module.SamplingParams
    if not hasattr(kind, "checks_grammars_aside"):
        kind.checks_grammars_aside = True
        kind._validate_structured_outputs = _unless_done(kind._validate_structured_outputs)  # noqa: SLF001 - see contract/


def _unless_done(check: Any) -> Any:
    def _validate_structured_outputs(self: Any, *configurations: Any) -> None:
        if not getattr(self, _DONE, False):
            check(self, *configurations)

    return _validate_structured_outputs


async def check(params: Any, llm: Any) -> None:
    """Look at what a request's answer has to look like, as this engine's client would. Raises vLLM's error for it."""
    wanted = getattr(params, "structured_outputs", None)
    if wanted is None or getattr(params, _DONE, False):
        return
    name = hash(repr([getattr(wanted, field.name) for field in fields(wanted)]))
    if name in _quick:
        _quick.move_to_end(name)
        return
    processor = llm.input_processor
    configurations = (processor.model_config, processor.structured_outputs_config, processor.tokenizer)
    if await asyncio.get_running_loop().run_in_executor(_aside, _took_s, params, configurations) < _QUICK_S:
        _quick[name] = None
        if len(_quick) > _REMEMBERED:
            _quick.popitem(last=False)
    setattr(params, _DONE, True)


def _took_s(params: Any, configurations: tuple[Any, ...]) -> float:
    began = time.monotonic()  # not this thread's own time: vLLM has patterns compiled by another one, and waits for it
    params._validate_structured_outputs(*configurations)  # noqa: SLF001 - what is public does more
    return time.monotonic() - began


def install_in_engines() -> None:
    """Have the engines that this process forks compile grammars while nobody else wants the CPU."""
    module: Any = importlib.import_module("vllm.v1.structured_output")
    create = module.StructuredOutputManager._create_grammar  # noqa: SLF001 - what its threads run

    def _create_grammar(self: Any, request: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            step_back()
        return create(self, request)

    module.StructuredOutputManager._create_grammar = _create_grammar  # noqa: SLF001
