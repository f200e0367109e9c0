"""Engines over several hosts: what their file can get wrong, and what only the hosts can tell."""

from __future__ import annotations

import pytest

from llm_serve.core import spread
from llm_serve.core.errors import ConfigError
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.settings import Settings

RAY = 'distributed_executor_backend = "ray"\npipeline_parallel_size = 2\n'


def settings(engine: str, env: str = "") -> Settings:
    return parse_instance(f'model = "m"\n[engine]\n{engine}\n[engine.env]\n{env}', source="f.toml", name="f")


@pytest.mark.parametrize(
    ("engine", "env", "said"),
    [
        (RAY, 'VLLM_HOST_IP = "10.0.0.300"', "f.toml:7: engine.env.VLLM_HOST_IP: must be an IP address of this host"),
        (RAY, 'VLLM_HOST_IP = "0.0.0.0"', "other hosts could not reach this one"),
        (f"{RAY}nnodes = 2", "", "f.toml:5: engine.nnodes: is for hosts without Ray"),
    ],
)
def test_what_cannot_work_is_refused(engine: str, env: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(engine, env)

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "env", "words"),
    [
        ("", "", []),
        ("nnodes = 1", "", []),
        ("pipeline_parallel_size = 2", "", []),
        (RAY, 'VLLM_HOST_IP = "10.0.0.3"', ["ray status", "/tmp/ray"]),
        (RAY, "", ["ray status", "/tmp/ray", "VLLM_HOST_IP"]),
        ('data_parallel_backend = "ray"', 'VLLM_HOST_IP = "fd00::3"', ["ray status", "/tmp/ray"]),
        ("nnodes = 3", "", ["each of the 2 other hosts", "VLLM_HOST_IP"]),
    ],
)
def test_what_only_the_hosts_can_tell_is_noted(engine: str, env: str, words: list[str]) -> None:
    notes = list(spread.notes(settings(engine, env)))

    assert len(words) == len(notes)
    for word, note in zip(words, notes, strict=True):
        assert word in note
