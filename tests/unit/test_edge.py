"""What a request may ask for, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serve.core import request_fields
from llm_serve.core.edge import Edge, Refusal
from llm_serve.core.settings import LimitSettings

OPEN = LimitSettings(
    allow=(
        "logits_processors",
        "prompt_logprobs",
        "structured_outputs.grammar",
        "structured_outputs.regex",
        "vllm_xargs",
    )
)
URL, DATA = "http://169.254.169.254/latest", "data:image/png;base64,AAAA"


def refused(
    body: Mapping[str, Any] | bytes, limits: LimitSettings | None = None, engine: Mapping[str, object] | None = None
) -> Refusal | None:
    """What the edge says to a body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Edge.of(limits or LimitSettings(), engine or {}).refusal(content)


def user(*parts: Any) -> dict[str, Any]:
    """A chat of one message with these parts."""
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def schema(value: Any) -> dict[str, Any]:
    """A response format with this schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def long_for(most: int, body: Mapping[str, Any], max_prompt_chars: int = 0) -> Refusal | None:
    """What the edge says where the engine takes prompts of so many characters."""
    edge = Edge.of(LimitSettings(max_prompt_chars=max_prompt_chars), {}, lambda: most)
    return edge.refusal(json.dumps(body).encode())


LONG: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt": ({"prompt": "x" * 101}, "`prompt` has 101 characters"),
    "the last of many": ({"prompt": ["x", "x" * 101]}, "`prompt` has 101 characters"),
    "tokens": ({"prompt": [1] * 101}, "`prompt` has 101 tokens"),
    "tokens of many": ({"prompt": [[1], [1] * 101]}, "`prompt` has 101 tokens"),
    "tokens to read": ({"tokens": [1] * 101}, "`tokens` has 101 tokens"),
    "to embed": ({"input": ["x" * 101]}, "`input` has 101 characters"),
    "messages together": (
        {"messages": [{"content": "x" * 51}, {"content": "x" * 50}]},
        "`messages` has 101 characters",
    ),
    "parts": (user({"type": "text", "text": "x" * 51}, {"type": "text", "text": "x" * 50}), "`messages` has 101 char"),
    "items": ({"input": [{"role": "user", "content": "x" * 101}]}, "`input` has 101 characters"),
    "Anthropic's system as text": ({"system": "x" * 101}, "`system` has 101 characters"),
    "Anthropic's system": ({"system": [{"type": "text", "text": "x" * 101}]}, "`system` has 101 characters"),
}
SHORT: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": "x" * 100},
    "many": {"prompt": ["x" * 100] * 100},
    "tokens of many": {"prompt": [[1] * 100] * 100},
    "an image": user({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200}}),
    "a file of Anthropic's": user({"type": "image", "source": {"type": "base64", "data": "A" * 200}}),
    "a sound": user({"type": "input_audio", "input_audio": {"data": "A" * 200}}),
}


@pytest.mark.parametrize("name", LONG)
def test_what_no_prompt_can_be_is_refused_before_vllm_reads_it(name: str) -> None:
    """By what the engine takes, or the limit that the file sets."""
    body, words = LONG[name]

    refusal = long_for(100, body)
    assert refusal is not None
    assert refusal.message.startswith(words)
    assert refusal.message.endswith("at most 100 are allowed here (limits.max_prompt_chars).")
    assert (400, "over_limit", words.split("`")[1]) == (refusal.status, refusal.code, refusal.field)
    assert long_for(50, body, 100) == refusal
    assert long_for(101, body) is None
    assert long_for(0, body) is None, "there was no engine yet"


@pytest.mark.parametrize("name", SHORT)
def test_what_may_be_long_stays(name: str) -> None:
    """Each prompt by itself, and what is no text."""
    assert long_for(100, SHORT[name]) is None


USUAL: dict[str, dict[str, Any]] = {
    "nothing": {},
    "chat": {
        "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "temperature": 0.7, "top_p": 1, "max_tokens": 64, "stream": True, "stream_options": {"include_usage": True},
        "stop": ["\n"], "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 5, "user": "someone",
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {"5": -100}, "response_format": {"type": "text"},
    },
    "image": user({"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": DATA}}),
    "image of the responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": DATA}]}]},
    "image of Anthropic's": user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}),
    "tools with arguments of odd names": {
        "messages": [], "tools": [{"type": "function", "function": {"name": "grep", "parameters": {
            "type": "object", "properties": {"pattern": {"type": "string"}, "regex": {"type": "string"},
                                             "type": {"enum": ["regex"]}, "image_url": {"type": "string"}}}}}]},
    "a tool was called with an address": user(
        {"type": "tool_use", "id": "1", "name": "look", "input": {"image_url": URL, "source": {"url": URL}}}),
    "an answer that cites": {"input": [{"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "x", "annotations": [{"type": "url_citation", "url": URL}]}]}]},
    "documents with sources": {"messages": [], "documents": [{"source": URL, "text": "x"}]},
    "thinking off": {"messages": [], "chat_template_kwargs": {"enable_thinking": False, "chat_template": None}},
    "fields that ask for nothing": {
        "chat_template": None, "prompt_logprobs": None, "vllm_xargs": {}, "logits_processors": [],
        "kv_transfer_params": None, "mm_processor_kwargs": {}, "echo": False, "logprobs": 3},
    "echo": {"prompt": "a", "echo": True, "logprobs": None},
    "a field of nobody's": {"prompt": "a", "safety_identifier": "x", "guided_json": {"type": "object"}},
    "tokens": {"prompt": list(range(50_000)), "max_tokens": 1},
    "tokens to embed": {"input": [list(range(100))] * 100},
    "texts to embed": {"input": ["a"] * 2048},
    "a schema with a pattern": schema({"type": "string", "pattern": "^[A-Z]{3}$", "patternProperties": {"^a": {}}}),
    "long tools": {"tools": [{"description": "x" * (200 << 10)}], "tool_choice": "auto"},
    "a choice": {"structured_outputs": {"choice": ["yes", "no"], "regex": None}},
    "reasoning": {"input": "a", "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "store": False},
}  # fmt: skip


@pytest.mark.parametrize("case", USUAL)
def test_what_the_usual_clients_send_passes(case: str) -> None:
    """Nothing here needs a setting."""
    assert refused(USUAL[case]) is None


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (body, field, what the message has to say)
    "n": ({"n": 9}, "n", "`n` is 9, and at most 8 are allowed here (limits.max_choices)."),
    "n as text": ({"n": " 16_384 "}, "n", "limits.max_choices"),
    "n as a fraction": ({"n": 9.0}, "n", "limits.max_choices"),
    "n beyond all bounds": ({"n": 10**4000}, "n", "beyond all bounds"),
    "best_of": ({"best_of": 100}, "best_of", "limits.max_choices"),
    "temperature as text": ({"temperature": "nan"}, "temperature", "finite"),
    "temperature too large for a number": ({"temperature": "1e999"}, "temperature", "finite"),
    "bias without end": ({"logit_bias": {"1": "-Infinity"}}, "logit_bias", "finite"),
    "biases": ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "has 1025 entries"),
    "allowed tokens": ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids", "limits.max_token_ids"),
    "stop tokens": ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "limits.max_token_ids"),
    "stop": ({"stop": ["a", "b" * 1025]}, "stop", "limits.max_label_chars"),
    "one stop": ({"stop": "b" * 1025}, "stop", "has 1025 characters"),
    "stop sequences": ({"stop_sequences": ["a"] * 1025}, "stop_sequences", "limits.max_token_ids"),
    "bad words": ({"bad_words": ["b" * 1025]}, "bad_words", "limits.max_label_chars"),
    "cache salt": ({"cache_salt": "b" * 1025}, "cache_salt", "limits.max_label_chars"),
    "request id": ({"request_id": "b" * 1025}, "request_id", "limits.max_label_chars"),
    "model": ({"model": "b" * 1025}, "model", "limits.max_label_chars"),
    "prompts": ({"prompt": ["a"] * 2049}, "prompt", "limits.max_prompts"),
    "prompts as tokens": ({"prompt": [[1]] * 2049}, "prompt", "limits.max_prompts"),
    "inputs": ({"input": ["a"] * 2049}, "input", "limits.max_prompts"),
    "messages": ({"messages": [{}] * 4097}, "messages", "limits.max_messages"),
    "input messages": ({"input": [{}] * 4097}, "input", "limits.max_messages"),
    "parts": (user(*[{"type": "text", "text": ""}] * 4097), "messages", "limits.max_messages"),
    "tools": ({"tools": [{}] * 257}, "tools", "limits.max_tools"),
    "tools in bytes": ({"tools": [{"description": "x" * (256 << 10)}]}, "tools", "limits.max_tools_bytes"),
    "forced tools in bytes": (
        {"tools": [{"description": "x" * (32 << 10)}], "tool_choice": "required"}, "tools", "limits.max_schema_bytes"),
    "a named tool in bytes": (
        {"tools": [{"description": "x" * (32 << 10)}], "tool_choice": {"type": "function"}}, "tools", "max_schema_bytes"),
    "schema in bytes": (schema({"enum": ["x" * (256 << 10)]}), "response_format", "limits.max_schema_bytes"),
    "template values in bytes": ({"chat_template_kwargs": {"a": "x" * (256 << 10)}}, "chat_template_kwargs", "bytes"),
    "pattern": (schema({"items": [{"pattern": "a" * 1025}]}), "response_format", "limits.max_pattern_chars"),
    "pattern of names": (schema({"patternProperties": {"a" * 1025: {}}}), "response_format", "max_pattern_chars"),
    "pattern of a tool": ({"tools": [{"input_schema": {"pattern": "a" * 1025}}]}, "tools", "max_pattern_chars"),
    "pattern in a text": (
        {"structured_outputs": {"json": json.dumps({"pattern": "a" * 1025})}}, "structured_outputs", "max_pattern_chars"),
    "nesting": ({"metadata": json.loads("[" * 64 + "]" * 64)}, "", "limits.max_nesting"),
    "chat template": ({"chat_template": "{{ 1 }}"}, "chat_template", "engine.trust_request_chat_template"),
    "chat template among the values": (
        {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template", "engine.trust_request_chat_template"),
    "processor": ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", "engine.trust_request_mm_kwargs"),
    "decoder": ({"media_io_kwargs": {"video": {}}}, "media_io_kwargs", "engine.trust_request_mm_kwargs"),
    "embeds": ({"prompt_embeds": "AAAA"}, "prompt_embeds", "engine.enable_prompt_embeds"),
    "transfer": ({"kv_transfer_params": {"remote_host": "x"}}, "kv_transfer_params", "engine.kv_transfer_config"),
    "encoder's transfer": ({"ec_transfer_params": {"a": 1}}, "ec_transfer_params", "engine.ec_transfer_config"),
    "prompt logprobs": ({"prompt_logprobs": 0}, "prompt_logprobs", 'limits.allow = ["prompt_logprobs"]'),
    "all prompt logprobs": ({"prompt_logprobs": -1}, "prompt_logprobs", "limits.allow"),
    "echo with logprobs": ({"echo": True, "logprobs": 0}, "prompt_logprobs", "`echo` with `logprobs`"),
    "xargs": ({"vllm_xargs": {"a": 1}}, "vllm_xargs", 'limits.allow = ["vllm_xargs"]'),
    "logits processors": ({"logits_processors": ["os.system"]}, "logits_processors", "limits.allow"),
    "regex": ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", "`structured_outputs.regex`"),
    "whitespace": ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.regex", "limits.allow"),
    "grammar": ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar", "limits.allow"),
    "regex in a structural tag": (
        {"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": "a"}}},
        "structured_outputs.regex", "`response_format` of type regex"),
    "grammar in a structural tag in a text": (
        {"structured_outputs": {"structural_tag": json.dumps({"format": {"type": "grammar", "grammar": "x"}})}},
        "structured_outputs.grammar", "`structured_outputs` of type grammar"),
    "regex of a tool": (
        {"tools": [{"type": "custom", "format": {"type": "grammar", "syntax": "regex"}}]},
        "structured_outputs.grammar", "`tools` of type grammar"),
    "image": (user({"type": "image_url", "image_url": {"url": URL}}), "messages", "engine.allowed_media_domains"),
    "image without a type": (user({"image_url": URL}), "messages", "169.254.169.254"),
    "video": (user({"type": "video_url", "video_url": {"url": URL}}), "messages", "data: URL"),
    "audio": (user({"type": "audio_url", "audio_url": URL}), "messages", "engine.allowed_media_domains"),
    "file": (user({"image_url": "FILE:///etc/passwd"}), "messages", "engine.allowed_local_media_path"),
    "nearly data": (user({"image_url": " data:,"}), "messages", "engine.allowed_media_domains"),
    "image of the responses": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]}, "input", "http"),
    "image of a chat to embed": (
        {"input": [[{"role": "user", "content": [{"image_url": URL}]}]]}, "input", "engine.allowed_media_domains"),
    "image behind tokens": ({"input": [1, [{"image_url": URL}]]}, "input", "engine.allowed_media_domains"),
    "image of Anthropic's": (user({"type": "image", "source": {"type": "url", "url": URL}}), "messages", "http"),
    "image in a tool's result": (
        user({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": URL}}]}),
        "messages", "engine.allowed_media_domains"),
    "image in the system's words": ({"system": [{"type": "image", "source": {"url": URL}}]}, "system", "http"),
    "image in a prompt's values": ({"prompt": {"variables": {"a": {"image_url": URL}}}}, "prompt", "http"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_the_field_and_the_setting(case: str) -> None:
    """Each refusal is one line that says what, and what changes it."""
    body, field, words = REFUSED[case]
    refusal = refused(body)

    assert refusal is not None
    assert field == refusal.field
    assert words in refusal.message
    assert "\n" not in refusal.message
    assert refusal.status in {400, 413}


OPENED: dict[str, tuple[str, dict[str, object]]] = {
    "chat template": ("chat template", {"trust_request_chat_template": True}),
    "chat template among the values": ("chat template among the values", {"trust_request_chat_template": True}),
    "processor": ("processor", {"trust_request_mm_kwargs": True}),
    "embeds": ("embeds", {"enable_prompt_embeds": True}),
    "transfer": ("transfer", {"kv_transfer_config.kv_connector": "x"}),
    "image": ("image", {"allowed_media_domains": ["169.254.169.254"]}),
    "file": ("file", {"allowed_local_media_path": "/srv/media"}),
    "regex": ("regex", {}),
    "grammar": ("grammar", {}),
    "echo with logprobs": ("echo with logprobs", {}),
    "prompt logprobs": ("prompt logprobs", {}),
    "xargs": ("xargs", {}),
    "logits processors": ("logits processors", {}),
}


@pytest.mark.parametrize("case", OPENED)
def test_each_setting_opens_what_its_refusal_names(case: str) -> None:
    """vLLM's own switch where it has one, else limits.allow."""
    name, engine = OPENED[case]

    assert refused(REFUSED[name][0], OPEN, engine) is None
    assert refused(REFUSED[name][0], None, dict.fromkeys(engine, False)) is not None


