"""Where an instance stands between what its file asks for and what has held: plan, rung, and how it came there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_serve.core.evidence import Kind, Place
from llm_serve.core.plan import EnginePlan


@dataclass(frozen=True, slots=True)
class Effective:
    """What an engine was really built with, vLLM's defaults filled in. None is unknown."""

    device: str = "cuda"
    """"cuda" or "cpu"."""
    max_model_len: int | None = None
    """Tokens in one request."""
    max_num_seqs: int | None = None
    """Requests in one step."""
    max_num_batched_tokens: int | None = None
    """Tokens in one step."""
    block_size: int = 16
    """Tokens in one block of the KV cache."""
    gpu_memory_utilization: float | None = None
    """Share of the device that the engine may use."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache, where it is fixed."""
    device_memory_bytes: int | None = None
    """Memory of one device."""
    enforce_eager: bool = False
    """True where neither compilation nor graphs are used."""
    attention_backend: str | None = None
    """The one that was asked for; None lets vLLM choose."""
    tensor_parallel_size: int = 1
    """Devices that share one layer."""
    world_size: int = 1
    """Devices that work together: tensor x pipeline x data parallel."""
    numa_bind: bool = False
    """True where its memory comes from the NUMA nodes of its devices alone."""
    chunked_prefill: bool = True
    """False where a prompt must fit into one step."""


UNKNOWN = Effective()
"""Of an engine that did not come as far as a configuration."""


@dataclass(frozen=True, slots=True)
class Floors:
    """What the ladder never goes below."""

    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the plan, and why."""

    kind: Kind
    place: Place
    reason: str
    """A sentence: what is changed, from what, to what, what it costs, and for which failure."""
    arguments: Mapping[str, Any]
    """vLLM arguments that are set; None takes one away, back to vLLM's default."""
    env: Mapping[str, str]
    """Environment of the engine that was set."""
    is_rung: bool
    """True for a smaller plan; False for another way of computing the same one."""


@dataclass(frozen=True, slots=True)
class Course:
    """The plan of the moment: `asked` with every step's changes on top, the last winning."""

    asked: EnginePlan
    steps: tuple[Step, ...] = ()
    is_proven: bool = False
    """True once an engine with exactly this plan has answered."""

    @property
    def rung(self) -> int:
        """Steps below the plan that the file asks for."""
        return sum(step.is_rung for step in self.steps)

    @property
    def plan(self) -> EnginePlan:
        """What the next engine is built with."""
        arguments, env = dict(self.asked.arguments), dict(self.asked.env)
        for step in self.steps:
            arguments.update(step.arguments)
            env.update(step.env)
        kept = {name: value for name, value in arguments.items() if value is not None}
        return EnginePlan(self.asked.model, kept, env)

    def and_then(self, step: Step) -> Course:
        """The course with one more step, which nothing has proven yet."""
        return replace(self, steps=(*self.steps, step), is_proven=False)

    def one_up(self) -> Course:
        """The course without its last rung, which nothing has proven."""
        last = max(number for number, step in enumerate(self.steps) if step.is_rung)
        return replace(self, steps=self.steps[:last] + self.steps[last + 1 :], is_proven=False)

    def taken(self, kind: Kind, place: Place | None = None) -> int:
        """How many steps were taken for this kind of failure, at this place if one is given."""
        return sum(step.kind is kind and place in (None, step.place) for step in self.steps)
