"""Power cuts and boots: enabled instances come back by themselves, with what they learned, whoever else has failed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.figures import Watch
from tests.system.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(1500)]
UNIT, BROKEN, UNSTARTABLE = "llm-serve@small", "llm-serve@broken", "llm-serve@empty"
_CUTS = int(os.environ.get("LLM_SERVE_POWER_CUTS", "1"))
_SEED = os.environ.get("LLM_SERVE_SEED", "26")
_UP_LIMIT_S = 120
_STATE = "var/lib/llm-serve/small"
_TEXT = """
model = "/var/cache/llm-serve/models/SmolLM2-135M-Instruct"
[server]
listen = "127.0.0.1:8001"
[engine]
served_model_name = ["small"]
dtype = "float32"
max_model_len = 4096
max_num_seqs = 4
enforce_eager = true
kv_cache_memory_bytes = 67108864
[recovery]
floor_max_model_len = 256
"""
_DRIVER = """
[Unit]
Description=In place of NVIDIA's: a driver that takes its time
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sleep 2
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def enabled(box: Machine) -> Iterator[Machine]:
    """A machine whose boot starts one instance, after a slow driver; it serves, and has learned a smaller plan."""
    box.run("systemctl", "disable", "--now", "llm-serve@demo", check=False, timeout=100)
    box.write("/etc/llm-serve/small.toml", _TEXT)
    box.write("/etc/systemd/system/nvidia-persistenced.service", _DRIVER)
    box.run("systemctl", "enable", UNIT, "nvidia-persistenced")
    box.run("systemctl", "start", UNIT, timeout=_UP_LIMIT_S)
    yield box
    if not box.is_on:
        box.boot()
    box.run("systemctl", "disable", "--now", UNIT, BROKEN, UNSTARTABLE, "nvidia-persistenced", timeout=100)
    box.run("systemctl", "reset-failed")
    for path in ("etc/llm-serve/small.toml", "etc/llm-serve/broken.toml", "etc/llm-serve/empty.toml"):
        (box.root / path).unlink(missing_ok=True)
    (box.root / "etc/systemd/system/nvidia-persistenced.service").unlink()
    box.run("systemctl", "daemon-reload")
    box.run("rm", "-rf", f"/{_STATE}")


def _status(box: Machine) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(box.run("llm-serve", "status", "small", "--json").stdout)
    return answer


def _is_serving(box: Machine) -> bool:
    done = box.run("systemctl", "show", "-P", "SubState", UNIT, check=False)
    return done.stdout.strip() == "running"


def _serving_after_s(box: Machine) -> float:
    """Seconds from the unit's start to the first token, by systemd's own clock."""
    starts, ready = (
        int(box.show(UNIT, name)) for name in ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    )
    return (ready - starts) / 1e6


def _assert_whole(folder: Path) -> None:
    """What a cut leaves under a name that counts can be read to its end."""
    for path in folder.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict), path


@pytest.mark.row("26d", "power cuts at random moments")
def test_enabled_instances_survive_power_cuts_at_any_moment(enabled: Machine, watch: Watch) -> None:
    """Wherever the power goes, in boot, start, learning or serving: state is whole, and the next boot serves.

    Every other cut begins with nothing learned, so that some fall into the learning.
    """
    moments, rung = random.Random(_SEED), 1
    learned = _status(enabled)
    assert (2, rung) == (learned["engine_starts"], learned["rung"])
    enabled.power_cut()
    states = []
    for number in range(_CUTS):
        if not number % 2:
            (enabled.root / _STATE / "learned.json").unlink(missing_ok=True)
        enabled.power_on()
        time.sleep(moments.uniform(0, 25))
        states.append(
            enabled.run("systemctl", "show", "-P", "StatusText", UNIT, check=False).stdout.strip() or "booting"
        )
        enabled.power_cut()
        _assert_whole(enabled.root / _STATE)

    knew = (enabled.root / _STATE / "learned.json").exists()
    watch.begin()
    enabled.power_on()
    enabled.wait_until(lambda: _is_serving(enabled), _UP_LIMIT_S, "the instance to serve")

    watch.mark("serving")
    now = _status(enabled)
    watch.figure(cuts=_CUTS, in_the_middle_of="; ".join(states), starts=now["engine_starts"], rung=now["rung"])
    assert (1 if knew else 2, rung) == (now["engine_starts"], now["rung"])
    assert learned["max_model_len"] == now["max_model_len"]
    driver = int(enabled.show("nvidia-persistenced", "ActiveEnterTimestampMonotonic"))
    assert 0 < driver <= int(enabled.show(UNIT, "InactiveExitTimestampMonotonic"))


@pytest.mark.row("26e", "boot beside two failed instances")
def test_failed_instances_do_not_delay_the_others(enabled: Machine, watch: Watch) -> None:
    """A wrong file and a model that is not there: failed for good, and the third instance is as fast as alone."""
    if _status(enabled)["engine_starts"] != 1:  # or else it has begun, after the last boot, with what was learned
        enabled.reboot()
        enabled.wait_until(lambda: _is_serving(enabled), _UP_LIMIT_S, "the instance to serve alone")
    alone_s = _serving_after_s(enabled)
    enabled.write(
        "/etc/llm-serve/broken.toml", _TEXT.replace("max_num_seqs", "max_num_sequences").replace(":8001", ":8003")
    )
    enabled.write("/etc/llm-serve/empty.toml", _TEXT.replace("SmolLM2-135M-Instruct", "none").replace(":8001", ":8002"))
    enabled.run("systemctl", "enable", BROKEN, UNSTARTABLE)

    enabled.reboot()
    enabled.wait_until(lambda: _is_serving(enabled), _UP_LIMIT_S, "the instance to serve beside failed ones")

    beside_s = _serving_after_s(enabled)
    watch.figure(alone_s=round(alone_s, 1), beside_failed_s=round(beside_s, 1))
    failed = {
        unit: (enabled.show(unit, "ActiveState"), enabled.show(unit, "NRestarts")) for unit in (BROKEN, UNSTARTABLE)
    }
    assert {BROKEN: ("failed", "0"), UNSTARTABLE: ("failed", "0")} == failed
    # They look at their files at the same time, and importing vLLM for that takes a share of the same two cores.
    assert beside_s < 3 * alone_s