def test_a_switch_for_files_opens_no_addresses() -> None:
    """And the other way round."""
    assert refused(REFUSED["image"][0], None, {"allowed_local_media_path": "/srv"}) is not None
    assert refused(REFUSED["file"][0], None, {"allowed_media_domains": ["a"]}) is not None


def test_unknown_fields_can_be_refused() -> None:
    """Where a file wants to hear of every misspelt field."""
    strict = LimitSettings(unknown_fields="refuse")
    refusal = refused({"prompt": "a", "temprature": 1, "zz": 1}, strict)

    assert refusal == Refusal("`temprature` is no field that is known here (limits.unknown_fields).", "temprature")
    assert refused(USUAL["chat"], strict) is None


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{\x00}\x00", 400, "not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "not JSON"),
        (b'{"temperature": NaN}', 400, "not JSON"),
        (b'{"temperature": -Infinity}', 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"a": ' * 300 + b"1" + b"}" * 300, 400, "not JSON"),
        (b'{"prompt": [' + b"1," * 1_000_000 + b"1]}", 413, "limits.max_values"),
    ],
)
def test_a_body_that_nobody_should_parse(body: bytes, status: int, words: str) -> None:
    """What we cannot read is not passed on to somebody who might read it differently."""
    refusal = refused(body)

    assert refusal is not None
    assert (status, "") == (refusal.status, refusal.field)
    assert words in refusal.message


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"1", b"null", b'"a"'])
def test_what_is_no_request_is_left_to_vllm(body: bytes) -> None:
    """It has words of its own for that."""
    assert refused(body) is None


