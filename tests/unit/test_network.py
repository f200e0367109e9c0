"""Which instance files leave the network open to an engine's processes, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llm_serve.core.network import why_open
from llm_serve.core.settings import NetworkSettings, Settings


def _why(choice: str, engine: Mapping[str, Any], here: frozenset[str] = frozenset({"model"})) -> str:
    network = NetworkSettings.model_validate({"engine": choice})
    settings = Settings(name="a", source="a.toml", model="model", network=network, engine=dict(engine))
    return why_open(settings, lambda model: model in here)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({}, ""),
        ({"tensor_parallel_size": 8, "distributed_executor_backend": "mp"}, ""),
        ({"nnodes": 1, "data_parallel_size": 2, "data_parallel_size_local": 2, "headless": False}, ""),
        ({"nnodes": 2}, "nnodes = 2"),
        ({"distributed_executor_backend": "ray"}, 'distributed_executor_backend = "ray"'),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, "2, of 4"),
        ({"data_parallel_address": "10.0.0.1"}, "data_parallel_address"),
        ({"data_parallel_rank": 0}, "data_parallel_rank"),
        ({"kv_transfer_config": {"kv_connector": "NixlConnector"}}, "kv_transfer_config"),
        ({"speculative_config": {"method": "ngram"}}, ""),
        ({"speculative_config": {"model": "draft"}}, "draft is not on this machine yet"),
        ({"enable_lora": True}, ""),
        ({"enable_lora": True, "lora_modules": ["a=model"]}, ""),
        ({"enable_lora": True, "lora_modules": ["a=adapter"]}, "adapter is not on this machine yet"),
    ],
)
def test_the_network_is_open_where_it_is_needed(engine: Mapping[str, Any], reason: str) -> None:
    """One engine on one machine with all its files needs none; what needs one is named."""
    why = _why("auto", engine)
    assert (reason in why) if reason else why == ""


def test_a_model_that_has_to_be_downloaded_needs_the_network() -> None:
    """Its weights are fetched by the engine's processes."""
    assert "model is not on this machine yet" == _why("auto", {}, frozenset())


def test_the_file_has_the_last_word() -> None:
    """Both ways, whatever else it says."""
    assert "" == _why("closed", {"nnodes": 2}, frozenset())
    assert "network.engine" in _why("open", {})
