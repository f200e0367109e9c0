"""Goes on with an answer whose engine has died, so that the client sees one unbroken stream.

Two ways. `continued`: prompt and delivered tokens are the new prompt; as fast as reading them. `repeated`: the engine
is made to say the delivered tokens again, and they are swallowed; as slow as the first time, but grammars, penalties
and seeds then stand where they stood. Which one: `obstacle` says what stands in the way of the first.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from llm_serve.engine import forced
from llm_serve.engine.delivered import Delivered, Line
from llm_serve.host.logs import get_logger
from llm_serve.metrics import continuous

_GREEDY = 1e-5
Outputs = AsyncGenerator[Any, None]


class CannotResumeError(Exception):
    """What was delivered cannot be gone on with; the text says why."""


@dataclass(slots=True)
class Asked:
    """A call of EngineClient.generate."""

    prompt: Any
    params: SamplingParams
    request_id: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_streamed(self) -> bool:
        """True where the client gets tokens before the end; else nothing is delivered before everything is."""
        return bool(self.params.output_kind is RequestOutputKind.DELTA)

    @property
    def prompt_tokens(self) -> list[int] | None:
        """None for a prompt that is not one of tokens."""
        return self.prompt.get("prompt_token_ids") if isinstance(self.prompt, dict) else None


def obstacle(asked: Asked) -> str | None:
    """What of this request is kept by an engine beside its tokens, in words. None if nothing is."""
    params = asked.params
    kept = {
        "a grammar": params.structured_outputs is not None,
        "penalties": params.presence_penalty or params.frequency_penalty,
        "bad_words": params.bad_words,
        "a thinking budget": params.thinking_token_budget is not None,
        "a repetition detector": params.repetition_detection is not None,
        "a seed": params.seed is not None and params.temperature > _GREEDY,
        "arguments for a logits processor": params.extra_args,
        "a prompt that is not only tokens": asked.prompt_tokens is None,
    }
    return next((name for name, is_so in kept.items() if is_so), None)


def is_repeatable(prompt: Any) -> bool:
    """False for a prompt that cannot be sent twice: a stream, or images in shared memory that goes with the engine."""
    if not isinstance(prompt, dict):
        return not hasattr(prompt, "__anext__")
    items = prompt.get("mm_kwargs") or {}
    return all(item is not None and "address" not in item for each in items.values() for item in each)


async def go_on(llm: Any, asked: Asked, delivered: Delivered, name: str) -> Outputs:
    """The rest of an answer from this engine, as RequestOutputs that continue those before.

    Lines of an answer with n > 1 are asked for one by one: they were cut at different places. `name` has to be new
    to the engine. Raises CannotResumeError.
    """
    lines = list(delivered.unfinished(asked.params.n))
    rest = [_line(llm, asked, delivered.line(index), index, f"{name}-{index}") for index in lines]
    unfinished = len(rest)
    async for _, output in merge_async_iterators(*rest):
        unfinished -= output.outputs[0].finish_reason is not None
        yield _as_before(output, asked, delivered, is_last=unfinished == 0)


def _as_before(output: Any, asked: Asked, delivered: Delivered, *, is_last: bool) -> Any:
    """With what is said of the whole request as its first output has said it."""
    output.request_id, output.finished = asked.request_id, is_last
    if (first := delivered.first) is not None:
        output.prompt, output.prompt_token_ids = first.prompt, first.prompt_token_ids
        output.prompt_logprobs = output.prompt_token_id_logprobs = None
        output.num_cached_tokens = first.num_cached_tokens
        if output.metrics is not None and first.metrics is not None:
            output.metrics = copy.copy(output.metrics)
            output.metrics.arrival_time = first.metrics.arrival_time
            output.metrics.first_token_ts = first.metrics.first_token_ts
    return output


async def _line(llm: Any, asked: Asked, line: Line, index: int, name: str) -> Outputs:
    way = _way(llm, asked, line)
    params = asked.params.clone()
    params.n = 1
    if asked.params.n > 1 and params.seed is not None:
        params.seed += index  # as vLLM does
    alone = Asked(asked.prompt, params, name, asked.options)
    async for output in way(llm, alone, line):
        output.outputs[0].index = index
        yield output


def _way(llm: Any, asked: Asked, line: Line) -> Any:
    if not line.tokens:
        return _anew
    if asked.prompt_tokens is not None and len(asked.prompt_tokens) + len(line.tokens) >= _limit(llm):
        return _ended_by_length
    if (why := obstacle(asked)) is None:
        return _continued
    if not forced.is_installed(llm.vllm_config):
        raise CannotResumeError(f"the answer depends on {why}, which this engine cannot be brought back to")
    return _repeated


def _limit(llm: Any) -> int:
    return int(llm.model_config.max_model_len)


async def _anew(llm: Any, asked: Asked, line: Line) -> Outputs:  # noqa: ARG001 - as the other ways
    async for output in llm.generate(asked.prompt, asked.params, asked.request_id, **asked.options):
        yield output


async def _continued(llm: Any, asked: Asked, line: Line) -> Outputs:
    """Read prompt and delivered tokens, and go on.

    The text is made here: stop strings and characters may span the cut.
    """
    done, text = len(line.tokens), _text_so_far(llm, asked, line)
    generator = llm.generate(_longer(asked.prompt, line.tokens), _shorter(asked.params, done), asked.request_id,
                             **asked.options)  # fmt: skip
    base = line.cumulative_logprob
    continuous.counted_before("vllm:prompt_tokens", len(asked.prompt_tokens or ()) + done)
    try:
        async for output in generator:
            part = output.outputs[0]
            stop = text.update(list(part.token_ids), part.finish_reason == "stop")
            if stop is not None:
                part.finish_reason, part.stop_reason = "stop", stop
                output.finished = True
            part.token_ids = text.output_token_ids[done:]
            done += len(part.token_ids)
            part.text = text.get_next_output_text(part.finish_reason is not None, delta=True)
            if part.logprobs is not None:
                part.logprobs = part.logprobs[: len(part.token_ids)]
            if base is not None and part.cumulative_logprob is not None:
                part.cumulative_logprob += base
            yield output
            if stop is not None:
                return
    finally:
        await generator.aclose()


def _longer(prompt: Mapping[str, Any], tokens: list[int]) -> dict[str, Any]:
    longer = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *tokens]}
    longer.pop("prompt", None)
    longer.pop("prompt_token_offsets", None)
    return longer


def _shorter(params: SamplingParams, done: int) -> SamplingParams:
    """The rest of the request after `done` tokens."""
    rest = params.clone()
    rest.stop, rest.prompt_logprobs, rest.prompt_logprob_token_ids = [], None, None
    rest.output_text_buffer_length = 0
    rest.min_tokens = max(0, rest.min_tokens - done)
    if rest.max_tokens is not None:
        rest.max_tokens -= done
    return rest


def _text_so_far(llm: Any, asked: Asked, line: Line) -> IncrementalDetokenizer:
    """The detokenizer as it stood at the cut: text held back for a stop string, half a character."""
    tokenizer = llm.tokenizer if asked.params.detokenize else None
    # What it reads of an EngineCoreRequest; to make a whole one would mean to validate the request again.
    request: Any = SimpleNamespace(
        request_id=asked.request_id,
        sampling_params=asked.params,
        prompt_token_ids=asked.prompt_tokens,
        prompt_embeds=None,
    )
    text = IncrementalDetokenizer.from_new_request(tokenizer, request)
    text.update(list(line.tokens), False)  # noqa: FBT003 - vLLM's signature
    text._last_output_text_offset = line.chars  # noqa: SLF001 - there is no other way to say it; a contract test looks
    return text


async def _repeated(llm: Any, asked: Asked, line: Line) -> Outputs:
    """Have the delivered tokens said again, and swallow them."""
    params = asked.params.clone()
    params.extra_args = {**(params.extra_args or {}), forced.KEY: list(line.tokens)}
    tokens = chars = 0
    continuous.counted_before("vllm:prompt_tokens", len(asked.prompt_tokens or ()))
    continuous.counted_before("vllm:generation_tokens", len(line.tokens))
    async for output in llm.generate(asked.prompt, params, asked.request_id, **asked.options):
        part = output.outputs[0]
        known = line.tokens[tokens : tokens + len(part.token_ids)]
        if list(part.token_ids[: len(known)]) != known:
            raise CannotResumeError("the engine did not repeat what had been delivered")
        tokens, chars, was = tokens + len(part.token_ids), chars + len(part.text), chars
        part.token_ids = part.token_ids[len(known) :]
        part.text = part.text[max(0, line.chars - was) :]
        if part.logprobs is not None:
            part.logprobs = part.logprobs[len(known) :]
        if part.token_ids or part.text or part.finish_reason is not None:
            yield output


async def _ended_by_length(llm: Any, asked: Asked, line: Line) -> Outputs:
    """A smaller plan has no room for another token: what was delivered is all there is."""
    get_logger().warning(
        "an answer ends early: it is as long as the smaller plan allows",
        request_id=asked.request_id,
        max_model_len=_limit(llm),
    )
    text = _text_so_far(llm, asked, line).get_next_output_text(True, True)  # noqa: FBT003 - vLLM's signature
    part = CompletionOutput(0, text, [], line.cumulative_logprob, None, finish_reason="length")
    yield RequestOutput(asked.request_id, None, asked.prompt_tokens, None, [part], finished=True)