def test_of_a_field_that_is_there_twice_the_last_counts_as_for_vllm() -> None:
    """Else the first would be looked at and the second be served."""
    assert refused(b'{"n": 1, "n": 9}') is not None
    assert 9 == json.loads(b'{"n": 1, "n": 9}')["n"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u006e": 9}',
        b'{"messages": [{"content": [{"image_\\u0075rl": "http://a"}]}]}',
        b'{"response_format": {"format": {"type": "\\u0072egex"}}}',
        b'{"tools": [{"p\\u0061ttern": "%s"}]}' % (b"a" * 1025),
        b'{"structured_outputs": {"json": "{\\"p\\\\u0061ttern\\": \\"%s\\"}"}}' % (b"a" * 1025),
    ],
)
def test_a_field_behind_an_escape_is_the_field(body: bytes) -> None:
    """It is the parsed name that counts."""
    assert refused(body) is not None


def test_the_client_reads_of_its_values_only_what_is_short_and_plain() -> None:
    """An error is no way to put lines into a log, or to send much back."""
    refusal = refused(user({"image_url": "http://a\r\nset-cookie: b" + "x" * 10_000}))

    assert refusal is not None
    assert refusal.message.isprintable()
    assert len(refusal.message) < 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(request_fields.KNOWN)) | st.text(max_size=8), VALUES, max_size=6))
