"""The last minutes: bounded, numbered, told once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve import chronicle as module
from llm_serve.chronicle import Chronicle
from llm_serve.core import history
from llm_serve.core.history import COLUMNS, GPU_COLUMNS, SAMPLES, History
from llm_serve.core.tally import Pace, Tally
from llm_serve.core.telemetry import Reading
from llm_serve.host import logs
from tests.unit.test_status import NOW

PACE = Pace(10.26, 100.04, 0.123456, None)


def test_a_sample_has_a_value_for_each_column() -> None:
    """In their order, and what is not known is null."""
    gpus = (Reading(0, "u", "H", temperature_celsius=41.0, power_watts=70.123), Reading(1, "v", "H"))
    now = dataclasses.replace(NOW, requests_running=2, kv_cache_usage=0.51239, gpus=gpus)

    named = dict(zip(COLUMNS, history.sample(1000.06, now, PACE), strict=True))

    assert (1000.1, "serving", 3, 2, 0.5124) == tuple(
        named[name] for name in ("time", "state", "in_flight", "running", "kv_cache_usage")
    )
    assert (10.3, 100.0, 0.1235, None) == tuple(
        named[name] for name in ("prompt_tokens_per_s", "generated_tokens_per_s", "ttft_median_s", "ttft_p99_s")
    )
    assert [[41.0, 70.12, None, None], [None] * len(GPU_COLUMNS)] == named["gpus"]


@given(st.lists(st.sampled_from(["sample", "event", "ask"]), max_size=60))
def test_whoever_asks_again_and_again_is_told_each_thing_once(happens: list[str]) -> None:
    """Samples and events in their order, whenever he asks, and nothing twice."""
    kept, last, told, put = History(), 0, ([], []), ([], [])  # type: ignore[var-annotated]
    for number, what in enumerate([*happens, "ask"]):
        if what == "sample":
            kept.add_sample((number,))
            put[0].append((number,))
        elif what == "event":
            kept.add_event({"number": number})
            put[1].append({"number": number})
        else:
            answer = kept.after(last)
            last = answer["last"]
            told[0].extend(answer["samples"])
            told[1].extend(answer["events"])

    assert put == told


def test_what_is_kept_is_bounded_and_small() -> None:
    """A quarter of an hour of one GPU fits into 110 kB, before it is compressed."""
    kept = History()
    now = dataclasses.replace(
        NOW, kv_cache_usage=0.5123, gpus=(Reading(0, "u", "H", 41.0, 70.12, 700.0, 10**10, 10**11, 0.5),)
    )
    for number in range(SAMPLES + 5):
        kept.add_sample(history.sample(1.7e9 + number, now, PACE))
    for _ in range(1000):
        kept.add_event({"event": "x"})

    answer = kept.after(0)

    assert (SAMPLES, history.EVENTS) == (len(answer["samples"]), len(answer["events"]))
    assert 110_000 > len(json.dumps(answer))
    assert 1.7e9 + 5 == answer["samples"][0][0]


def test_a_number_of_another_life_is_answered_with_everything() -> None:
    """A page that was open before the daemon was restarted is not left with nothing."""
    kept = History()
    kept.add_sample((1,))

    assert [(1,)] == kept.after(17)["samples"]


@pytest.fixture
def _nothing_heard() -> Iterator[None]:
    logs.recent.clear()
    yield
    logs.recent.clear()


@pytest.mark.usefixtures("_nothing_heard")
async def test_an_error_costs_the_history_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task ends quietly, with a word in the journal, and what was kept is still told."""
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    looks = iter([NOW, NOW])
    said: list[Any] = []

    class Log:
        def error(self, event: str, **_: Any) -> None:
            said.append(event)

    monkeypatch.setattr(logs, "get_logger", Log)
    chronicle = Chronicle(looks.__next__, lambda: (Tally().cells,))

    await chronicle.keep()

    assert ["the history is kept no longer"] == said
    assert 2 == len(chronicle.after(0)["samples"])
