"""What is replaced of vLLM in every process that answers requests; each module says what, and why."""

from __future__ import annotations

from llm_serve.engine import gathering, grammars, long_texts, media_cache, pieces, short_texts, tokenizer_copies


def install() -> None:
    """Replace it all. vLLM is loaded by then; a second call does nothing."""
    for module in (tokenizer_copies, media_cache, long_texts, short_texts, pieces, gathering, grammars):
        module.install()
