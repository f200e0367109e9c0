"""Requests of every kind, through the official clients, and what each of them got: comparable from run to run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anthropic
import openai

from tests.daemon import MODEL_NAME

Got = dict[str, Any]
Ask = Callable[[str], Got]
"""Sends one request to the server with this URL."""

_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}, "is_capital": {"type": "boolean"}},
    "required": ["city", "people", "is_capital"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "look_up", "description": "Look a city up.", "parameters": _SCHEMA}}
_DRAWN: Mapping[str, Any] = {"temperature": 0.9, "seed": 7}
_EMOJI = "😀 😃 😄 😁 😆 😀 😃 😄 😁 😆 😀 😃 😄 😁 😆 😀 😃"


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def chat(content: str, *, stream: bool, max_tokens: int = 96, **options: Any) -> Ask:
    """One chat completion."""

    def ask(url: str) -> Got:
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "temperature": 0}
        body |= {"max_tokens": max_tokens, "stream": stream} | options
        if stream:
            body["stream_options"] = {"include_usage": True}
        with _client(url) as client:
            answer = client.chat.completions.create(**body)  # type: ignore[call-overload]
            return _chat_chunks(answer) if stream else _whole(answer)

    return ask


def completion(prompt: str, *, stream: bool, max_tokens: int = 96, **options: Any) -> Ask:
    """One completion of plain text."""

    def ask(url: str) -> Got:
        body = {"model": MODEL_NAME, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        with _client(url) as client:
            answer = client.completions.create(**body | options)  # type: ignore[call-overload]
            return _completion_chunks(answer) if stream else _whole(answer)

    return ask


def response(content: str) -> Ask:
    """One streamed answer of the responses API."""

    def ask(url: str) -> Got:
        text, usage = "", None
        with _client(url) as client:
            events = client.responses.create(
                model=MODEL_NAME, input=content, temperature=0, max_output_tokens=96, stream=True
            )
            for event in events:
                if event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type in {"response.completed", "response.incomplete"} and event.response.usage:
                    usage = event.response.usage.input_tokens, event.response.usage.output_tokens
        return {"text": text, "usage": usage}

    return ask


def message(content: str) -> Ask:
    """One streamed answer of Anthropic's API."""

    def ask(url: str) -> Got:
        body: Any = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 96}
        with (
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=300) as client,
            client.messages.stream(**body, extra_body={"temperature": 0}) as stream,
        ):
            final = stream.get_final_message()
        text = "".join(block.text for block in final.content if block.type == "text")
        return {"text": text, "reason": final.stop_reason, "usage": final.usage.output_tokens}

    return ask


def _whole(answer: Any) -> Got:
    got: Got = {"usage": _usage(answer.usage)}
    for choice in answer.choices:
        message = getattr(choice, "message", None)
        text = choice.text if message is None else message.content or ""
        calls = [(call.function.name, call.function.arguments) for call in (message and message.tool_calls) or ()]
        got[f"choice {choice.index}"] = (text, calls, choice.finish_reason)
    return got


def _chat_chunks(chunks: Iterable[Any]) -> Got:
    texts: dict[int, str] = defaultdict(str)
    calls: dict[int, str] = defaultdict(str)
    tokens: dict[int, list[str]] = defaultdict(list)
    got: Got = {}
    for chunk in chunks:
        if chunk.usage:
            got["usage"] = _usage(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls[choice.index] += (call.function.name or "") + (call.function.arguments or "")
            if choice.logprobs and choice.logprobs.content:
                tokens[choice.index] += [entry.token for entry in choice.logprobs.content]
            if choice.finish_reason:
                got[f"reason {choice.index}"] = choice.finish_reason
    return got | {"text": dict(texts), "calls": dict(calls), "tokens": dict(tokens)}


def _completion_chunks(chunks: Iterable[Any]) -> Got:
    texts: dict[int, str] = defaultdict(str)
    tokens: dict[int, list[str]] = defaultdict(list)
    got: Got = {}
    for chunk in chunks:
        if chunk.usage:
            got["usage"] = _usage(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs and choice.logprobs.tokens:
                tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                got[f"reason {choice.index}"] = choice.finish_reason
    return got | {"text": dict(texts), "tokens": dict(tokens)}


def _usage(usage: Any) -> tuple[int, int]:
    return usage.prompt_tokens, usage.completion_tokens


def _more(**options: Any) -> dict[str, Any]:
    """Parameters of vLLM's own."""
    return {"extra_body": options}


CATALOG: Mapping[str, Ask] = {
    "chat": chat("Tell me a story about a fox and a well.", stream=False),
    "chat streamed": chat("Tell me a story about a fox and a well.", stream=True),
    "chat with logprobs": chat("Name three rivers.", stream=True, logprobs=True, top_logprobs=2),
    "chat with a stop string": chat("Count from one to thirty in words.", stream=True, stop=["nineteen", "\n\n\n"]),
    "chat with penalties": chat("Write a poem.", stream=True, presence_penalty=0.8, frequency_penalty=0.4),
    "chat with bad words": chat("Write about the sea.", stream=True, **_more(bad_words=["sea", "ocean"])),
    "chat with a seed": chat("Invent a name.", stream=True, **_DRAWN),
    "JSON schema": chat(
        "Describe Paris.", stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA, "strict": True}},
    ),
    "JSON schema, whole": chat(
        "Describe Paris.", stream=False,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA, "strict": True}},
    ),
    "a tool": chat("Look Paris up.", stream=True, tools=[_TOOL], tool_choice="required"),
    "two choices": chat("Say something about the moon.", stream=True, n=2, **_DRAWN),
    "three choices, whole": completion("The moon is", stream=False, n=3, **_DRAWN),
    "completion": completion("Once upon a time", stream=False),
    "completion streamed": completion("Once upon a time", stream=True, max_tokens=160),
    "completion with logprobs": completion("One, two, three,", stream=True, logprobs=3),
    "completion with emoji": completion(_EMOJI, stream=True, **_more(ignore_eos=True)),
    "completion with least tokens": completion("The end.", stream=True, **_more(min_tokens=64)),
    "two choices with a penalty": completion("A list:", stream=True, n=2, presence_penalty=0.5, **_DRAWN),
    "response": response("Tell me about Rome."),
    "message": message("Tell me about Athens."),
}  # fmt: skip
"""Greedy or with a seed, so that two runs of one give the same."""
