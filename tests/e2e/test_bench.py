"""`llm-serve bench` against real engines: it names the limit that each of them was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.daemon import Daemon

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]


def bench(daemon: Daemon, streams: str) -> dict[str, Any]:
    """The report of one load test, by the name of the instance's file; four short answers a stream.

    Of many lengths: were they alike, the batch would end and begin as one, and be half empty whenever it is looked at.
    """
    prompts = daemon.folder / "prompts.jsonl"
    lines = (
        json.dumps({"prompt": f"{number}. Tell me a story.", "max_tokens": 10 + number * 7 % 31})
        for number in range(200)
    )
    prompts.write_text("\n".join(lines))
    done = daemon.command(
        "bench", "--json", "--warm-up", "0", "--requests", "2", "--streams", streams, "--prompts", str(prompts)
    )
    assert 0 == done.returncode, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_full_batch_is_named(shared: Daemon) -> None:
    """16 run at once, 32 want to, and the KV cache is nearly empty: max_num_seqs it is, and the double to try."""
    report = bench(shared, "32")

    verdict, evidence = report["verdict"], report["steps"][-1]["evidence"]
    assert "max_num_seqs" == verdict["limit"], (verdict, report)
    assert "Try max_num_seqs = 32 (--max-num-seqs)." == verdict["advice"]
    assert 16 == evidence["max_num_seqs"]
    assert evidence["running"] >= 15
    assert evidence["kv_cache_most"] < 0.9
    assert [64] == [step["answered"] for step in report["steps"]]
    assert not any(step["errors"] for step in report["steps"])


def test_a_full_cache_is_named(daemon: Callable[..., Daemon]) -> None:
    """The batch would take 16, and the KV cache holds four of these requests."""
    small = daemon({"engine": {"max_model_len": 512, "kv_cache_memory_bytes": 32 << 20}}).wait_ready()

    report = bench(small, "12")

    assert "KV cache" == report["verdict"]["limit"], report
    assert report["steps"][0]["evidence"]["running"] < 12
