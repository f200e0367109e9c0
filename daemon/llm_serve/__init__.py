"""llm-serve keeps a local LLM served, whatever happens to its engine."""

__version__ = "0.1.0"
