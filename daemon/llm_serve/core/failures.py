"""What a failed engine left behind, and what it means: a total function from Evidence to Failure.

The order is that of certainty. A kill by the kernel and a lost GPU come first; then a worker's own exception, then
EngineCore's, then what the parent saw; a wrapper ("see root cause above") never explains anything. Within an exception
the frame comes before the text: "out of memory" means what the function that met it was doing. The texts and their
meanings are the table in `failure_texts`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llm_serve.core import failure_texts
from llm_serve.core.evidence import ErrorRecord, Evidence, Failure, Kind, Place

_LOST_XIDS = frozenset({48, 62, 64, 79, 95, 109, 119, 120})
"""By NVIDIA's catalogue the GPU must be reset, or the machine rebooted, after these."""
_FAULT_XIDS = frozenset({8, 11, 13, 31, 43, 45, 94})
"""After these a new process has a working GPU again."""
_CLEANUP_XID = 45
"""The driver cleans up after a process; a killed one has it too."""
_VERDICT = re.compile(r"Xid \([^)]*\): 154\b.*GPU recovery action changed from .* to 0x\w+ \(([^)]*)\)")
_OOM_KILL = re.compile(r"Killed process|oom-kill:", re.IGNORECASE)
_NCCL = re.compile(r"\bNCCL\b|collective operation timeout|ProcessGroupNCCL", re.IGNORECASE)

_SYMPTOMS = frozenset({Kind.communication, Kind.stalled})
"""What a fault of one GPU looks like to the others: the driver's word explains these."""

_OF_LINKS = _SYMPTOMS | {Kind.start_stalled, Kind.start_timeout, Kind.crashed, Kind.device_error}
"""What GPUs without a way to each other's memory may lead to."""

_OOM_ADVICE = {
    Place.start: "Lower engine.gpu_memory_utilization and engine.max_num_seqs.",
    Place.profiling: "Lower engine.max_num_batched_tokens; for images, engine.limit_mm_per_prompt.",
    Place.kv_cache: "Lower engine.gpu_memory_utilization, or engine.kv_cache_memory_bytes where it is set.",
    Place.warm_up: "Lower engine.max_num_seqs.",
    Place.capture: "Lower engine.gpu_memory_utilization or engine.max_num_seqs, or set engine.enforce_eager.",
    Place.serving: "Lower engine.gpu_memory_utilization and engine.max_num_seqs.",
}
_WEIGHTS = (
    "Take a quantised model, spread it over more GPUs (engine.tensor_parallel_size), or set engine.cpu_offload_gb."
)
_SHARE = (
    "Lower engine.gpu_memory_utilization: nobody else holds memory there, and the driver and the engine's own context "
    "take a little."
)
_OF_THE_DRIVER, _OF_A_CONTEXT = 0.02, 700 << 20
"""What the driver and the process's own CUDA context take of a GPU (0.51 of 139.8 GiB on an H200)."""
_HOST_MEMORY = (
    "Give the machine, or the control group (MemoryMax= of the unit, the memory limit of a container), more memory"
)


def classify(evidence: Evidence) -> Failure:
    """Name the failure. Total: every Evidence has an answer, and `unknown` is one."""
    cause = root_cause(evidence)
    place = _place(cause, evidence)
    failure = next(_verdicts(cause, place, evidence))
    return _between_gpus(failure if failure.place is not Place.start else replace(failure, place=place), evidence)


def _between_gpus(failure: Failure, evidence: Evidence) -> Failure:
    """H1, H6, H7: the driver may know of a pair of GPUs that cannot reach each other's memory."""
    if not evidence.no_p2p or failure.kind not in _OF_LINKS:
        return failure
    advice = f"By the driver, there is no P2P between {', '.join(evidence.no_p2p)}."
    return replace(failure, advice=f"{failure.advice} {advice}".strip(), no_p2p=evidence.no_p2p)


def root_cause(evidence: Evidence) -> ErrorRecord | None:
    """The exception that says most, or None where nothing but wrappers was heard."""
    for error in _in_order(evidence):
        if inner := failure_texts.wrapped_in(error.text):
            return replace(error, type="", text=inner)
        if not failure_texts.is_wrapper(f"{error.type}: {error.text}"):
            return error
    return None


def _in_order(evidence: Evidence) -> Iterator[ErrorRecord]:
    """A worker's exceptions first, then EngineCore's, then what the parent saw.

    The daemon's process logs exceptions that are none of a failure's business, such as those of a client's request;
    of these only a model's inspection explains one.
    """
    # A worker is "VllmWorker-0" until it has named itself "Worker_TP0" or the like.
    yield from (error for error in evidence.errors if "Worker" in error.process)
    yield from (error for error in evidence.errors if error.process.startswith("EngineCore"))
    if evidence.parent_error is not None:
        yield from (error for error in evidence.errors if failure_texts.is_inspection(error.text))
        yield evidence.parent_error


