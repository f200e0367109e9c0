"""`completion`: what a shell reads to complete our words. Typer writes it, and answers it from the parser itself."""

from __future__ import annotations

import sys

_SHELLS = ("bash", "zsh", "fish")


def completion(shell: str) -> int:
    """Print the script for this shell. Returns 0, or 2 for another shell than those."""
    if shell not in _SHELLS:
        print(f"llm-serve: completion is there for {', '.join(_SHELLS)}, not for {shell!r}.", file=sys.stderr)
        return 2
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name="llm-serve", complete_var="_LLM_SERVE_COMPLETE", shell=shell))
    return 0
