"""Which attention backends work here: vLLM's word for it, and a trial of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from llm_serve.core.doctor.findings import Finding, good, not_known, note, problem

_FIRST = "attention"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a trial computes with: heads, and types by vLLM's names."""

    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        cache = "" if self.kv_cache_dtype == "auto" else f", KV cache {self.kv_cache_dtype}"
        return f"{self.heads} heads on {self.kv_heads} of {self.head_size}, {self.dtype}{cache}"


class Outcome(StrEnum):
    """How a trial ended."""

    ran = "ran"
    wrong = "wrong"
    """The kernel ran and computed something else."""
    refused = "refused"
    """vLLM itself says that it is not for this GPU or shape."""
    failed = "failed"
    no_memory = "no_memory"
    crashed = "crashed"
    timed_out = "timed_out"


@dataclass(frozen=True, slots=True)
class Trial:
    """One backend. `detail` is the reason, the error's last line, or where it stood when time was up."""

    backend: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """`kernels` as torch names them ("sm_90", "compute_120"); each GPU is (index, name, capability)."""

    version: str = ""
    cuda: str = ""
    kernels: tuple[str, ...] = ()
    gpus: tuple[tuple[int, str, tuple[int, int]], ...] = ()
    error: str = ""
    """Why a product of two small matrices could not be computed on the first GPU; empty when it could."""


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What the child has found out. The trials are in the order in which vLLM prefers them."""

    device: str
    shape: Shape
    trials: tuple[Trial, ...] = ()
    latent: tuple[str, ...] = ()
    """Backends for latent attention that vLLM takes on this GPU; they are not tried."""
    needs_latent: bool = False
    """True for a model with latent attention: what is tried is not what it uses."""
    torch: TorchFacts = TorchFacts()
    error: str = ""
    """Why nothing could be tried."""


_TRIALS_BYTES = 8 << 30
"""A trial takes up to 1 GiB, CUDA's own part included, and four may run at once: an engine is left as much."""
_IDLE_BYTES = 2 << 30


def in_use(used_bytes: int, free_bytes: int) -> bool:
    """True where trials could take memory that an engine on the GPU is about to need."""
    return used_bytes > _IDLE_BYTES and free_bytes < _TRIALS_BYTES


def judge(facts: AttentionFacts) -> Iterator[Finding]:
    """The kernels' targets, then each backend, then what follows for an engine."""
    if facts.error:
        means = "No engine starts with this environment, or not within the time of this check."
        yield problem(
            _FIRST,
            f"no attention backend could be tried: {facts.error}",
            means,
            "llm-serve setup (in a checkout: make setup), then try again",
        )
        return
    yield from _kernels(facts.torch)
    for trial in facts.trials:
        yield _trial(trial, facts)
    if not facts.needs_latent:
        yield _verdict(facts)
    elif not facts.latent:
        means = "The model has latent attention (MLA): no engine starts."
        yield problem(
            _FIRST, f"vLLM takes no backend for it on {facts.device}", means, "Another GPU, or another model."
        )
    if facts.latent:
        whom = (
            "this model, which has latent attention"
            if facts.needs_latent
            else "models with latent attention (DeepSeek)"
        )
        yield not_known("attention.latent", ", ".join(facts.latent), f"vLLM takes them for {whom}; they were not run.")


def _kernels(torch: TorchFacts) -> Iterator[Finding]:
    if torch.error:
        yield problem(
            "torch", f"torch {torch.version} cannot compute on the GPU: {torch.error}", "No engine can start.",
            "Look at the driver's findings above and at `journalctl -k -g NVRM`; reboot if the driver was updated.",
        )  # fmt: skip
    for index, name, capability in torch.gpus:
        yield _covers(index, name, capability, torch)


def _covers(index: int, name: str, capability: tuple[int, int], torch: TorchFacts) -> Finding:
    check, target = f"torch.gpu.{index}", f"sm_{capability[0]}{capability[1]}"
    built = " ".join(torch.kernels)
    if not torch.kernels:
        return not_known(check, f"torch does not say for which GPUs it has kernels ({name} is {target})")
    if runs_natively(capability, torch.kernels):
        return good(check, f"{name} ({target}): torch {torch.version} has kernels for it ({built})")
    found = f"{name} is {target}, torch {torch.version} has kernels for {built}"
    if _compiles(capability, torch.kernels):
        means = "The driver compiles them when they are first used: minutes, once; vLLM's own may still be missing."
        return note(check, found, means, "Install a build for this GPU, if its first start takes too long.")
    means = "Every kernel fails with `no kernel image is available for execution on the device`."
    return problem(
        check, found, means, "Install a torch and vLLM that are built for this GPU, or leave it out (gpu.devices)."
    )