def _verdicts(cause: ErrorRecord | None, place: Place, evidence: Evidence) -> Iterator[Failure]:
    """What may be said, the most certain first. Never empty."""
    told = _of_text(cause, place, evidence) if cause else None
    candidates = (
        _of_lost_device(evidence),
        _of_unkillable(evidence),
        _of_kernel(cause, evidence),
        told if told and told.kind not in _SYMPTOMS else None,
        _of_device_fault(evidence),
        told,
        _of_standstill(evidence),
        _of_signal(evidence),
        _of_any_error(cause, evidence),
    )
    yield from filter(None, candidates)
    last_words = [line.strip() for line in evidence.output_tail if line.strip()]
    yield Failure(Kind.unknown, (last_words or ["the engine ended without a word."])[-1])


def _place(cause: ErrorRecord | None, evidence: Evidence) -> Place:
    by_frame = failure_texts.place_of(cause.frames) if cause else None
    if by_frame is not None:
        return by_frame
    return Place.serving if evidence.has_served else failure_texts.PHASES.get(evidence.phase, Place.start)


# The machine's witnesses.
def _of_lost_device(evidence: Evidence) -> Failure | None:
    """D3, for good: what the driver says of its GPU."""
    verdicts = [found[1] for line in evidence.kernel_log if (found := _VERDICT.search(line))]
    if verdicts and re.search(r"reset|reboot", verdicts[-1], re.IGNORECASE):
        advice = "Do that (nvidia-smi --gpu-reset, or a reboot): nothing less helps."
        return Failure(Kind.device_lost, f"the NVIDIA driver asks for: {verdicts[-1]}.", advice)
    if lost := _named(_LOST_XIDS & set(evidence.xids)):
        advice = "Reset the GPU (nvidia-smi --gpu-reset) or reboot; if it comes back, the GPU or its slot is failing."
        return Failure(Kind.device_lost, f"the NVIDIA driver reported {lost}.", advice)
    return None


def _of_unkillable(evidence: Evidence) -> Failure | None:
    """B6: a process that the kernel cannot end keeps its GPU memory, whatever else went wrong."""
    if not evidence.unkillable:
        return None
    advice = (
        "It is stuck in the kernel: in the GPU's driver, a reset (nvidia-smi --gpu-reset) or a reboot frees it; in a "
        "network file system, its server; in a frozen control group, thawing that."
    )
    return Failure(Kind.unkillable, f"SIGKILL does not end {'; '.join(evidence.unkillable)}.", advice)


def _of_device_fault(evidence: Evidence) -> Failure | None:
    """D1 and D3, passing: a fault that ends with its process. An exception of ours with a meaning says more."""
    faults = _FAULT_XIDS & set(evidence.xids)
    if _killed(evidence):
        faults -= {_CLEANUP_XID}
    if not faults:
        return None
    advice = "A new process has a working GPU again; the kernel log has more (journalctl -k)."
    return Failure(Kind.device_error, f"the NVIDIA driver reported {_named(faults)}.", advice)


def _named(xids: set[int] | frozenset[int]) -> str:
    return f"Xid {', '.join(map(str, sorted(xids)))}" if xids else ""


def _of_kernel(cause: ErrorRecord | None, evidence: Evidence) -> Failure | None:
    """B1: the kernel's kill for memory. Its log alone may tell of some other process."""
    killed = _killed(evidence)
    told = [line for line in evidence.kernel_log if _OOM_KILL.search(line)]
    if not evidence.oom_kills and not (told and (killed or cause is None)):
        return None
    who = ", ".join(killed) or "a process of the engine"
    words = f"the kernel killed {who} because the host's memory, or its control group's, ran out"
    detail = f"{words}: {told[-1]}" if told else f"{words}."
    return Failure(Kind.host_out_of_memory, detail, f"{_HOST_MEMORY}, or set MAX_JOBS=2 in [engine.env].")


def _killed(evidence: Evidence) -> list[str]:
    return [process for process, code in evidence.exit_codes.items() if code == -signal.SIGKILL]


# The exceptions.
def _of_text(cause: ErrorRecord, place: Place, evidence: Evidence) -> Failure | None:
    """The table's answer, with what belongs to memory."""
    said = f"{cause.type}: {cause.text}"
    row = failure_texts.row_for(said)
    if row is None:
        return _of_attention(cause, place)
    failure = Failure(row.kind, _sentence(cause), row.advice, row.place or place)
    failure = replace(failure, **(failure_texts.numbers(cause.text) or _printed_numbers(failure, evidence)))
    match failure.kind, failure.place:
        case Kind.out_of_memory, Place.loading:
            return _of_weights(failure, said, evidence)
        case Kind.out_of_memory, at if not failure.advice:
            is_host = failure_texts.OF_HOST.search(said)
            return replace(failure, advice=f"{_HOST_MEMORY}." if is_host else _OOM_ADVICE[at])
        case Kind.memory_held, _ if _is_nobodys(failure):
            return replace(failure, kind=Kind.share_too_large, advice=_SHARE)
        case Kind.memory_held, _ if evidence.gpu_holders:
            return replace(failure, advice=_holders(evidence))
    return failure


