"""How GPUs are named in a file, and how many of them its engine takes."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.devices import COUNTED, parallel_sizes, parse_device, product_in_words, visible_devices

UUID = "GPU-0123abcd-0123-0123-0123-0123456789ab"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (0, 0),
        (15, 15),
        (UUID, UUID),
        (UUID.upper(), UUID),
        ("00000000:1B:00.0", "00000000:1B:00.0"),
        ("0000:1b:00.0", "00000000:1B:00.0"),
        ("1b:00.0", "00000000:1B:00.0"),
        ("10000:01:00.0", "00010000:01:00.0"),
    ],
)
def test_a_gpu_has_three_names(written: int | str, expected: int | str) -> None:
    """Each is understood as nvidia-smi and lspci write it, and becomes the driver's spelling."""
    assert expected == parse_device(written)


@pytest.mark.parametrize(
    "written",
    [-1, True, 1.0, None, [0], "", "0", "all", "GPU-", "GPU-0123abcd", UUID[:-1], UUID + "0", "1b:00", "0000:1b:00.8"],
)
def test_what_names_no_gpu_is_refused_with_the_three(written: object) -> None:
    """Whoever guesses reads what can be written."""
    with pytest.raises(ValueError, match=r"an index \(0\), a UUID .* or a PCI address .*, not "):
        parse_device(written)


def test_a_part_of_a_gpu_has_a_place_of_its_own() -> None:
    """MIG instances are no devices here; the message says where they are named."""
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES in \[engine\.env\]"):
        parse_device("MIG-0123abcd-0123-0123-0123-0123456789ab")


@given(st.one_of(st.integers(), st.text(max_size=50), st.booleans(), st.floats(), st.none()))
def test_a_name_is_the_same_when_it_is_read_again(written: object) -> None:
    """Whatever is accepted is already in the driver's spelling the second time."""
    try:
        name = parse_device(written)
    except ValueError:
        return
    assert name == parse_device(name)


@given(st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))
def test_every_address_is_understood_in_each_spelling(domain: int, bus: int, device: int, function: int) -> None:
    """Four digits of a domain by the kernel, eight and capitals by the driver."""
    by_kernel = f"{domain:04x}:{bus:02x}:{device:02x}.{function}"
    by_driver = f"{domain:08X}:{bus:02X}:{device:02X}.{function}"

    assert by_driver == parse_device(by_kernel) == parse_device(by_driver)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (None, None),
        ((2, 0), "2,0"),
        ((UUID,), UUID),
        ((0, UUID), None),
        (("00000000:1B:00.0",), None),
    ],
)
def test_cuda_is_told_what_it_understands(devices: tuple[int | str, ...] | None, expected: str | None) -> None:
    """All indices or all UUIDs; for anything else the driver is asked first."""
    assert expected == visible_devices(devices)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}, 8),
        ({"tensor_parallel_size": 2, "prefill_context_parallel_size": 2}, 4),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, 2),
        ({"data_parallel_size": 8, "data_parallel_size_local": 4}, 4),
        ({"tensor_parallel_size": 2, "data_parallel_size": 8, "data_parallel_rank": 3}, 2),
        ({"tensor_parallel_size": "2"}, 1),
    ],
)
def test_gpus_are_counted_as_vllm_does(engine: dict[str, Any], expected: int) -> None:
    """Tensor x pipeline x prefill context x the replicas of this machine; decode context takes none of its own."""
    sizes = parallel_sizes(engine)

    assert sizes is not None
    assert expected == prod(sizes.values())
    assert engine.keys() - set(COUNTED) <= {"decode_context_parallel_size"}


@pytest.mark.parametrize(
    "engine",
    [
        {"distributed_executor_backend": "ray"},
        {"distributed_executor_backend": "external_launcher"},
        {"data_parallel_backend": "ray"},
        {"nnodes": 2},
    ],
)
def test_where_other_machines_take_part_nothing_is_counted(engine: dict[str, Any]) -> None:
    """How many GPUs are on which is not in the file."""
    assert parallel_sizes({"tensor_parallel_size": 16, **engine}) is None
    assert set() == engine.keys() - set(COUNTED)


def test_the_product_is_said_in_the_files_words() -> None:
    """Each size that is written, and what it comes to."""
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 3}

    assert "tensor_parallel_size 2 x data_parallel_size 3 = 6 GPUs" == product_in_words(sizes)
    assert "tensor_parallel_size 1 = 1 GPU" == product_in_words({"tensor_parallel_size": 1})