def runs_natively(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """True when a kernel of the same major version, and no newer minor one, is there."""
    major, minor = capability
    return any(
        found[0] == major and found[1] <= minor
        for name in kernels
        if (found := _target(name)) and name.startswith("sm_")
    )


def _compiles(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """True when there is an intermediate form that is not newer."""
    return any(found <= capability for name in kernels if (found := _target(name)) and name.startswith("compute_"))


def _target(name: str) -> tuple[int, int] | None:
    """(9, 0) for "sm_90a", (12, 0) for "compute_120"."""
    digits = name.partition("_")[2].rstrip("af")
    return (int(digits[:-1]), int(digits[-1])) if len(digits) > 1 and digits.isdecimal() else None


def _trial(trial: Trial, facts: AttentionFacts) -> Finding:
    check, name, where = f"attention.{trial.backend}", trial.backend, facts.device
    match trial.outcome:
        case Outcome.ran:
            return good(check, f"{name} ran on {where} in {trial.seconds:.1f} s and computed what it should")
        case Outcome.refused:
            return note(
                check, f"vLLM does not take {name} here: {trial.detail}", "It is never chosen, nor fallen back to."
            )
        case Outcome.no_memory:
            means = "Nothing was learned about it: something else holds the memory."
            return not_known(check, f"{name}: {trial.detail}", means, "Try again when the GPU is free.")
        case Outcome.wrong:
            means = "Answers would be garbage, with no error."
            return problem(check, f"{name} computes wrong numbers: {trial.detail}", means, _without(facts))
        case Outcome.timed_out:
            found = f"{name} had not computed a tiny batch after {trial.seconds:.0f} s; it stood in {trial.detail}"
            means = "A start that uses it hangs, unless it only compiles for the first time."
            return problem(check, found, means, f"Try once more with a larger --timeout; else {_without(facts)}")
    cure = next((cure for words, cure in _CURES if any(word in trial.detail for word in words)), "")
    found = f"{name} {'died' if trial.outcome is Outcome.crashed else 'failed'}: {trial.detail}"
    return problem(check, found, "An engine that uses it does not start.", f"{cure or 'Else: '}{_without(facts)}")


_CURES = (
    (("nvcc", "CUDA_HOME"), "Put nvcc (CUDA_HOME) on the unit's PATH, or run `vllm download-kernels`; or "),
    (("ninja", "Ninja"), "Install ninja (it comes with the environment: llm-serve setup); or "),
    (("Python.h",), "apt install python3-dev; or "),
    (("C compiler", "gcc"), "apt install gcc; or "),
    (("no kernel image",), "Install a build of vLLM for this GPU; or "),
)


def _without(facts: AttentionFacts) -> str:
    able = [trial.backend for trial in facts.trials if trial.outcome is Outcome.ran]
    if not able:
        return "see the other backends: none has run here."
    names = ", ".join(f'"{name}"' for name in able)
    return f'attention_backends = [{names}] under [recovery], attention_backend = "{able[0]}" under [engine]'


def _verdict(facts: AttentionFacts) -> Finding:
    able = [trial.backend for trial in facts.trials if trial.outcome is Outcome.ran]
    first = next((trial for trial in facts.trials if trial.outcome is not Outcome.refused), None)
    words = f"for {facts.shape} on {facts.device}"
    if not able:
        if any(trial.outcome is Outcome.no_memory for trial in facts.trials):
            return not_known(_FIRST, f"no backend could be tried {words}: the GPU's memory is taken")
        return problem(
            _FIRST, f"no attention backend works {words}", "No engine can start.", "See the findings on each."
        )
    if first is not None and first.outcome is Outcome.ran:
        return good(_FIRST, f"vLLM would choose {able[0]} {words}, and it works")
    means = f"The first start fails with {first.backend if first else 'it'}, and then falls back to {able[0]}."
    cure = f'attention_backend = "{able[0]}" under [engine] spares that start'
    return note(_FIRST, f"what vLLM likes best does not work {words}; {', '.join(able)} does", means, cure)
