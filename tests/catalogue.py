"""A few of vLLM's options, by hand, so that decisions can be tested without the seconds of importing it.

tests/contract/test_catalogue.py holds it against the installed vLLM.
"""

from __future__ import annotations

from llm_serve.core.flags import Catalogue, Option

CATALOGUE = Catalogue(
    options={
        "additional_config": Option("one", "json"),
        "api_key": Option("many", "text", elsewhere="Set server.api_keys"),
        "attention_backend": Option("one", "text"),
        "chat_template": Option("one", "text"),
        "compilation_config": Option("one", "json"),
        "config": Option("one", "text", elsewhere="This file is the configuration; write its options under [engine]"),
        "convert": Option("one", "text"),
        "cudagraph_capture_sizes": Option("many", "number"),
        "device_ids": Option("one", "json", elsewhere="Set gpu.devices"),
        "device_memory_utilization": Option("one", "number", same_as="gpu_memory_utilization"),
        "distributed_executor_backend": Option("one", "text"),
        "enable_prefix_caching": Option("nothing", "switch"),
        "enforce_eager": Option("nothing", "switch"),
        "gpu_memory_utilization": Option("one", "number"),
        "hf_overrides": Option("one", "json"),
        "hf_token": Option("maybe", "text"),
        "host": Option("one", "text", elsewhere="Set server.listen"),
        "limit_mm_per_prompt": Option("one", "json"),
        "load_format": Option("one", "text"),
        "max_model_len": Option("one", "number"),
        "max_num_seqs": Option("one", "number"),
        "mm_processor_cache_gb": Option("one", "number"),
        "model": Option("one", "text", elsewhere="Set model at the top of the file"),
        "optimization_level": Option("one", "text"),
        "port": Option("one", "number", elsewhere="Set server.listen"),
        "quantization": Option("one", "text"),
        "revision": Option("one", "text"),
        "runner": Option("one", "text"),
        "served_model_name": Option("many", "text"),
        "speculative_config": Option("one", "json"),
        "ssl_keyfile": Option("one", "text", elsewhere="Put a TLS proxy in front of server.listen"),
        "structured_outputs_config": Option("one", "json"),
        "tensor_parallel_size": Option("one", "number"),
        "uds": Option("one", "text", elsewhere='Set server.listen = "unix:/path"'),
    },
    short={"-tp": "tensor_parallel_size", "-cc": "compilation_config", "-q": "quantization"},
    variables=frozenset({"VLLM_LOGGING_LEVEL", "VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_WORKER_MULTIPROC_METHOD"}),
    version="0.32.0",
)
