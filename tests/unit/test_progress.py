"""How far an engine start has come, read off the messages that vLLM writes."""

from __future__ import annotations

import pytest

from llm_serve.core import progress
from llm_serve.core.progress import Marks, is_progress, phase_of

# In the order in which a start on one GPU writes them.
MESSAGES = [
    ("Initializing a V1 LLM engine (v0.32.0) with config: model='m'", "starting the engine's processes"),
    ("Starting to load model /models/m...", "loading weights"),
    ("Loading weights took 0.72 seconds", "weights loaded"),
    ("Model loading took 14.25 GiB memory and 3.2 seconds", "weights loaded"),
    ("Dynamo bytecode transform time: 4.70 s", "compiling"),
    ("Available KV cache memory: 108.31 GiB", "measuring memory"),
    ("GPU KV cache size: 2,028,000 tokens, Maximum concurrency for 32,768 tokens", "making the KV cache"),
    ("Capturing CUDA graphs (decode, FULL): 12%", "capturing CUDA graphs"),
    ("Graph capturing finished in 4 secs, took 0.62 GiB", "warming up"),
    ("init engine (profile, create kv cache, warmup model) took 9.30 s", "engine ready"),
]


@pytest.mark.parametrize(("message", "name"), MESSAGES)
def test_a_message_of_vllm_names_the_phase(message: str, name: str) -> None:
    """Each marker is found inside the message that carries it."""
    phase = phase_of(message)

    assert phase is not None
    assert name == phase.name


def test_a_start_only_goes_forward() -> None:
    """The messages of a start, in their order, and what the daemon adds around them, never go back."""
    told = [phase_of(message) for message, _ in MESSAGES]
    phases = [progress.IMPORTING, progress.CONFIGURING, progress.LAUNCHING, *told]
    ratios = [phase.ratio for phase in (*phases, progress.FIRST_TOKEN, progress.SERVING) if phase]

    assert len(MESSAGES) + 5 == len(ratios)
    assert sorted(ratios) == ratios
    assert ratios[-1] == 1.0


@pytest.mark.parametrize("message", ["", "Using FlashAttention", "Engine 000: Avg prompt throughput: 0.0"])
def test_any_other_message_names_no_phase(message: str) -> None:
    """What is no marker is not taken for one."""
    assert phase_of(message) is None


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        pytest.param(Marks(10.0, 100, 5), False, id="nothing"),
        pytest.param(Marks(10.04, 100, 5), False, id="the loop's own ticking"),
        pytest.param(Marks(10.2, 100, 5), True, id="work"),
        pytest.param(Marks(10.0, 101, 5), True, id="something read"),
        pytest.param(Marks(10.0, 100, 6), True, id="a log line"),
        pytest.param(Marks(9.0, 100, 5), False, id="a process that counted has ended"),
    ],
)
def test_progress_is_what_changes_more_than_waiting_does(after: Marks, expected: bool) -> None:
    """A start is extended for work, for reading and for words, and not for the passing of time."""
    assert expected == is_progress(Marks(10.0, 100, 5), after, 2.5)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        pytest.param(Marks(30.0, 100, 5), False, id="two cores that only spin"),
        pytest.param(Marks(30.0, 101, 5), True, id="something read"),
        pytest.param(Marks(30.0, 100, 6), True, id="a log line"),
    ],
)
def test_processes_that_wait_for_each_others_gpus_spin(after: Marks, expected: bool) -> None:
    """A hang of NCCL uses all of a core: while GPUs meet, only what is read or said counts."""
    assert expected == is_progress(Marks(10.0, 100, 5), after, 10.0, spins=True)
