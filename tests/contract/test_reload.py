"""What is said to need a restart is named as vLLM names it."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from llm_serve.core.reload import OF_THE_APPLICATION, OF_THE_MODEL
from llm_serve.engine import arguments

pytestmark = pytest.mark.vllm


def test_every_argument_that_needs_a_restart_is_vllms() -> None:
    """An argument that vLLM has renamed must not slip out of the list."""
    named = {name.removeprefix("engine.") for name in OF_THE_APPLICATION | OF_THE_MODEL}

    assert set() == named - set(arguments._options())