def _is_nobodys(failure: Failure) -> bool:
    """True where as much is free as a device has to give: the file asks for more, and there is nobody to wait for."""
    free, total = failure.free_bytes, failure.total_bytes
    return free is not None and total is not None and total - free <= max(_OF_THE_DRIVER * total, _OF_A_CONTEXT)


def _printed_numbers(failure: Failure, evidence: Evidence) -> dict[str, Any]:
    """Torch prints what an out-of-memory was about where its exception does not say it."""
    if failure.kind is not Kind.out_of_memory:
        return {}
    return failure_texts.numbers("\n".join(line for line in evidence.output_tail if "out of memory" in line))


def _of_weights(failure: Failure, said: str, evidence: Evidence) -> Failure:
    """A1: the weights do not fit, unless what others hold would have been enough."""
    if failure_texts.OF_HOST.search(said):
        advice = f"{_HOST_MEMORY}, or take a smaller or quantised model."
        return replace(failure, kind=Kind.weights_do_not_fit, advice=advice)
    held = sum(holder.used_bytes for holder in evidence.gpu_holders)
    if evidence.gpu_holders and held >= (failure.tried_bytes or 0):
        return replace(failure, kind=Kind.memory_held, advice=_holders(evidence))
    return replace(failure, kind=Kind.weights_do_not_fit, advice=_WEIGHTS)


def _holders(evidence: Evidence) -> str:
    return f"Stop what holds it, or name another GPU in gpu.devices: {'; '.join(map(str, evidence.gpu_holders))}."


def _of_attention(cause: ErrorRecord, place: Place) -> Failure | None:
    """D7: an error with no text of its own, from inside an attention backend, before anything was served."""
    is_inside = any(failure_texts.IN_ATTENTION.search(frame) for frame in cause.frames)
    if not is_inside or place is Place.serving:
        return None
    return Failure(Kind.attention_backend, _sentence(cause), "Name another engine.attention_backend.", place)


def _of_any_error(cause: ErrorRecord | None, evidence: Evidence) -> Failure | None:
    """E10 and whatever no row knows; where there are only wrappers, the last of them."""
    errors = [error for error in (cause, *reversed([*_in_order(evidence)]), *evidence.errors) if error]
    if not errors:
        return None
    return Failure(Kind.crashed, _sentence(errors[0]), "The journal has the exception and the processes' output.")


def _sentence(error: ErrorRecord) -> str:
    kind = error.type.rsplit(".", 1)[-1]
    where = f" (in {error.process})" if error.process else ""
    text = " ".join(error.text.split())[:600]
    return f"{kind}{where}: {text}" if kind else f"{text or 'an exception without words'}{where}"


# Silence and signals.
def _of_standstill(evidence: Evidence) -> Failure | None:
    """H1, H2, H5, H9, F4: nothing is said at all, and that is the news."""
    phase = f" in the phase '{evidence.phase}'" if evidence.phase else ""
    stacks = "The journal has the stacks of that moment."
    if evidence.stalled_for_s is not None and evidence.has_served:
        on = f": {evidence.stalled_on}" if evidence.stalled_on else ""
        detail = f"no step for {evidence.stalled_for_s:.0f} s although there was work{on}."
        advice = f"{stacks} If steps really take so long, raise recovery.stall_timeout_s."
        return Failure(Kind.stalled, detail, advice, Place.serving)
    if evidence.stalled_for_s is not None:
        idle = evidence.stalled_on or "no CPU time, no reading, no log"
        detail = f"the start did nothing for {evidence.stalled_for_s:.0f} s{phase}: {idle}."
        return Failure(Kind.start_stalled, detail, stacks)
    if evidence.timed_out_after_s is not None:
        detail = f"the engine was not ready {evidence.timed_out_after_s:.0f} s after its start{phase}."
        return Failure(Kind.start_timeout, detail, f"{stacks} If it is only slow, raise recovery.start_timeout_s.")
    return None


def _of_signal(evidence: Evidence) -> Failure | None:
    """B1 without proof, B3, H6, H8: a process that a signal ended."""
    ended = [(code == -signal.SIGKILL, process, -code) for process, code in evidence.exit_codes.items() if code < 0]
    if not ended:
        return None
    # A crash comes before a kill: what is left after a crash is killed.
    is_killed, process, number = min(ended, key=lambda each: each[0])
    name = _signal_name(number)
    detail = f"{process or 'a process of the engine'} was ended by {name}."
    if is_killed:
        advice = "If nobody killed it, the kernel did: look for 'Out of memory' in its log (journalctl -k)."
        return Failure(Kind.killed, detail, advice)
    if name == "SIGABRT" and _NCCL.search("\n".join(evidence.output_tail)):
        return Failure(Kind.communication, detail, failure_texts.LINKS)
    bus = "A full /dev/shm does that, or a weight file that was cut short while it was read."
    return Failure(Kind.crashed, detail, bus if name == "SIGBUS" else "The journal has what it wrote last.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
