"""The vLLM border: the only package that imports vllm, and only inside functions or on the engine's side."""
