"""The hardware tests of `llm-serve stress`."""
