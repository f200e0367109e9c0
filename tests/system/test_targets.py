"""The units that keep Prometheus's list of instances, on a booted systemd."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
LIST = "/run/llm-serve/targets.json"


@pytest.fixture
def watched(box: Machine) -> Iterator[Machine]:
    """The machine with the list kept."""
    box.run("systemctl", "start", "llm-serve-targets.path")
    yield box
    box.run("rm", "-f", *(f"/etc/llm-serve/{name}.toml" for name in ("second", *NAMES)))
    box.run("systemctl", "stop", "llm-serve-targets.path")


NAMES = [f"many{number}" for number in range(20)]


def _instances(box: Machine, user: str = "nobody") -> set[str]:
    """Those on the list, as another user reads it."""
    read = box.run("runuser", "-u", user, "--", "cat", LIST, check=False)
    return {each["labels"]["instance"] for each in json.loads(read.stdout or "[]")}


def _wait_for(box: Machine, expected: set[str], what: str) -> None:
    """Wait for the list, and for the service's end: what changes before it is seen by the timer only."""
    box.wait_until(lambda: _instances(box) == expected, 20, what)
    box.wait_until(lambda: box.show("llm-serve-targets.service", "ActiveState") == "inactive", 10, "its end")


def test_the_list_follows_the_files(watched: Machine) -> None:
    """There from the start; what comes, changes or goes is noticed, also many at once and one after the other."""
    _wait_for(watched, {"demo"}, "the first list")

    watched.run("sh", "-c", "sed s/8000/8001/ /etc/llm-serve/demo.toml > /etc/llm-serve/second.toml")
    _wait_for(watched, {"demo", "second"}, "the second instance")
    assert "127.0.0.1:8001" in watched.run("cat", LIST).stdout

    watched.run("sed", "-i", "s/8001/8002/", "/etc/llm-serve/second.toml")
    watched.wait_until(lambda: "127.0.0.1:8002" in watched.run("cat", LIST).stdout, 10, "the other port")
    _wait_for(watched, {"demo", "second"}, "the same two")

    watched.run(
        "sh", "-c", f"for name in {' '.join(NAMES)}; do cp /etc/llm-serve/second.toml /etc/llm-serve/$name.toml; done"
    )
    _wait_for(watched, {"demo", "second", *NAMES}, "all of them")

    watched.run("rm", *(f"/etc/llm-serve/{name}.toml" for name in ("second", *NAMES)))
    _wait_for(watched, {"demo"}, "the last one to be gone")
    assert "active" == watched.show("llm-serve-targets.path", "ActiveState")
    assert "active" == watched.show("llm-serve-targets.timer", "ActiveState")


def test_the_list_ends_with_the_watch(watched: Machine) -> None:
    """Stopping the one unit that was started stops all of it; the list stays, for what runs is still there."""
    _wait_for(watched, {"demo"}, "the first list")
    watched.run("systemctl", "stop", "llm-serve-targets.path")

    assert "inactive" == watched.show("llm-serve-targets.timer", "ActiveState")
    assert {"demo"} == _instances(watched)
