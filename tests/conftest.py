"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.patience import patient

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """vLLM sets variables (LD_PRELOAD, OMP_*) in the process that asks it, and `check` keeps to one core.

    Later tests' programs must inherit neither.
    """
    before, cpus = dict(os.environ), os.sched_getaffinity(0)
    yield
    os.environ.clear()
    os.environ.update(before)
    os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="session", autouse=True)
def _signals_as_usual() -> None:
    """Under nohup, SIGHUP is ignored, and whatever the tests start would ignore it too."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test as a whole is given as much more time as each of its waits."""
    for item in items:
        own = item.get_closest_marker("timeout")
        limit_s = float(own.args[0] if own else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(limit_s)), append=False)
