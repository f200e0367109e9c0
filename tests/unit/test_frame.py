"""What `top` draws: each line fits, and says what was seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from llm_serve.core.bottleneck import Limit, Verdict
from llm_serve.core.report import Report
from llm_serve.core.status import Snapshot
from llm_serve.core.telemetry import Reading
from llm_serve.core.terminal.frame import History, Window, many, one
from llm_serve.core.terminal.overview import overview
from llm_serve.core.vitals import Vitals

NOW = 1_000_000.0
WINDOW = Window(80, 24, NOW, "12:34:56", 1.0)
GPU = Reading(
    index=0, uuid="GPU-a", name="NVIDIA H200", temperature_celsius=61.0, power_watts=699.6, power_limit_watts=700.0,
    memory_used_bytes=100 << 30, memory_total_bytes=140 << 30, utilization_ratio=0.97,
)  # fmt: skip
LIMIT = Verdict(Limit.max_num_seqs, ("8 ran of 8", "room for more"), "Try 16.")
VITALS = Vitals(
    running=8, waiting=5, held=1, max_num_seqs=8, kv_cache_usage=0.34, prefix_cache_hits=0.25, generated_per_s=1234.5,
    prompt_per_s=99.0, ttft_p50_s=0.012, ttft_p99_s=1.5, limit=LIMIT,
)  # fmt: skip


def told(vitals: Vitals | None = VITALS, **values: Any) -> Report:
    """What a daemon tells."""
    known: dict[str, Any] = {
        "instance": "qwen", "model": "Qwen/Qwen2.5-7B", "state": "serving", "why": "the engine answers",
        "since": NOW - 61, "started": NOW - 61, "uptime_s": 61.0, "phase": "serving", "progress": 1.0, "version": "1",
        "vllm_version": "0.32.0", "pid": 7, "listen": "127.0.0.1:8000", "source": "/etc/llm-serve/qwen.toml",
        "max_model_len": 2048, "max_num_seqs": 8, "engine_starts": 2, "gpus": (GPU,), "requests_in_flight": 3,
    }  # fmt: skip
    return Report.told(Snapshot(**known | values).to_json(), vitals)


def seen(*reports: Report) -> History:
    """A history, one report a second until now."""
    history = History()
    for place, report in enumerate(reports):
        history.add(report, NOW - len(reports) + 1 + place)
    return history


def failure(detail: str, ago_s: float) -> dict[str, Any]:
    """One entry of failures."""
    return {"time": NOW - ago_s, "failure": {"kind": "gpu_out_of_memory", "detail": detail}}


def test_a_frame_says_it_all_in_80_columns_and_24_lines() -> None:
    """To the letter."""
    report = told(failures=(failure("tried to allocate 2 GiB", 200), failure("once more", 4000)))

    lines = one(report, seen(told(replace(VITALS, running=4, kv_cache_usage=0.0)), report), WINDOW)

    assert [
        "qwen: serving for 1 min 1 s: the engine answers                         12:34:56",
        "Qwen/Qwen2.5-7B on 127.0.0.1:8000, vLLM 0.32.0",
        "plan 2048 x 8, rung 0, engine start 2",
        "limit: max_num_seqs: 8 ran of 8",
        "",
        "running       8 of 8                                                          ▅█",
        "waiting       5                                                               ██",
        "held          0 of 3 in flight                                                ▁▁",
        "KV cache      34% full                                                        ▁▄",
        "generated     1234 tokens/s                                                   ██",
        "prompt        99.0 tokens/s, 25% cached                                       ██",
        "TTFT P50/P99  12 ms / 1.50 s                                                  ██",
        "",
        "GPU 0    61 °C   700 of 700 W  100.0 of 140.0 GiB   97%                       ██",
        "",
        "3 min 20 s ago: gpu_out_of_memory: tried to allocate 2 GiB",
        "1 h 6 min ago: gpu_out_of_memory: once more",
        *[""] * 6,
        "q quits; every 1 s",
    ] == lines


def test_a_daemon_that_is_gone_is_said_and_what_was_known_stays() -> None:
    """The sparklines have a gap; when it is back, the state is its own again."""
    gone = Report("qwen", "not running", "does not run here.")
    history = seen(told(), gone, gone, gone)

    away = one(gone, history, WINDOW)
    history.add(told(None, state="starting", why="loading", progress=0.4, phase="weights"), NOW)
    back = one(told(None, state="starting", why="loading", progress=0.4, phase="weights"), history, WINDOW)

    assert away[0].startswith("qwen: not running for 2 s; this goes on when it is back")
    assert "Qwen/Qwen2.5-7B on 127.0.0.1:8000, vLLM 0.32.0" == away[1]
    assert "limit: not known" == away[3]
    assert ("running       - of 8", 77, "█") == (away[5][:20], len(away[5]), away[5][-1])  # and three blanks
    assert 76 == len(back[5])
    assert back[0].startswith("qwen: starting for 1 min 1 s: loading")
    assert back[2].endswith("; weights, 40%")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"state": "recovering"}, "limit: none is looked for while it is recovering"),
        ({"is_drained": True}, "plan 2048 x 8, rung 0, engine start 2; admission is stopped by hand"),
        ({"too_hot": "GPU 0 has 91 degrees"}, "plan 2048 x 8, rung 0, engine start 2; GPU 0 has 91 degrees"),
        ({"max_model_len": None, "rung": 3}, "plan auto x 8, rung 3, engine start 2"),
        ({}, "no failure since the daemon started"),
        (
            {"gpus": (replace(GPU, throttle_reasons=("sw_power_cap",)),)},
            "GPU 0    61 °C   700 of 700 W  100.0 of 140.0 GiB   97%  slowed down by: power limit",
        ),
        ({"gpus": (Reading(index=11, uuid="", name=""),)}, "GPU 11    - °C            - W                   -     -"),
    ],
)
def test_what_matters_is_there(values: dict[str, Any], line: str) -> None:
    """A line for each."""
    assert line in one(told(**values), seen(told(**values)), replace(WINDOW, width=100))


def test_a_frame_without_a_window_is_as_long_as_what_it_says() -> None:
    """For --once: all GPUs, no keys."""
    report = told(gpus=tuple(replace(GPU, index=index) for index in range(30)))

    lines = one(report, seen(report), replace(WINDOW, height=None))

    assert 30 == sum(line.startswith("GPU") for line in lines)
    assert "no failure since the daemon started" == lines[-1]


def test_all_instances_are_a_table_with_a_clock() -> None:
    """The same as `status` shows, live."""
    reports = [told(), Report("gone", "not running", "does not run here.")]

    lines = many(reports, WINDOW)

    assert lines[0].startswith("2 instance(s)")
    assert overview(reports, NOW, 80) == lines[2:5]
    assert 24 == len(lines)
    assert ["instance", "state", "for", "run", "wait", "held", "KV", "tokens/s"] == lines[2].split()[:8]


TEXT = st.text("ab 模型\x1b\n\u202e\u0301é°…", max_size=90)
FIGURE = st.none() | st.floats(0, 1e9)
READINGS = st.builds(
    Reading,
    index=st.integers(0, 127), uuid=TEXT, name=TEXT, temperature_celsius=FIGURE, power_watts=FIGURE,
    power_limit_watts=FIGURE, memory_used_bytes=st.none() | st.integers(0, 1 << 45),
    memory_total_bytes=st.none() | st.integers(0, 1 << 45), utilization_ratio=st.none() | st.floats(0, 1),
    throttle_reasons=st.none() | st.just(("hw_slowdown", "sw_power_cap")),
)  # fmt: skip
LOADS = st.none() | st.builds(
    Vitals,
    running=FIGURE, waiting=FIGURE, max_num_seqs=FIGURE, kv_cache_usage=st.none() | st.floats(0, 2),
    prefix_cache_hits=st.none() | st.floats(0, 1), generated_per_s=FIGURE, prompt_per_s=FIGURE, ttft_p50_s=FIGURE,
    ttft_p99_s=FIGURE, limit=st.none() | st.builds(Verdict, st.sampled_from(Limit), st.tuples(TEXT), TEXT),
)  # fmt: skip
REPORTS = st.builds(
    told,
    LOADS,
    model=TEXT.filter(bool), why=TEXT, phase=TEXT, progress=st.floats(0, 1), too_hot=TEXT, is_drained=st.booleans(),
    max_num_seqs=st.none() | st.integers(1, 10**9), gpus=st.lists(READINGS, max_size=3).map(tuple),
    failures=st.lists(st.builds(failure, TEXT, st.floats(-10, 1e9)), max_size=3).map(tuple),
) | st.builds(Report, st.just("qwen"), st.just("no answer"), TEXT)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(REPORTS, min_size=1, max_size=3), st.integers(1, 130), st.integers(1, 50))
def test_no_line_is_ever_longer_than_the_window(reports: list[Report], width: int, height: int) -> None:
    """Nor is a frame higher, nor does it hold what moves the cursor; measured by a library of its own."""
    window = replace(WINDOW, width=width, height=height)

    for lines in (one(reports[-1], seen(*reports), window), many(reports, window)):
        assert height == len(lines)
        assert all(cell_len(line) <= width for line in lines)
        assert all(line.isprintable() for line in lines)
