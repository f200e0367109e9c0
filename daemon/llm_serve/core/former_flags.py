"""What became of vLLM's options and variables that scripts still have: today's name, or why there is none.

Looked up in vLLM's history up to 0.32. A test holds that none of them is an option of the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

_ONE_ENGINE = "it belonged to vLLM's first engine, which is gone"
_PREEMPTED = "a request that is preempted is computed again; the prefix cache makes that short"
_ADAPTERS = "prompt adapters are gone; use LoRA (enable_lora, lora_modules)"
_TOKENIZERS = "renderer_num_workers is what is near to it"

DROPPED: Mapping[str, str] = {
    "device": "vLLM takes what its build is for: install the CUDA or the CPU build",
    "disable_async_output_proc": f"{_ONE_ENGINE}; async_scheduling is what is near to it",
    "disable_frontend_multiprocessing": "the engine always runs in processes of its own",
    "disable_log_requests": "requests are never logged",
    "disable_logprobs_during_spec_decoding": _ONE_ENGINE,
    "enable_lora_bias": "LoRA biases are no longer supported",
    "enable_prompt_adapter": _ADAPTERS,
    "enable_reasoning": "reasoning_parser alone is enough",
    "engine_use_ray": 'distributed_executor_backend = "ray" spreads the workers',
    "guided_decoding_disable_fallback": "structured output has no fallback any more",
    "long_lora_scaling_factors": "long LoRA is no longer supported",
    "lora_extra_vocab_size": "LoRA adapters cannot add words any more",
    "max_context_len_to_capture": "CUDA graphs depend on the batch now: max_cudagraph_capture_size",
    "max_long_partial_prefills": _ONE_ENGINE,
    "max_num_partial_prefills": _ONE_ENGINE,
    "max_prompt_adapter_token": _ADAPTERS,
    "max_prompt_adapters": _ADAPTERS,
    "max_seq_len_to_capture": "CUDA graphs depend on the batch now: max_cudagraph_capture_size",
    "multi_step_stream_outputs": "steps are no longer bundled; stream_interval says how many tokens a chunk has",
    "num_lookahead_slots": "speculative_config.num_speculative_tokens says it",
    "num_scheduler_steps": "steps are no longer bundled; async_scheduling, on where possible, hides what they cost",
    "override_neuron_config": "Neuron has a plugin of its own",
    "preemption_mode": _PREEMPTED,
    "prompt_adapters": _ADAPTERS,
    "qlora_adapter_name_or_path": "use enable_lora and lora_modules",
    "quantization_param_path": "scales of an fp8 KV cache come with the model's files",
    "scheduler_delay_factor": _ONE_ENGINE,
    "speculative_disable_mqa_scorer": _ONE_ENGINE,
    "swap_space": f"{_PREEMPTED}. kv_offloading_size (GiB) keeps KV cache in main memory",
    "tokenizer_pool_extra_config": _TOKENIZERS,
    "tokenizer_pool_size": _TOKENIZERS,
    "tokenizer_pool_type": _TOKENIZERS,
    "typical_acceptance_sampler_posterior_alpha": _ONE_ENGINE,
    "typical_acceptance_sampler_posterior_threshold": _ONE_ENGINE,
    "use_v2_block_manager": "there is one block manager now",
}
"""Options without a successor of the same meaning."""

RENAMED: Mapping[str, str] = {
    "chat_template_text_format": "chat_template_content_format",
    "cuda_graph_sizes": "cudagraph_capture_sizes",
    "guided_decoding_backend": "structured_outputs_config.backend",
    "ngram_prompt_lookup_max": "speculative_config.prompt_lookup_max",
    "ngram_prompt_lookup_min": "speculative_config.prompt_lookup_min",
    "num_speculative_tokens": "speculative_config.num_speculative_tokens",
    "override_pooler_config": "pooler_config",
    "rope_scaling": "hf_overrides.rope_parameters",
    "rope_theta": "hf_overrides.rope_parameters.rope_theta",
    "speculative_draft_tensor_parallel_size": "speculative_config.draft_tensor_parallel_size",
    "speculative_max_model_len": "speculative_config.max_model_len",
    "speculative_model": "speculative_config.model",
    "speculative_model_quantization": "speculative_config.quantization",
}
"""Options whose value stands elsewhere now; a dot leads into a table."""

NOTES: Mapping[str, str] = {
    "rope_scaling": "rope_theta, as in the model's config.json, has to stand in the table too",
}
"""What else there is to do about a renamed option."""

SWITCHED: Mapping[str, tuple[str, object]] = {
    "disable_mm_preprocessor_cache": ("mm_processor_cache_gb", 0),
    "guided_decoding_disable_additional_properties": ("structured_outputs_config.disable_additional_properties", True),
    "guided_decoding_disable_any_whitespace": ("structured_outputs_config.disable_any_whitespace", True),
    "worker_use_ray": ("distributed_executor_backend", "ray"),
}
"""Switches that are values of other options now."""

TASKS: Mapping[str, Mapping[str, str]] = {
    "auto": {},
    "classify": {"runner": "pooling", "convert": "classify"},
    "embed": {"runner": "pooling", "convert": "embed"},
    "embedding": {"runner": "pooling", "convert": "embed"},
    "generate": {"runner": "generate"},
    "reward": {"runner": "pooling"},
    "score": {"runner": "pooling", "convert": "classify"},
    "transcription": {"runner": "generate"},
}
"""What --task said, by its values."""

SWITCHES = frozenset(SWITCHED) | {
    "disable_async_output_proc", "disable_frontend_multiprocessing", "disable_log_requests", "enable_lora_bias",
    "enable_prompt_adapter", "enable_reasoning", "engine_use_ray", "guided_decoding_disable_fallback",
    "multi_step_stream_outputs", "use_v2_block_manager", "disable_logprobs_during_spec_decoding",
}  # fmt: skip
"""Former options that had no value: the word after one is not theirs."""

BACKEND_ORDER = "recovery.attention_backends can name an order to fall back through"
VARIABLES: Mapping[str, str] = {
    "VLLM_ATTENTION_BACKEND": "engine.attention_backend says it",
    "VLLM_ENGINE_ITERATION_TIMEOUT_S": "recovery.stall_timeout_s says how long an engine may stand still",
    "VLLM_FLASH_ATTN_VERSION": "engine.attention_config.flash_attn_version says it",
    "VLLM_RPC_TIMEOUT": "recovery.stall_timeout_s says how long an engine may stand still",
    "VLLM_TORCH_PROFILER_DIR": "engine.profiler_config says it",
    "VLLM_USE_TRITON_FLASH_ATTN": "engine.attention_backend says it",
    "VLLM_USE_V1": "there is one engine now",
}
"""Variables that vLLM no longer reads."""

BACKENDS: Mapping[str, str] = {
    "FLASHINFER_VLLM_V1": "FLASHINFER",
    "FLASH_ATTN_VLLM_V1": "FLASH_ATTN",
    "TRITON_ATTN_VLLM_V1": "TRITON_ATTN",
}
"""Attention backends that have another name now."""

_NO_LOADER = "its loader is gone: leave it out"
WEIGHTS: Mapping[str, Mapping[str, str]] = {
    "bitsandbytes": {
        "load_format": _NO_LOADER,
        "quantization": (
            "vLLM 0.32 cannot load it: take a checkpoint that is quantized already (AWQ, GPTQ, compressed-tensors; "
            'then nothing has to be set), or quantize while loading (quantization = "fp8_per_tensor" and others)'
        ),
    },
    "gguf": {
        "load_format": _NO_LOADER,
        "quantization": "vLLM 0.32 cannot load it: take a checkpoint of safetensors (AWQ, GPTQ, fp8)",
    },
}
"""Kinds of weights that vLLM no longer loads, by value and option."""
