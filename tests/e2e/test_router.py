"""vllm-router before two real instances: one loses its engine under load, and no request fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil
import pytest

from llm_serve.cli.router import program
from llm_serve.core.errors import HostError
from tests.daemon import MODEL_NAME, Daemon, Tables, eventually, free_port
from tests.e2e.conftest import Stage

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CLIENTS = 4
SILENCE_S = 2.0
"""What the answers of the one that lives may be apart at most, beside what its engine needs for one on this machine."""
TABLES: Tables = {"engine": {"max_num_seqs": 2 * CLIENTS}}


@dataclass(frozen=True)
class Asked:
    """One request of the load: when it was sent and answered, and what was wrong with the answer."""

    sent: float
    answered: float
    wrong: str | None


@pytest.fixture
def pair(stage: Stage) -> Iterator[tuple[Daemon, Daemon]]:
    """Two ready instances that nobody else uses."""
    stage.clear()
    # A core each: by itself vLLM binds both to the same ones, where the one that computes lets no other start.
    cores = sorted(os.sched_getaffinity(0))
    bound = [dict(TABLES) | {"engine.env": {"VLLM_CPU_OMP_THREADS_BIND": str(core)}} for core in (cores[0], cores[-1])]
    both = Daemon(stage.model, bound[0]), Daemon(stage.model, bound[1])
    try:
        for each in both:
            each.start()
        for each in both:
            each.wait_ready()
        yield both
    finally:
        for each in both:
            each.destroy()


@contextlib.contextmanager
def routing(pair: tuple[Daemon, Daemon], folder: Path) -> Iterator[str]:
    """`llm-serve router` with a file of its own, once it answers; its address."""
    try:
        program()
    except HostError as error:
        pytest.fail(f"{error} It is in packaging/locks/router.txt, so `make dev` brings it.")
    listen, log = f"127.0.0.1:{free_port()}", folder / "log"
    file = folder / "router.toml"
    instances = json.dumps([each.url for each in pair])
    file.write_text(f'listen = "{listen}"\ninstances = {instances}\nmetrics = "127.0.0.1:{free_port()}"\n')
    command = [sys.executable, "-c", "from llm_serve.cli.main import main; main()", "router", str(file)]
    path = str(Path(sys.modules["llm_serve"].__path__[0]).parent)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": path})
    try:
        with httpx.Client(base_url=f"http://{listen}", trust_env=False) as http:

            def models() -> int:
                assert process.poll() is None, log.read_text()
                return http.get("/v1/models").status_code

            eventually(models, lambda code: code == 200, within_s=60, what="the router's /v1/models")
        yield f"http://{listen}"
    finally:
        process.kill()
        process.wait(10)


class Load:
    """So many clients that always wait for an answer, every other one streamed, until the end of the block."""

    def __init__(self, url: str) -> None:
        self.asked: list[Asked] = []
        self._url, self._stopped = url, threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        # Without retries of its own: what the router does not answer is lost.
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="-", max_retries=0, timeout=120) as client:
            for turn in itertools.count():
                if self._stopped.is_set():
                    return
                sent = time.monotonic()
                try:
                    wrong = _ask(client, streamed=(number + turn) % 2 == 0)
                except openai.OpenAIError as error:
                    wrong = repr(error)
                self.asked.append(Asked(sent, time.monotonic(), wrong))

    def wait_for(self, answers: int) -> None:
        """Wait for so many more."""
        wanted = len(self.asked) + answers
        eventually(lambda: len(self.asked), lambda seen: seen >= wanted, within_s=120, what="answers")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Send nothing more, and wait for what was sent."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive(), "a request is still waiting"

    def longest_silence(self, begin: float, end: float) -> float:
        """Seconds between two answers, at most."""
        times = [begin, *sorted(each.answered for each in self.asked if begin <= each.answered <= end), end]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def _ask(client: openai.OpenAI, *, streamed: bool) -> str | None:
    """What is wrong with one answer of eight tokens, or None."""
    asked: Any = {
        "model": MODEL_NAME,
        "prompt": "One, two, three,",
        "max_tokens": 8,
        "extra_body": {"ignore_eos": True},
    }
    if not streamed:
        usage = client.completions.create(**asked).usage
        return None if usage and usage.completion_tokens == 8 else f"not whole: {usage}"
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    tokens = sum(bool(choice.text) for chunk in chunks for choice in chunk.choices)
    usage = chunks[-1].usage if chunks else None
    # More pieces than tokens would be an answer that was begun twice.
    return None if usage and usage.completion_tokens == 8 and tokens <= 8 else f"not whole: {usage}, {tokens} pieces"


def passed_over(url: str) -> list[str]:
    """The instances that the router sends nothing to now."""
    workers = httpx.get(f"{url}/workers", trust_env=False).raise_for_status().json()["workers"]
    return [each["url"] for each in workers if not each["is_healthy"]]


def test_an_engine_dies_under_load_and_no_request_fails(pair: tuple[Daemon, Daemon], tmp_path: Path) -> None:
    """Its instance is passed over until it has a new engine, and answers then what it has; the other one's go on."""
    dying, living = pair
    with routing(pair, tmp_path) as url, contextlib.ExitStack() as loads:
        first = loads.enter_context(Load(url))
        first.wait_for(4 * CLIENTS)
        usual = first.longest_silence(first.asked[CLIENTS].answered, first.asked[-1].answered)
        killed = time.monotonic()
        psutil.Process(min(dying.status()["engine_pids"])).kill()
        eventually(lambda: passed_over(url), lambda seen: dying.url in seen, within_s=30, what="passed over")
        seen = time.monotonic()
        # All of the first may be waiting for the one that died by now.
        second = loads.enter_context(Load(url))
        dying.wait_ready()
        back, starts_of_the_other = time.monotonic(), living.status()["engine_starts"]
        eventually(lambda: passed_over(url), lambda seen: not seen, within_s=30, what="back in")
        second.wait_for(2 * CLIENTS)

    asked = first.asked + second.asked
    silence = second.longest_silence(seen, back)
    waited = sum(killed <= each.sent < seen and each.answered > back for each in asked)
    print(
        f"\n{len(asked)} requests; passed over after {seen - killed:.1f} s, back after {back - killed:.1f}; {waited} waited"
        f" for it; silence {silence:.2f} s, {usual:.2f} before"
    )
    assert [] == [each.wrong for each in asked if each.wrong]
    assert 1 == starts_of_the_other
    bound = SILENCE_S + 4 * usual
    assert silence <= bound, f"no answer for {silence:.1f} s of {back - seen:.1f} s; usual are {usual:.1f} s"
