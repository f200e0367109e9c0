"""Lets vLLM plan for GPUs that this process cannot see, or must not touch.

vLLM asks its platform what GPUs there are, and its modules ask for CUDA's kernels by name as soon as they are imported.
Both get an answer here, without a GPU, a driver or a CUDA build of vLLM: nothing is computed with them, only shapes are
made. It holds for the whole process and for good, so only a command that ends afterwards may use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_serve.core.footprint import Gpus, parse_gpus

_KERNEL_MODULES = ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
_KERNEL_NAMESPACES = ("_C", "_C_cache_ops", "_moe_C")
_MOST_GPUS = 1024
"""More than anybody asks for: whether there are enough is not vLLM's to judge here."""


COMMON = "24GiB"
"""What is taken for a GPU of which nothing is known."""


def pretend_if_none_is_seen() -> bool:
    """True where vLLM's CUDA build saw no GPU, without which it does not tell its options; now it sees a common one."""
    platforms: Any = importlib.import_module("vllm.platforms")
    if not platforms.current_platform.is_unspecified():
        return False
    pretend(parse_gpus(COMMON))
    return True


def pretend(gpus: Gpus) -> None:
    """From here on vLLM takes this machine for one with GPUs of that kind, as many as it likes.

    To be called before anything else of vLLM is imported. No CUDA context is made, on whatever GPU there is.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import vllm

    root, has_driver = Path(vllm.__file__).parent, _has_driver()
    for name in _KERNEL_MODULES:
        if not has_driver or not any(root.glob(f"{name.replace('.', '/')}*.so")):
            sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    platforms: Any = importlib.import_module("vllm.platforms")
    # Modules keep the platform that they find when they are imported, so nothing may come before it.
    platforms.current_platform = _platform(gpus)
    _name_missing_kernels()
    _name_triton()
    _name_streams()


def _has_driver() -> bool:
    """False where no kernel of CUDA's can be loaded, though the build may have them."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _platform(gpus: Gpus) -> Any:
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class AbsentGpus(CudaPlatformBase):  # type: ignore[misc]  # Any at vLLM's border
        """vLLM's platform for CUDA, less what it asks of a driver."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:  # noqa: ARG003 - all are alike
            return DeviceCapability(*gpus.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003
            return gpus.name

        @classmethod
        def get_device_uuid(cls, device_id: int = 0) -> str:
            return f"GPU-{device_id}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:  # noqa: ARG003
            return gpus.memory_bytes

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
            return 128

        @classmethod
        def device_count(cls) -> int:
            return _MOST_GPUS

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:  # noqa: ARG003
            return True

    return AbsentGpus()


def _name_missing_kernels() -> None:
    """Layers look up their kernels by name when they are made; a CPU build lacks most of CUDA's."""
    import torch

    # It describes those kernels to torch that this build really has, so it has to come first.
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm._custom_ops")

    class Named(type(torch.ops._C)):  # type: ignore[misc]  # noqa: SLF001 - the namespace has no other name
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__"):
                    raise
                # "Does this GPU support ...?" is asked in the same way; capability decides elsewhere.
                return lambda *_, **__: True

    for namespace in _KERNEL_NAMESPACES:
        getattr(torch.ops, namespace).__class__ = Named


def _name_triton() -> None:
    """Without Triton, vLLM has placeholders that are not made for the configurations that it looks at on CUDA."""
    utils: Any = importlib.import_module("vllm.triton_utils")
    if utils.HAS_TRITON:
        return

    class Config:
        """As `triton.Config`, as far as it is read."""

        def __init__(self, kwargs: Any = None, num_warps: int = 4, num_stages: int = 3, **_: Any) -> None:
            self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages

    utils.triton.Config = Config
    # torch would warn of it on stderr.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    # It decides by this which runner a GPU gets.
    importlib.import_module("vllm.config.vllm").HAS_TRITON = True  # type: ignore[attr-defined]


def _name_streams() -> None:
    """Some layers hold streams and events or ask which GPU is theirs, which torch answers only where it sees one."""
    import torch

    class Unused:
        """As `torch.cuda.Stream` and `Event` are made."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

    torch.cuda.Stream = torch.cuda.Event = Unused
    torch.cuda.current_device = lambda: 0