def test_whatever_comes_there_is_an_answer(body: dict[str, Any]) -> None:
    """No value of any field makes the edge raise; what it refuses it refuses again, and says why."""
    first, again = refused(body), refused(body)

    assert first == again
    assert first is None or any(word in first.message for word in ("(limits.", "(engine.", "finite"))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["messages", "input", "system", "previous_input_messages"]),
    st.lists(st.sampled_from(["content", "list", "a", "source"]), max_size=8),
    st.sampled_from(["image_url", "audio_url", "video_url"]),
    st.booleans(),
)
def test_an_address_is_found_however_deep_it_lies(field: str, way: list[str], key: str, is_object: bool) -> None:
    """Wherever in a conversation: which depth a handler of vLLM's looks at is its own affair."""
    value: Any = {key: {"url": URL} if is_object else URL}
    for step in way:
        value = [value] if step == "list" else {step: value}

    assert refused({field: [value]}) is not None


def test_each_field_is_asked_one_thing() -> None:
    """The groups do not overlap, so that no check hides another."""
    groups = [
        request_fields.COUNTS, request_fields.NUMBERS, request_fields.TOKEN_IDS, request_fields.LABELS,
        request_fields.PROMPTS, request_fields.TALKS, request_fields.DESCRIPTIONS, request_fields.PLAIN,
        frozenset(request_fields.SWITCHED),
    ]  # fmt: skip

    assert sum(map(len, groups)) == len(request_fields.KNOWN)
