"""Has short texts read at once, on the event loop; vLLM sends each through three groups of tasks and two threads.

Reading one takes some 0.2 ms. But at each of those eight turns it waits for whatever else the loop has to do, and in a
thread for the interpreter, which a busy loop gives away every 5 ms. Of many requests that come at once all would reach
the engine as late as the last.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llm_serve.engine import tokenizer_copies

_SHORT_CHARS, _FEW = 2048, 32
"""All texts of a request together, which take 2 ms at most, and how many there may be."""
_PLAIN = frozenset({"role", "content", "name"})


def install() -> None:
    """Replace the methods through which vLLM's routes have chats and prompts read. A second call does nothing."""
    kind: Any = importlib.import_module("vllm.renderers.hf").HfRenderer
    if not hasattr(kind, "reads_short_texts_at_once"):
        kind.reads_short_texts_at_once = True
        kind.render_chat_async = _at_once_or(kind.render_chat_async, kind.render_chat, _are_short_chats)
        kind.render_cmpl_async = _at_once_or(kind.render_cmpl_async, kind.render_cmpl, _are_short_prompts)


def trust(chat: Any) -> None:
    """The template with which this handler of chats was made is no client's: it takes no time worth mentioning."""
    online = getattr(chat, "online_renderer", None)
    if online is not None:
        online.renderer.own_chat_template = online.chat_template


def _at_once_or(read_later: Any, read_now: Any, is_short: Callable[..., bool]) -> Any:
    async def render_async(self: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        if is_short(self, texts, *args) and tokenizer_copies.is_one_free(self.tokenizer):
            return read_now(self, texts, *args, **kwargs)
        return await read_later(self, texts, *args, **kwargs)

    return render_async


def _are_short_chats(renderer: Any, conversations: Sequence[Any], params: Any, *_: Any) -> bool:
    """Few plain messages, a template of our own, and no tools, which are long."""
    if params.chat_template not in (None, getattr(renderer, "own_chat_template", None)):
        return False
    if params.chat_template_kwargs.get("tools") or sum(map(len, conversations)) > _FEW:
        return False
    return _are_short(_text_of(message) for conversation in conversations for message in conversation)


def _text_of(message: Any) -> object:
    """The text of a message that is nothing else."""
    return message.get("content") if isinstance(message, Mapping) and message.keys() <= _PLAIN else None


def _are_short_prompts(_: Any, prompts: Sequence[Any], *__: Any) -> bool:
    """Few plain texts; tokens need no reading."""
    return len(prompts) <= _FEW and _are_short(
        each.get("prompt") if isinstance(each, Mapping) else None for each in prompts
    )


def _are_short(texts: Iterable[object]) -> bool:
    left = _SHORT_CHARS
    for text in texts:
        if not isinstance(text, str) or len(text) > left:
            return False
        left -= len(text)
    return True
