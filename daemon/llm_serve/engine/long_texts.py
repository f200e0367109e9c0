"""Keeps long texts from holding up short ones: they are bounded, and read by a thread of their own.

vLLM reads all texts of all requests in one thread (`renderer_num_workers`), where they stand in line: 30 MB for
/tokenize, which bounds nothing, kept everybody waiting for 85 s. And of a request with a thousand prompts, the first of
which is too long, all the others are still read after it was refused: 25 s, in which other chats get a 500.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from llm_serve.host.cpus import step_back

_SHORT_CHARS = 64 << 10
"""What is read as vLLM does it, in 0.1 s at most; all prompts of a request together."""
_CHARS_PER_TOKEN = 16
_LEAST_CHARS = 256 << 10
_aside = ThreadPoolExecutor(1, "long-texts", initializer=step_back)
_limit = 0
_longest = 0


def limit_to(max_prompt_chars: int) -> None:
    """From now on, in this process, refuse what is longer; 0: what is far too long for the model."""
    global _limit  # noqa: PLW0603 - the handlers that would pass it on are vLLM's
    _limit = max_prompt_chars


def fit(max_model_len: int) -> None:
    """An engine of so many tokens has been built in this process."""
    global _longest  # noqa: PLW0603 - as above
    _longest = _most(max_model_len)


def longest_prompt() -> int:
    """Of how many characters a prompt may be at the moment, for whoever can see sooner that it is not; 0: not known."""
    return _longest


def _most(max_model_len: int) -> int:
    return max(_LEAST_CHARS, _CHARS_PER_TOKEN * max_model_len)


def install() -> None:
    """Replace the methods through which all of vLLM's routes have texts read."""
    renderers: Any = importlib.import_module("vllm.renderers.base")
    kind = renderers.BaseRenderer
    if not hasattr(kind, "reads_long_texts_aside"):
        kind.reads_long_texts_aside = True
        kind.tokenize_prompts = _bounded(kind.tokenize_prompts)
        kind.tokenize_prompts_async = _aside_or(kind.tokenize_prompts_async)


def _bounded(read: Any) -> Any:
    def tokenize_prompts(self: Any, prompts: Sequence[Any], params: Any) -> Any:
        _check(self, prompts)
        return read(self, prompts, params)

    return tokenize_prompts


def _aside_or(read: Any) -> Any:
    async def tokenize_prompts_async(self: Any, prompts: Sequence[Any], params: Any) -> Any:
        if _check(self, prompts) <= _SHORT_CHARS or not _is_thread_safe(self.tokenizer):
            return await read(self, prompts, params)
        # One piece of work for the whole request: it ends with the first prompt that is refused, and whoever leaves
        # before it begins takes it along.
        work = partial(self.tokenize_prompts, prompts, params)
        return await asyncio.get_running_loop().run_in_executor(_aside, work)

    return tokenize_prompts_async


def _is_thread_safe(tokenizer: Any) -> bool:
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

    return isinstance(tokenizer, ThreadSafeHFTokenizerMixin)


def _check(renderer: Any, prompts: Sequence[Any]) -> int:
    """How many characters have to be read. Raises vLLM's error for bad requests when one prompt has too many."""
    from vllm.exceptions import VLLMValidationError

    most = _limit or _most(int(renderer.model_config.max_model_len))
    sizes = [len(text) for prompt in prompts if isinstance(text := _text(prompt), str)]
    if (longest := max(sizes, default=0)) > most:
        message = f"the prompt has {longest} characters, and at most {most} are allowed here (limits.max_prompt_chars)."
        raise VLLMValidationError(message, parameter="prompt", value=longest)
    return sum(sizes)


def _text(prompt: Any) -> object:
    """The text that has to be read; None where there are tokens already."""
    if not isinstance(prompt, dict):
        return prompt
    if "encoder_prompt" in prompt:
        return _text(prompt["encoder_prompt"])
    return None if "prompt_token_ids" in prompt else prompt.get("prompt")
