"""The memory plan of one instance: vLLM weighs the model, the core does the sums and walks the ladder.

It imports vLLM into this process and may lay a platform under it that is not there, so it is for a command that ends
afterwards. No weight is loaded and no GPU is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from llm_serve.core import forecast
from llm_serve.core.course import Course, Effective, Floors
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.footprint import Cache, Footprint, Gpus, longest
from llm_serve.core.plan import EnginePlan
from llm_serve.core.policy import Choices
from llm_serve.core.settings import Settings

_GIB = 1 << 30
_FOUR_BITS = 0.3
"""Of a model's bytes in 16 bits, what is left in 4: scales, embeddings and norms are not made smaller."""
_MOST_PARALLEL = 8


@dataclass(frozen=True, slots=True)
class Target:
    """What the plan is made for."""

    gpus: Gpus | None
    """None is this machine's CPU."""
    source: str
    """Who says so."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A plan as vLLM would take it: the model, its KV cache, and the limits with vLLM's defaults filled in."""

    model: Footprint
    cache: Cache
    now: Effective
    gpus_needed: int
    is_quantised: bool

    @property
    def outlook(self) -> forecast.Outlook:
        """What a start comes to."""
        return forecast.outlook(self.model, self.cache, self.now)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that may make it fit, and what it comes to."""

    change: str
    outlook: forecast.Outlook
    gpus_needed: int
    cost: str


@dataclass(slots=True)
class Report:
    """All that `plan` prints."""

    settings: Settings
    target: Target
    weighed: Weighed
    stored_bytes: int | None
    """Of the tensors in the model's safetensors files, by their headers; None where none are here."""
    start: forecast.Walk
    serving: forecast.Walk | None
    """None where no rung starts."""
    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def asked(self) -> forecast.Outlook:
        """Of the plan that the file asks for."""
        return self.weighed.outlook

    @property
    def has_enough_gpus(self) -> bool:
        """True where there are as many as the engine has processes."""
        return self.target.gpus is None or self.weighed.gpus_needed <= self.target.gpus.count

    @property
    def fits(self) -> bool:
        """True where the engine would start as it is asked for."""
        return self.asked.failure is None and self.has_enough_gpus

    def to_json(self) -> dict[str, object]:
        """As `--json` prints it."""
        asked, model, cache = self.asked, self.weighed.model, self.weighed.cache
        return {
            "instance": self.settings.name,
            "file": self.settings.source,
            "model": self.settings.model,
            "fits": self.fits,
            "device": _device_json(self.target, asked.now),
            "gpus_needed": self.weighed.gpus_needed,
            "limits": asdict(asked.now),
            "weights": {"bytes": model.weights_bytes, "stored_bytes": self.stored_bytes},
            "kv_cache": {
                "bytes_per_token": model.kv_bytes_per_token,
                "layers": [asdict(each) for each in model.layers],
                "bytes_per_block": cache.bytes_per_block,
                "request_bytes": asked.blocks_per_request * cache.bytes_per_block,
            },
            **_outlook_json(asked),
            "what_fits": [asdict(row) for row in forecast.rows(model, cache, asked.now)],
            "ladder": {"start": _walk_json(self.start), "serving": self.serving and _walk_json(self.serving)},
            "remedies": [
                {
                    "change": each.change,
                    "gpus_needed": each.gpus_needed,
                    "cost": each.cost,
                    **_outlook_json(each.outlook),
                }
                for each in self.remedies
            ],
            "notes": self.notes,
        }


def _device_json(target: Target, now: Effective) -> dict[str, object]:
    gpus = target.gpus
    of_gpus = {"name": gpus.name, "count": gpus.count} if gpus else {"name": "CPU", "count": 1}
    return {"kind": now.device, "source": target.source, "memory_bytes": now.device_memory_bytes, **of_gpus}


def _outlook_json(outlook: forecast.Outlook) -> dict[str, object]:
    return {
        "budget": asdict(outlook.budget),
        "kv_cache_tokens": outlook.tokens,
        "concurrency": round(outlook.concurrency, 2),
        "failure": outlook.failure.to_json() if outlook.failure else None,
    }


def _walk_json(walk: forecast.Walk) -> dict[str, object]:
    rungs = [
        {"reason": rung.step.reason, "arguments": dict(rung.step.arguments), **_outlook_json(rung.outlook)}
        for rung in walk.rungs
    ]
    return {"rungs": rungs, "end": walk.end}


def make(settings: Settings, text: str, target: Target) -> Report:
    """Return the plan of an instance. Raises ConfigError, HostError, or CannotBeBuilt."""
    from llm_serve.engine.forkserver import environment

    plan = EnginePlan.from_settings(settings)
    # Which GPUs are visible is settled: those of `target`.
    env = {name: value for name, value in plan.env.items() if name != "CUDA_VISIBLE_DEVICES"}
    with environment(env):
        if target.gpus is not None:
            from llm_serve.engine.absent_gpus import pretend

            pretend(target.gpus)
        weighed = weigh(plan, settings.source, text)
        return _report(settings, plan, target, weighed)


def weigh(plan: EnginePlan, source: str, text: str | None = None) -> Weighed:
    """Let vLLM weigh a plan, on the platform that it finds."""
    from llm_serve.engine import arguments, effective, footprint

    namespace = arguments.parse_plan(plan, source=source, text=text)
    _, config = arguments.engine_config(namespace, source=source, text=text)
    is_automatic = config.model_config.original_max_model_len == -1
    model, cache = footprint.measure(config)
    now = replace(effective.effective(config, None), device_memory_bytes=footprint.device_memory_bytes())
    weighed = Weighed(model, cache, now, footprint.processes(config), config.quant_config is not None)
    if is_automatic:
        # vLLM takes what fits, and does not fail for it.
        fitting = longest(cache, weighed.outlook.blocks, now)
        weighed = replace(weighed, now=replace(now, max_model_len=fitting or now.max_model_len))
    return weighed


