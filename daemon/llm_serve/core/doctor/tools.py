"""Compilers and kernel packages: what is needed where kernels are made at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llm_serve.core.doctor.findings import Finding, good, note, problem


@dataclass(frozen=True, slots=True)
class ToolFacts:
    """Programs by name with their paths, None where they are not there; packages by name with their versions."""

    is_for_gpu: bool
    """True where vLLM's CUDA build is installed."""
    programs: Mapping[str, str | None] = field(default_factory=dict)
    nvcc_version: tuple[int, int] | None = None
    nvcc_aside: str = ""
    """An nvcc that is installed, but not on PATH nor under CUDA_HOME."""
    driver_cuda: tuple[int, int] | None = None
    python_headers: str = ""
    """The folder that holds Python.h, empty where there is none."""
    python_version: str = ""
    flash_attn: str = ""
    """vLLM's own flash-attn, the file of its kernels; empty where it is not."""
    packages: Mapping[str, str | None] = field(default_factory=dict)


def judge(facts: ToolFacts) -> Iterator[Finding]:
    """The compiler for Triton and torch.compile, nvcc for FlashInfer, and the packages with kernels."""
    yield _compiler(facts)
    yield _headers(facts)
    if not facts.is_for_gpu:
        return
    yield _flash_attn(facts)
    yield _flashinfer(facts)
    yield _nvcc(facts)
    yield _ninja(facts)


def _compiler(facts: ToolFacts) -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := facts.programs.get(name))), None)
    plus = next((path for name in ("c++", "g++", "clang++") if (path := facts.programs.get(name))), None)
    if found and plus:
        return good("tools.compiler", f"{found} and {plus}")
    missing = "C++ compiler" if found else "C compiler"
    if facts.is_for_gpu and not found:
        means = "Triton fails with `Failed to find C compiler`: no engine starts, eager or not."
        return problem("tools.compiler", f"no {missing} on PATH", means, "apt install gcc g++")
    means = (
        "torch.compile cannot be used on the CPU, which is slower."
        if not facts.is_for_gpu
        else "FlashInfer cannot compile."
    )
    return note(
        "tools.compiler", f"no {missing} on PATH", means, "apt install gcc g++, or enforce_eager = true in [engine]"
    )


def _headers(facts: ToolFacts) -> Finding:
    if facts.python_headers:
        return good("tools.python", f"Python.h in {facts.python_headers}")
    found = f"no Python.h for Python {facts.python_version}"
    cure = f"apt install python{facts.python_version}-dev"
    if facts.is_for_gpu:
        return problem("tools.python", found, "Triton cannot build its launcher: no engine starts, eager or not.", cure)
    means = "torch.compile cannot be used on the CPU, which is slower."
    return note("tools.python", found, means, f"{cure}, or enforce_eager = true in [engine]")


def _flash_attn(facts: ToolFacts) -> Finding:
    if facts.flash_attn:
        return good("tools.flash_attn", f"vLLM's own: {facts.flash_attn}")
    means = "FLASH_ATTN is not to be had; vLLM takes another backend."
    return note(
        "tools.flash_attn",
        "vLLM's flash-attn kernels are not installed",
        means,
        "llm-serve setup --backend cuda (in a checkout: make setup BACKEND=cuda)",
    )


def _flashinfer(facts: ToolFacts) -> Finding:
    package = facts.packages.get("flashinfer-python")
    kernels = [f"{name} {version}" for name in _KERNEL_PACKAGES if (version := facts.packages.get(name))]
    if not package:
        means = "The FLASHINFER backend and its sampler are not to be had; others are."
        return note(
            "tools.flashinfer", "FlashInfer is not installed", means, "pip install flashinfer-python flashinfer-cubin"
        )
    if kernels:
        return good("tools.flashinfer", f"FlashInfer {package} with {', '.join(kernels)}")
    if _can_compile(facts):
        means = "Kernels are compiled at their first use: minutes, once for each instance's cache."
        return note(
            "tools.flashinfer", f"FlashInfer {package} without compiled kernels", means, "pip install flashinfer-cubin"
        )
    means = "It cannot compile its kernels: vLLM does without it, or a start fails in it and falls back."
    cure = 'vllm download-kernels, or install nvcc and ninja, or VLLM_USE_FLASHINFER_SAMPLER = "0" in [engine.env]'
    return note("tools.flashinfer", f"FlashInfer {package} without compiled kernels, nvcc or ninja", means, cure)


_KERNEL_PACKAGES = ("flashinfer-cubin", "flashinfer-jit-cache")


def _can_compile(facts: ToolFacts) -> bool:
    return all(facts.programs.get(name) for name in ("nvcc", "ninja"))


def _nvcc(facts: ToolFacts) -> Finding:
    path = facts.programs.get("nvcc")
    if not path and facts.nvcc_aside:
        means = "It is not found from here, and the unit's PATH does not have it, either."
        home = facts.nvcc_aside.removesuffix("/bin/nvcc")
        return note("tools.nvcc", f"{facts.nvcc_aside} is not on PATH", means, f'CUDA_HOME = "{home}" in [engine.env]')
    if not path:
        means = "Kernels that are not shipped (some of FlashInfer's, of quantizations) cannot be compiled."
        return note(
            "tools.nvcc", "no nvcc", means, "apt install nvidia-cuda-toolkit, or NVIDIA's own, if a start asks for it"
        )
    version = "{}.{}".format(*facts.nvcc_version) if facts.nvcc_version else "of an unknown version"
    if facts.nvcc_version and facts.driver_cuda and facts.nvcc_version > facts.driver_cuda:
        found = f"nvcc {version} at {path}, the driver runs CUDA up to {facts.driver_cuda[0]}.{facts.driver_cuda[1]}"
        means = "What it compiles may be refused by the driver (`unsupported PTX version`)."
        return note("tools.nvcc", found, means, "Install the toolkit of the driver's version, or a newer driver.")
    return good("tools.nvcc", f"nvcc {version} at {path}")


def _ninja(facts: ToolFacts) -> Finding:
    if path := facts.programs.get("ninja"):
        return good("tools.ninja", path)
    means = "What FlashInfer and torch compile at run time fails with `Ninja is required`."
    return note("tools.ninja", "no ninja on PATH", means, "apt install ninja-build")
