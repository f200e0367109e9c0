"""What a client has got of an answer so far: the only thing that must not change when the engine does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Line:
    """One of the n texts of an answer."""

    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    """Length of the text; behind the tokens' own where vLLM holds some back."""
    cumulative_logprob: float | None = None
    is_finished: bool = False


@dataclass(slots=True)
class Delivered:
    """All lines of one streamed answer, by index."""

    lines: dict[int, Line] = field(default_factory=dict)
    first: Any = None
    """vLLM's first RequestOutput, for what is said once: the prompt, its cached tokens, when it came."""

    def add(self, output: Any) -> None:
        """Take note of one RequestOutput of kind DELTA, before it is handed on."""
        if self.first is None:
            self.first = output
        for part in output.outputs:
            line = self.lines.setdefault(part.index, Line())
            line.tokens += part.token_ids
            line.chars += len(part.text)
            line.cumulative_logprob = part.cumulative_logprob
            line.is_finished = part.finish_reason is not None

    def unfinished(self, n: int) -> Iterable[int]:
        """Indices of the lines that are still to be finished, of n."""
        return [index for index in range(n) if not self.line(index).is_finished]

    def line(self, index: int) -> Line:
        """One line; an empty one if nothing of it was delivered."""
        return self.lines.get(index) or Line()
