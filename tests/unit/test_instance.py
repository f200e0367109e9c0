"""What an instance takes of its machine: its GPUs, counted against its file before anything is loaded.

There is no GPU where these tests run: those that the driver shows are hand-made.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_serve import instance
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.plan import EnginePlan
from llm_serve.host import gpu_gate
from llm_serve.host.nvml import Gpu, NoGpus
from llm_serve.host.placement import Placement
from llm_serve.instance import Instance, ready_host

UUIDS = [f"GPU-0123abcd-0123-0123-0123-0123456789a{index}" for index in range(4)]


class Shown(NoGpus):
    """GPUs that the driver shows, and what it could not be asked."""

    def __init__(self, count: int, *problems: str) -> None:
        super().__init__("")
        self.shown = tuple(
            Gpu(index, UUIDS[index], "NVIDIA L4", f"00000000:{index:02X}:00.0", 24 << 30) for index in range(count)
        )
        self.told = problems

    def devices(self) -> tuple[Gpu, ...]:
        """All of them."""
        return self.shown

    def problems(self) -> tuple[str, ...]:
        """As given."""
        return self.told


@pytest.fixture(autouse=True)
def _gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM is one for GPUs, the driver's device nodes are there, and nobody has chosen among them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(instance, "is_cpu_build", lambda: False)
    monkeypatch.setattr(gpu_gate.wait_for_gpus, "__kwdefaults__", {"nodes": ()})


async def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, gpus: Shown) -> tuple[Any, Any]:
    """The host and the factory of an instance with this file on a machine with these GPUs."""
    monkeypatch.setattr(instance, "open_gpus", lambda: gpus)
    settings = parse_instance(text, source="a.toml", name="a")
    made = Instance(settings, EnginePlan.from_settings(settings), frozenset(), tmp_path, text)
    factory: Any = SimpleNamespace(placement=Placement(), device_memory_bytes=None)
    collector: Any = SimpleNamespace()
    host = await ready_host(made, factory, collector, lambda _: None)
    host.telemetry.close()
    return host, factory


@pytest.mark.parametrize(
    ("text", "used", "seen"),
    [
        ("", [0], ""),
        ('[engine.env]\nCUDA_VISIBLE_DEVICES = "3"\n', [0, 1, 2, 3], ""),
        ('[engine]\ntensor_parallel_size = 8\ndistributed_executor_backend = "ray"\n', [0, 1, 2, 3], ""),
        ("[engine]\ntensor_parallel_size = 2\n", [0, 1], ""),
        ("[engine]\ntensor_parallel_size = 2\ndata_parallel_size = 2\n", [0, 1, 2, 3], ""),
        ("[gpu]\ndevices = [2]\n", [2], UUIDS[2]),
        (f'[engine]\ntensor_parallel_size = 2\n[gpu]\ndevices = ["{UUIDS[3]}", 0]\n', [3, 0], f"{UUIDS[3]},{UUIDS[0]}"),
        ('[gpu]\ndevices = ["02:00.0"]\n', [2], UUIDS[2]),
        ("[engine]\ntensor_parallel_size = 2\n[gpu]\ndevices = [3, 1, 0]\n", [3, 1], f"{UUIDS[3]},{UUIDS[1]}"),
    ],
)
async def test_an_instance_has_to_do_with_its_own_gpus_alone(
    text: str, used: list[int], seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that its processes take, in its order: what another instance does with the others is not looked at.

    CUDA is told UUIDs, whatever the file says.
    """
    host, factory = await ready(monkeypatch, tmp_path, f'model = "m"\n{text}', Shown(4))

    assert used == [gpu.index for gpu in host.used]
    assert tuple(used) == host.postmortem._witnesses.devices
    assert seen == factory.placement.env.get("CUDA_VISIBLE_DEVICES", "")
    assert 24 << 30 == factory.device_memory_bytes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[engine]\nseed = 1\ntensor_parallel_size = 4\n",
            "a.toml:4: engine.tensor_parallel_size: tensor_parallel_size 4 = 4 GPUs, but the driver shows 2 (0 NVIDIA L4,",
        ),
        (
            "[engine]\ntensor_parallel_size = 1\npipeline-parallel-size = 3\n",
            "a.toml:4: engine.pipeline_parallel_size: tensor_parallel_size 1 x pipeline_parallel_size 3 = 3 GPUs",
        ),
        (
            "[engine]\ntensor_parallel_size = 2\ndata_parallel_size = 2\n",
            "a.toml:3: engine.tensor_parallel_size: tensor_parallel_size 2 x data_parallel_size 2 = 4 GPUs",
        ),
        (
            f'[gpu]\ndevices = [1, "{UUIDS[1]}"]\n',
            "a.toml:3: gpu.devices: names a device twice: they are GPU 1, 1. Name each once",
        ),
    ],
)
async def test_too_few_gpus_are_refused_with_the_line(
    text: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is loaded, and for good: a restart brings no GPU."""
    with pytest.raises(ConfigError) as refusal:
        await ready(monkeypatch, tmp_path, f'model = "m"\n{text}', Shown(2))

    assert str(refusal.value).startswith(problem)


async def test_gpus_for_a_build_without_are_refused_with_the_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The installed vLLM will never use them."""
    monkeypatch.setattr(instance, "is_cpu_build", lambda: True)
    with pytest.raises(ConfigError, match=r"^a\.toml:3: gpu\.devices: GPUs are asked for"):
        await ready(monkeypatch, tmp_path, 'model = "m"\n[gpu]\ndevices = [0]\n', Shown(1))


async def test_a_gpu_that_does_not_answer_may_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then it is not the file that is wrong."""
    text = 'model = "m"\n[engine]\ntensor_parallel_size = 2\n'
    with pytest.raises(HostError, match=r"but the driver shows 1 .*: GPU 1: GPU is lost"):
        await ready(monkeypatch, tmp_path, text, Shown(1, "GPU 1: GPU is lost"))


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("", False), ("devices = [0]", False), (f'devices = ["{UUIDS[0]}"]', False), ('devices = ["02:00.0"]', True)],
)
def test_only_for_some_names_the_driver_comes_first(devices: str, expected: bool, tmp_path: Path) -> None:
    """For all others vLLM is loaded while the driver is still asked."""
    settings = parse_instance(f'model = "m"\n[gpu]\n{devices}\n', source="a.toml", name="a")

    assert expected == Instance(settings, EnginePlan.from_settings(settings), frozenset(), tmp_path).asks_driver
