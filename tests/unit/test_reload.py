"""What a changed file asks for, option by option."""

from __future__ import annotations

from typing import Any

import pytest

from llm_serve.core.instance_file import parse_instance
from llm_serve.core.reload import OF_THE_PROCESS, Change, compare
from llm_serve.core.settings import Settings

FILE = """
model = "m"
[server]
max_queued = 8
[engine]
max_num_seqs = 16
[engine.env]
A = "1"
[recovery]
restart_limit = 4
"""


def parsed(text: str) -> Settings:
    """The settings of an instance file."""
    return parse_instance(text, source="/etc/llm-serve/x.toml", name="x")


CHANGES: dict[str, tuple[str, str, Change]] = {
    "nothing": ("", "", Change((), (), needs_engine=False)),
    "a default is written down": (
        "[server]",
        "[server]\nhold_timeout_s = 300",
        Change((), (), needs_engine=False),
    ),
    "a limit of the gate": ("= 8", "= 9", Change(("server.max_queued",), (), needs_engine=False)),
    "a number of the recovery": ("= 4", "= 5", Change(("recovery.restart_limit",), (), needs_engine=False)),
    "an argument of the engine": ("= 16", "= 8", Change(("engine.max_num_seqs",), (), needs_engine=True)),
    "an argument goes": ("max_num_seqs = 16", "", Change(("engine.max_num_seqs",), (), needs_engine=True)),
    "an argument comes": (
        "= 16",
        "= 16\nmax-model-len = 512",
        Change(("engine.max_model_len",), (), needs_engine=True),
    ),
    "the first attention backend": (
        "[recovery]",
        '[recovery]\nattention_backends = ["TRITON_ATTN"]',
        Change(("recovery.attention_backends",), (), needs_engine=True),
    ),
    "the address": (
        "[server]",
        '[server]\nlisten = "127.0.0.1:1"',
        Change(("server.listen",), ("server.listen",), needs_engine=False),
    ),
    "the model": ('"m"', '"n"', Change(("model",), ("model",), needs_engine=True)),
    "the environment": ('A = "1"', 'A = "2"', Change(("engine.env.A",), ("engine.env.A",), needs_engine=True)),
    "the devices": (
        "[recovery]",
        "[gpu]\ndevices = [1]\n[recovery]",
        Change(("gpu.devices",), ("gpu.devices",), needs_engine=True),
    ),
    "the number of GPUs": (
        "= 16",
        "= 16\ntensor_parallel_size = 2",
        Change(("engine.tensor_parallel_size",), ("engine.tensor_parallel_size",), needs_engine=True),
    ),
    "the NUMA nodes": (
        "= 16",
        "= 16\nnuma_bind = false",
        Change(("engine.numa_bind",), (), needs_engine=True),
    ),
    "a limit of the heat": (
        "[recovery]",
        "[gpu]\npause_above_celsius = 85\n[recovery]",
        Change(("gpu.pause_above_celsius",), (), needs_engine=False),
    ),
    "another tokenizer": (
        "= 16",
        '= 16\ntokenizer = "t"',
        Change(("engine.tokenizer",), ("engine.tokenizer",), needs_engine=True),
    ),
}


@pytest.mark.parametrize(("old", "new", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_asks_for_what_it_needs(old: str, new: str, change: Change) -> None:
    """Other numbers count at once, other arguments need an engine, and the rest a restart."""
    assert change == compare(parsed(FILE), parsed(FILE.replace(old, new)))


@pytest.mark.parametrize("name", sorted(OF_THE_PROCESS))
def test_every_option_of_the_process_exists(name: str) -> None:
    """A renamed option must not slip out of the list of what needs a restart."""
    value: Any = parsed(FILE)

    for part in name.split("."):
        assert part in type(value).model_fields
        value = getattr(value, part)
