"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """vLLM sets variables (LD_PRELOAD, OMP_*) in the process that asks it; later tests' programs must not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
