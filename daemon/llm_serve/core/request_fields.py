"""The fields of requests that vLLM's routes know, by what has to be asked about their values.

One list for all routes. tests/contract/test_request_fields.py holds it against the installed vLLM's request classes: a
field that a new vLLM brings is looked at by a person before it is served.
"""

from __future__ import annotations

ALLOW = "limits.allow"

SWITCHED: dict[str, tuple[str, str]] = {
    "chat_template": ("engine.trust_request_chat_template", "a template is a program that runs in the server"),
    "ec_transfer_params": ("engine.ec_transfer_config", "it names machines that the engine connects to"),
    "kv_transfer_params": ("engine.kv_transfer_config", "it names machines that the engine connects to"),
    "logits_processors": (ALLOW, "it names code to run"),
    "media_io_kwargs": ("engine.trust_request_mm_kwargs", "it goes to decoders unread"),
    "mm_processor_kwargs": ("engine.trust_request_mm_kwargs", "it goes to the model's processor unread"),
    "prompt_embeds": ("engine.enable_prompt_embeds", "it is a tensor that the engine unpacks"),
    "prompt_logprobs": (ALLOW, "for a long prompt it takes gigabytes of the engine's memory"),
    "structured_outputs.grammar": (ALLOW, "compiling a grammar can keep the engine busy for any time"),
    "structured_outputs.regex": (ALLOW, "compiling an expression can keep the engine busy for any time"),
    "vllm_xargs": (ALLOW, "it goes to the engine's plugins unread"),
}
"""What is refused unless a setting opens it: the setting, and why it is shut."""

FETCHED = {
    "http": ("engine.allowed_media_domains", "the server would fetch it"),
    "file": ("engine.allowed_local_media_path", "the server would read it"),
}
"""The same for media that are named instead of sent."""

COUNTS = frozenset({"n", "best_of"})
NUMBERS = frozenset(
    {
        *("frequency_penalty", "length_penalty", "min_p", "presence_penalty", "repetition_penalty"),
        *("temperature", "top_p"),
    }
)
TOKEN_IDS = frozenset({"allowed_token_ids", "logit_bias", "logprob_token_ids", "stop_token_ids"})
LABELS = frozenset(
    {
        *("bad_words", "cache_salt", "model", "previous_response_id", "prompt_cache_key", "request_id", "session_id"),
        *("stop", "stop_sequences", "user"),
    }
)
PROMPTS = frozenset({"input", "prompt", "tokens"})
TALKS = frozenset({"messages", "previous_input_messages", "system"})
DESCRIPTIONS = frozenset(
    {
        *("chat_template_kwargs", "output_config", "response_format", "structured_outputs", "text", "tool_choice"),
        "tools",
    }
)
"""What becomes a grammar or goes into a template."""

PLAIN = frozenset(
    {
        *(
            "add_generation_prompt",
            "add_special_tokens",
            "background",
            "continue_final_message",
            "dimensions",
            "documents",
        ),
        *(
            "echo",
            "embed_dtype",
            "embedding_types",
            "enable_response_messages",
            "encoding_format",
            "endianness",
            "ignore_eos",
        ),
        *("images", "include", "include_reasoning", "include_stop_str_in_output", "input_type", "inputs"),
        *("instructions", "logprobs", "max_completion_tokens", "max_output_tokens", "max_tokens", "max_tool_calls"),
        *("metadata", "min_tokens", "mm_payload", "output_dimension", "padding", "parallel_tool_calls", "priority"),
        *("reasoning", "reasoning_effort", "repetition_detection", "return_mm_kwargs", "return_prompt_text"),
        *("return_token_ids", "return_token_offsets", "return_token_strs", "return_tokens_as_token_ids"),
        *("routed_experts_prompt_start", "seed", "service_tier", "skip_special_tokens"),
        *("spaces_between_special_tokens", "store", "stream", "stream_interval", "stream_options", "suffix", "texts"),
        *("thinking", "thinking_token_budget", "top_k", "top_logprobs", "truncate"),
        *("truncate_prompt_tokens", "truncation", "truncation_side", "use_activation", "use_beam_search"),
        "watermarking",
    }
)
"""What vLLM bounds by itself, or what is no longer than the body."""

KNOWN = COUNTS | NUMBERS | TOKEN_IDS | LABELS | PROMPTS | TALKS | DESCRIPTIONS | PLAIN | SWITCHED.keys()
