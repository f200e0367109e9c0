"""`llm-serve status` and `top`, asking a real daemon with a real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest

from tests.daemon import MODEL_NAME, Daemon, eventually
from tests.terminal import ENTRY, Terminal

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

GENERATED = f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL_NAME}"}}'


def test_status_tells_the_load_of_a_real_engine(shared: Daemon) -> None:
    """Two streams are two that run, at the speed at which their tokens come; and nobody waits."""
    # However slow the machine is with starting a command, they go on.
    with shared.stream(1900, is_endless=True) as first, shared.stream(1900, is_endless=True) as second:
        for stream in (first, second):
            stream.wait_for_tokens(3)
        done = shared.command("status")
        tokens_before = shared.metric(GENERATED)
        whole = json.loads(shared.command("status", "--json").stdout)
        tokens = shared.metric(GENERATED) - tokens_before

    lines = {line[2:15].strip(): line[16:] for line in done.stdout.splitlines()}
    assert 0 == done.returncode, done.stderr
    assert "2 running, 0 waiting in the engine" == lines["batch"]
    assert lines["limit"].startswith("the load: 2 ran of 16 (max_num_seqs), 0 waited in the engine")
    load = whole["load"]
    assert (2.0, 0.0, 16.0) == (load["running"], load["waiting"], load["max_num_seqs"])
    assert 0 < load["kv_cache_usage"] < 1
    assert 2 <= load["generated_per_s"] * load["interval_s"] <= tokens
    assert "serving" == whole["state"]


def test_the_hit_rate_of_the_prefix_cache_is_told(shared: Daemon) -> None:
    """A prompt that is asked twice is found, but for its last block."""
    prompt = "All of this has been said before, and it will be said again. " * 12
    before = json.loads(shared.command("status", "--json").stdout)["load"]
    for _ in range(3):
        assert 200 == shared.chat(prompt, max_tokens=1).status_code

    after = json.loads(shared.command("status", "--json").stdout)["load"]

    assert (before["prefix_cache_hits"] or 0.0) < after["prefix_cache_hits"] <= 1
    assert before["answered"] + 3 == after["answered"]


def test_top_follows_an_engine_through_its_end(shared: Daemon) -> None:
    """Load, speed and first tokens are drawn; the engine's end and its return are said; and the terminal is put right."""
    top = Terminal(
        [sys.executable, "-c", ENTRY, "top", str(shared.file), "--interval", "0.2"], shared._environ, columns=100
    )
    try:
        with shared.stream(900) as stream:
            stream.wait_for_tokens(3)
            top.wait_for("running       1 of 16")
            speed = eventually(
                lambda: _value(top, "generated"), lambda seen: seen > 0, within_s=20, what="generated tokens/s"
            )
            assert speed < 1000
            os.kill(shared.status()["engine_pids"][0], signal.SIGKILL)
            rows = top.wait_for(": recovering for", within_s=30)
            assert 24 == len(rows)
            rows = top.wait_for(": serving for", within_s=60)
            assert any(re.match(r"\d+ s ago: (killed|crashed): ", row) for row in top.wait_for(" s ago: ")), rows
            top.wait_for("running       1 of 16")
        assert shared.chat(max_tokens=4).status_code == 200
        top.wait_for("running       0 of 16")
        top.type("q")
        assert 0 == top.wait_for_exit()
        assert top.is_as_before()
    finally:
        top.close()


def _value(top: Terminal, label: str) -> float:
    """The figure in the line with this label; 0 while it is not known."""
    row = next((row for row in top.frame() if row.startswith(label)), "")
    found = re.match(rf"{label} +([0-9.]+) ", row)
    return float(found[1]) if found else 0.0
