"""Clients that never stop, and an engine that keeps dying: twenty seconds of it, or LLM_SERVE_SOAK_S seconds."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import Daemon, Stream, eventually
from tests.faults.mixed import CATALOG, Got

SECONDS = float(os.environ.get("LLM_SERVE_SOAK_S", "20"))
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(SECONDS + 400)]
CLIENTS, PAUSE_S, LOOK_EVERY_S = 6, 6.0, 0.25
AT_LEAST, MANY, MIB_A_START = 2, 20, 8
"""Faults, however slow the machine is; with fewer than MANY, the daemon's memory is noise."""
KINDS = ("chat streamed", "chat with a stop string", "JSON schema", "chat with penalties", "two choices", "completion")
TABLES: dict[str, dict[str, Any]] = {
    "engine": {"kv_cache_memory_bytes": 512 << 20}, "recovery": {"restart_limit": 1000, "stall_timeout_s": 10},
}  # fmt: skip


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon of this test's own."""
    made = Daemon(ensure_demo_model(default_cache(os.environ), print), TABLES).start()
    yield made.wait_ready()
    made.destroy()


class Soak:
    """What the clients got."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.is_over = daemon, threading.Event()
        self.undisturbed = {name: CATALOG[name](daemon.url) for name in KINDS}
        self.ended: Counter[str] = Counter()
        self.wrong: dict[str, Any] = {}
        self.seconds: list[float] = []

    def client(self, number: int) -> None:
        """Ask one thing after another until it is over."""
        while not self.is_over.is_set():
            name = KINDS[number % len(KINDS)]
            number += 1
            began = time.monotonic()
            try:
                got: Got = CATALOG[name](self.daemon.url)
            except openai.APIError as error:
                got = {"error": repr(error)}
            self.seconds.append(time.monotonic() - began)
            is_right = got == self.undisturbed[name]
            self.ended["completed" if is_right else "wrong"] += 1
            if not is_right:
                self.wrong[name] = {"got": got, "undisturbed": self.undisturbed[name]}

    def watch(self, ready: list[bool]) -> None:
        """Ask again and again whether an engine serves."""
        while not self.is_over.is_set():
            ready.append(self.daemon.http.get("/readyz").status_code == 200)
            time.sleep(LOOK_EVERY_S)


def _engine(daemon: Daemon) -> list[psutil.Process]:
    """Its processes, EngineCore first; a fault may come while the last one is being got over."""
    look = lambda: sorted(daemon.status()["engine_pids"])  # noqa: E731 - used once
    pids = eventually(look, lambda seen: len(seen) > 1, within_s=90, what="an engine's processes")
    return [psutil.Process(pid) for pid in pids]


def kill_core(daemon: Daemon) -> None:
    """Row 1 of the fault matrix."""
    _engine(daemon)[0].send_signal(signal.SIGKILL)


def kill_worker(daemon: Daemon) -> None:
    """Row 1 again, where only vLLM itself can notice first."""
    _engine(daemon)[-1].send_signal(signal.SIGKILL)


def freeze(daemon: Daemon) -> None:
    """Row 13: noticed after stall_timeout_s."""
    _engine(daemon)[0].send_signal(signal.SIGSTOP)


def leave(daemon: Daemon) -> None:
    """Row 30: clients go away in the middle of their answers."""
    streams = [Stream(daemon.url, 200) for _ in range(4)]
    for stream in streams:
        stream.wait_for_tokens(2)
        stream.close()


FAULTS: tuple[Callable[[Daemon], None], ...] = (kill_core, kill_worker, leave, kill_core, kill_worker, freeze)


def test_nothing_is_lost_in_a_soak(daemon: Daemon, record_property: Callable[[str, object], None]) -> None:
    """Every answer is complete and as without faults, and the daemon's memory stays in bounds."""
    soak, chance, resident = Soak(daemon), random.Random(2), []
    faults: Counter[str] = Counter()
    ready: list[bool] = []
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(soak.client, number) for number in range(CLIENTS)]
        clients.append(pool.submit(soak.watch, ready))
        try:
            ends_at = time.monotonic() + SECONDS
            while time.monotonic() < ends_at or sum(faults.values()) < AT_LEAST:
                time.sleep(chance.uniform(0.5, 1.5) * PAUSE_S)
                fault = FAULTS[sum(faults.values()) % len(FAULTS)]
                fault(daemon)
                faults[fault.__name__] += 1
                time.sleep(1)
                daemon.wait_ready()
                resident.append(daemon.status()["memory_bytes"] >> 20)
        finally:
            soak.is_over.set()
    for each in clients:
        each.result()

    starts = daemon.status()["engine_starts"]
    slope = (resident[-1] - resident[len(resident) // 3]) / max(1, starts * 2 / 3)
    ordered = sorted(soak.seconds)
    figures = {
        **soak.ended, **faults, "engine starts": starts, "an engine serves, share of time": round(statistics.mean(ready), 3),
        "P50 s": round(statistics.median(ordered), 2),
        "P99 s": round(ordered[int(0.99 * (len(ordered) - 1))], 2), "RSS MiB": resident, "MiB a start": round(slope, 1),
    }  # fmt: skip
    record_property("soak", figures)
    print(figures)
    assert {} == soak.wrong
    assert len(resident) < MANY or slope < MIB_A_START
    assert Path(f"/proc/{daemon.pid}").exists()
