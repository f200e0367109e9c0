"""Requests with images outlive an engine, also those about an image that the lost engine had seen before."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.daemon import MODEL_NAME, Daemon, eventually
from tests.faults.images import make_model, picture
from tests.faults.test_engine import engine_processes
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
Answer = list[tuple[str, float]]
"""The tokens, and how probable each was: this is what depends on the picture."""


@pytest.fixture(scope="module")
def sighted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that sees."""
    return make_model(model, tmp_path_factory.mktemp("sighted"))


class Asked:
    """One streamed question about a picture."""

    def __init__(self, url: str, colour: str) -> None:
        self._url, self._colour = url, colour
        self.got: Answer = []

    def __call__(self) -> Answer:
        for token in self._tokens():
            self.got.append(token)
        return self.got

    def _tokens(self) -> Iterator[tuple[str, float]]:
        parts = [
            {"type": "image_url", "image_url": {"url": picture(self._colour)}},
            {"type": "text", "text": "What is it?"},
        ]
        body: Any = {"messages": [{"role": "user", "content": parts}], "extra_body": {"ignore_eos": True}}
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            for chunk in client.chat.completions.create(
                model=MODEL_NAME, temperature=0, max_tokens=1500, stream=True, logprobs=True, **body
            ):
                for each in chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ():
                    yield each.token, round(each.logprob, 3)


@pytest.mark.row("2i", "EngineCore killed under answers about images")
def test_answers_about_images_go_on(daemon: Callable[..., Daemon], watch: Watch, sighted: Path) -> None:
    """One that has begun, one that has not, and one that is asked while there is no engine: all as without the kill."""
    serving = daemon(model=sighted, tables={"engine": {"kv_cache_memory_bytes": 64 << 20}}).wait_ready()
    black, white = Asked(serving.url, "black")(), Asked(serving.url, "white")()
    assert black != white
    begun = Asked(serving.url, "black")
    first = serving.later(begun)
    eventually(lambda: len(begun.got), lambda tokens: tokens > 20, within_s=60, what="tokens")

    second = serving.later(Asked(serving.url, "white"))
    engine_processes(serving)[0].send_signal(signal.SIGKILL)
    eventually(lambda: serving.status()["state"], lambda state: state == "recovering", within_s=10, what="the death")
    third = serving.later(Asked(serving.url, "white"))

    assert [black, white, white] == [each.result(120) for each in (first, second, third)]
    watch.note(serving)
    assert 2 == serving.status()["engine_starts"]