def _report(settings: Settings, plan: EnginePlan, target: Target, weighed: Weighed) -> Report:
    from llm_serve.engine.weights import stored_bytes

    asked, course = weighed.outlook, Course(plan)
    floors = Floors(settings.recovery.floor_max_model_len, settings.recovery.floor_max_num_seqs)

    def expects(now: Effective) -> forecast.Outlook:
        return forecast.outlook(weighed.model, weighed.cache, now)

    start = forecast.to_a_start(course, asked, Choices(floors), expects)
    serving = None
    if not start.end:
        last = start.rungs[-1].outlook if start.rungs else asked
        for rung in start.rungs:
            course = course.and_then(rung.step)
        serving = forecast.while_serving(course, last, Choices(floors), expects)
    stored = stored_bytes(settings.model)
    report = Report(settings, target, weighed, stored, start, serving)
    report.notes += _notes(plan, weighed, stored)
    if asked.failure is not None:
        report.remedies += _remedies(settings, plan, weighed)
    return report


def _notes(plan: EnginePlan, weighed: Weighed, stored: int | None) -> Iterator[str]:
    counted = weighed.model.weights_bytes
    if stored is None:
        yield f"{plan.model}: no safetensors files are here, so the weights are counted from its config alone"
    elif weighed.gpus_needed == 1 and not 0.97 < counted / stored < 1.03:
        yield (
            f"the files hold {stored / _GIB:.2f} GiB of tensors; {counted / _GIB:.2f} GiB of them, or made of them, "
            "lie on the device: what is not loaded, offloaded, tied or converted makes the difference"
        )
    allowed, free = weighed.outlook.budget.allowed, psutil.virtual_memory().available
    if weighed.now.device == "cpu" and weighed.now.kv_cache_memory_bytes is None and free < allowed:
        yield (
            f"{free / _GIB:.1f} GiB of main memory are free now, and vLLM would ask for {allowed / _GIB:.1f}: "
            "a start would wait, then fit beside the others"
        )
    if "speculative_config" in plan.arguments:
        yield "the draft model of speculative_config is not counted"
    if plan.arguments.get("enable_lora"):
        yield "LoRA adapters are not counted"
    yield "activations, buffers and graphs are estimates: vLLM measures them at the start"


def _remedies(settings: Settings, plan: EnginePlan, weighed: Weighed) -> Iterator[Remedy]:
    """What a person could change, each alone; the cheapest first."""
    model, now, lacks_weights = weighed.model, weighed.now, weighed.outlook.blocks < 1

    def sums(change: str, cost: str, footprint: Footprint = model, limits: Effective = now) -> Remedy:
        outlook = forecast.outlook(footprint, weighed.cache, limits)
        return Remedy(change, outlook, weighed.gpus_needed, cost)

    if now.kv_cache_memory_bytes is None and (now.gpu_memory_utilization or 1) < 0.95:
        higher = replace(now, gpu_memory_utilization=0.95)
        yield sums("gpu_memory_utilization = 0.95", "Less memory is left for what was not foreseen.", limits=higher)
    if now.device == "cuda":
        for changes, cost in _with_vllm(plan, weighed, lacks_weights=lacks_weights):
            yield from _weighed_anew(settings, plan, changes, cost)
        if not weighed.is_quantised:
            smaller = replace(model, weights_bytes=int(model.weights_bytes * _FOUR_BITS))
            yield sums(
                "a 4-bit checkpoint (AWQ, GPTQ)", "An estimate: another download, and answers change a little.", smaller
            )
        offload = _lacking_gib(weighed)
        less = replace(model, weights_bytes=max(model.weights_bytes - offload * _GIB, 0))
        yield sums(f"cpu_offload_gb = {offload}", "Each step reads them over PCIe.", less)


def _with_vllm(plan: EnginePlan, weighed: Weighed, *, lacks_weights: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes whose effect only vLLM knows."""
    if not lacks_weights and plan.arguments.get("kv_cache_dtype", "auto") == "auto":
        yield {"kv_cache_dtype": "fp8"}, "Answers may change a little."
    if not weighed.is_quantised:
        yield {"quantization": "fp8"}, "Answers may change a little; faster from compute capability 8.9 on."
    parallel = weighed.now.tensor_parallel_size * 2
    while parallel <= _MOST_PARALLEL:
        yield {"tensor_parallel_size": parallel}, "More GPUs."
        parallel *= 2


def _weighed_anew(settings: Settings, plan: EnginePlan, changes: Mapping[str, Any], cost: str) -> Iterator[Remedy]:
    """Nothing where vLLM refuses the change for this model."""
    from llm_serve.engine.footprint import CannotBeBuilt

    try:
        found = weigh(plan.replace_arguments(**changes), settings.source)
    except (ConfigError, HostError, CannotBeBuilt):
        return
    words = ", ".join(f"{name} = {value}" for name, value in changes.items())
    yield Remedy(words, found.outlook, found.gpus_needed, cost)


def _lacking_gib(weighed: Weighed) -> int:
    """Whole GiB that have to leave the GPU so that one request of full length fits."""
    asked, cache = weighed.outlook, weighed.cache
    needed = (asked.blocks_per_request + 1) * cache.bytes_per_block
    lacking = max(needed - asked.budget.pool, asked.budget.used - asked.budget.device)
    return max(math.ceil(lacking / _GIB), 1)
