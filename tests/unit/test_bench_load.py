"""The load generator against a server that does as it is told: every kind of error, schedules, waves, Ctrl-C."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_serve.bench import client
from llm_serve.bench.client import Asking, Server
from llm_serve.bench.load import Loop, Tally
from llm_serve.bench.measure import Plan, measure
from llm_serve.bench.server import find
from llm_serve.core.bottleneck import Limit, Observation
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.figures import Sample
from llm_serve.core.workload import Ask, Step
from llm_serve.scrape import observation
from tests.patience import patient
from tests.sse_server import MODEL_NAME, Behaviour, serve

CHAT = Asking(MODEL_NAME)
TOKEN = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
THOUGHT = b'data: {"choices": [{"delta": {"reasoning_content": "a"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def behaviour() -> Behaviour:
    """What the server does; each test says it."""
    return Behaviour()


@pytest.fixture
async def url(behaviour: Behaviour) -> AsyncIterator[str]:
    """Its address."""
    address, end = await serve(behaviour)
    yield address
    await end()


async def one(url: str, asking: Asking = CHAT, *, tokens: int = 5, timeout_s: float = 5) -> Sample:
    """One request."""
    async with Server(url).session(timeout_s) as session:
        return await client.ask(session, asking, Ask("Hello.", tokens))


@pytest.mark.parametrize(
    ("events", "error"),
    [
        pytest.param([ROLE, TOKEN, USAGE, DONE], None, id="whole"),
        pytest.param([b": waiting for the engine, 30 s\n\n", ROLE, TOKEN, USAGE, DONE], None, id="comments"),
        pytest.param([TOKEN.replace(b"\n\n", b"\r\n\r\n"), USAGE, DONE], None, id="other line ends"),
        pytest.param([TOKEN[:20], TOKEN[20:], USAGE, DONE], None, id="an event in two parts"),
        pytest.param([ROLE, THOUGHT, USAGE, DONE], None, id="a thought is an answer"),
        pytest.param([ROLE, TOKEN], "cut", id="cut after a token"),
        pytest.param([], "cut", id="cut before the first event"),
        pytest.param([ROLE, USAGE, DONE], "empty answer", id="no token"),
        pytest.param([ROLE, b"data: {\n\n", DONE], "no JSON in an event", id="no JSON"),
        pytest.param(
            [TOKEN, b'data: {"error": {"code": "engine_restarted"}}\n\n', DONE], "error event (engine_restarted)",
            id="ours",
        ),
        pytest.param([b'data: {"error": "boom"}\n\n', DONE], "error event", id="an error without a code"),
    ],
)  # fmt: skip
async def test_an_answer_is_whole_or_has_a_kind_of_error(
    behaviour: Behaviour, url: str, events: list[bytes], error: str | None
) -> None:
    """Nothing that is not whole counts as an answer."""
    behaviour.events = events

    sample = await one(url)

    assert error == sample.error
    assert (None if error else 9) == sample.tokens


async def test_a_text_that_looks_like_an_error_is_a_text(behaviour: Behaviour, url: str) -> None:
    """The words usage and error in an answer are part of it."""
    said = b'data: {"choices": [{"delta": {"content": "\\"error\\": \\"usage\\""}}]}\n\n'
    behaviour.events = [TOKEN, said, said, USAGE, DONE]

    assert None is (await one(url)).error


async def test_statuses_time_outs_and_refusals_are_kinds_of_their_own(behaviour: Behaviour, url: str) -> None:
    """HTTP 503, an answer that takes too long, a port on which nobody listens."""
    behaviour.status = 503
    assert "HTTP 503" == (await one(url)).error
    behaviour.status, behaviour.first_token_s = 200, 5
    assert "time-out" == (await one(url, timeout_s=0.2)).error
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert "refused" == (await one(f"http://127.0.0.1:{nobody.getsockname()[1]}")).error


async def test_times_are_of_the_first_and_the_last_token(behaviour: Behaviour, url: str) -> None:
    """The event with the role comes at once and is no token; pauses between tokens are TPOT."""
    behaviour.first_token_s, behaviour.token_s = 0.2, 0.05

    sample = await one(url)

    assert (5, 3) == (sample.tokens, sample.prompt_tokens)
    assert 0.2 <= (sample.ttft_s or 0) < patient(0.3)
    assert 0.05 <= (sample.tpot_s or 0) < patient(0.07)


async def test_tokens_are_counted_by_the_server_alone(behaviour: Behaviour, url: str) -> None:
    """Without usage it is an answer whose length is not known."""
    behaviour.usage = False

    sample = await one(url)

    assert (None, None) == (sample.error, sample.tokens)


async def test_the_body_says_what_was_asked_for(behaviour: Behaviour, url: str) -> None:
    """Thinking only where it was chosen; own messages as they are; completions with one prompt."""
    await one(url)
    await one(url, Asking(MODEL_NAME, thinking=False, ignore_eos=False))
    await one(url, Asking(MODEL_NAME, completions=True))

    plain, quiet, completion = behaviour.bodies
    assert ({"include_usage": True}, True) == (plain["stream_options"], plain["ignore_eos"])
    assert "chat_template_kwargs" not in plain
    assert {"enable_thinking": False} == quiet["chat_template_kwargs"]
    assert "ignore_eos" not in quiet
    assert ("Hello.", 5) == (completion["prompt"], completion["max_tokens"])


async def run(url: str, step: Step, stop: asyncio.Event | None = None, **options: float) -> Tally:
    """One step of five-token requests."""
    tally = Tally()
    async with Server(url).session(10) as session:
        loop = Loop(session, CHAT, itertools.repeat(Ask("Hello.", 5)), stop or asyncio.Event())
        if step.rate is not None:
            await loop.open(tally, step.rate, seconds=options["seconds"], seed=None)
        else:
            requests = int(options.get("requests", 0))
            await loop.closed(tally, step.streams or 1, seconds=options.get("seconds"), requests=requests)
    return tally


async def test_a_closed_loop_keeps_so_many_running(behaviour: Behaviour, url: str) -> None:
    """Never more than its streams, and the last ones are let finish."""
    behaviour.token_s, behaviour.slots = 0.02, 3

    tally = await run(url, Step(streams=3), seconds=0.5)

    assert {None} == {sample.error for sample in tally.samples}
    assert 0 == tally.running
    assert 12 <= len(tally.samples) <= 21
    assert max(sample.last_s for sample in tally.samples) > tally.began_s + 0.5


async def test_connections_are_used_again(behaviour: Behaviour, url: str) -> None:
    """A new one for each request would be part of each time to a first token."""
    behaviour.end_s = 0.01

    await run(url, Step(streams=2), requests=20)

    assert 2 == len(behaviour.connections)


async def test_so_many_requests_are_so_many(behaviour: Behaviour, url: str) -> None:
    """Also where they do not divide by the streams, and where they fail."""
    assert 10 == len((await run(url, Step(streams=4), requests=10)).samples)
    behaviour.status = 500
    assert ["HTTP 500"] * 3 == [sample.error for sample in (await run(url, Step(streams=2), requests=3)).samples]


async def test_an_open_loop_does_not_wait_for_its_server(behaviour: Behaviour, url: str) -> None:
    """A server that answers one at a time gets all requests on time all the same."""
    behaviour.slots, behaviour.token_s = 1, 0.015

    tally = await run(url, Step(rate=40.0), seconds=0.5)

    assert 20 == len(tally.samples)
    assert max(sample.sent_s for sample in tally.samples) - tally.began_s < patient(0.7)
    assert max(sample.last_s for sample in tally.samples) - tally.began_s > 1.0


async def test_a_loop_that_is_blocked_counts_what_is_late(behaviour: Behaviour, url: str) -> None:
    """What its own loop delayed is told: here it stands still for 0.2 s."""
    load = asyncio.create_task(run(url, Step(rate=50.0), seconds=0.5))
    await asyncio.sleep(0.1)
    time.sleep(0.2)  # noqa: ASYNC251 - the fault
    tally = await load

    assert 5 <= sum(sample.late_s >= 0.01 for sample in tally.samples)
    assert tally.generator.late_max_s >= 0.15


@pytest.mark.parametrize("step", [Step(streams=2), Step(rate=20.0)])
async def test_a_stop_keeps_what_there_is(behaviour: Behaviour, url: str, step: Step) -> None:
    """What runs is given up, and is no error."""
    behaviour.token_s = 0.05
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, stop.set)
    began = time.monotonic()

    tally = await run(url, step, stop, seconds=30)

    assert time.monotonic() - began < patient(2)
    assert {None} == {sample.error for sample in tally.samples}
    assert tally.running > 0
    assert 0.5 == pytest.approx((tally.until_s or 0) - tally.began_s, abs=0.2)


async def test_the_limit_of_a_real_queue_is_found(behaviour: Behaviour, url: str) -> None:
    """Eight places, sixteen streams: steps that fit the server, and the verdict."""
    behaviour.token_s, behaviour.slots = 0.1, 8
    told: list[str] = []

    report = await measure(
        Server(url), Plan(seconds=2.0, prompts=(Ask("Hello.", 5),)), asyncio.Event(),
        lambda what, tally: told.append(what),
    )  # fmt: skip

    assert ["1 stream", "8 streams", "16 streams"] == [each.figures.load for each in report.steps]
    assert report.verdict is not None
    assert Limit.max_num_seqs == report.verdict.limit
    assert "max_num_seqs = 16" in report.verdict.advice
    assert {"16 streams", "16 streams: warming up"} <= set(told)
    assert not any(each.figures.errors for each in report.steps)


async def test_a_server_without_metrics_is_measured_all_the_same(behaviour: Behaviour, url: str) -> None:
    """What could not be known is said."""
    behaviour.metrics, behaviour.token_s = None, 0.01
    plan = Plan(steps=(Step(streams=2),), requests=3, prompts=(Ask("Hello.", 10),))

    report = await measure(Server(url), plan, asyncio.Event(), lambda what, tally: None)

    assert 6 == report.steps[0].figures.answered
    assert report.verdict is not None
    assert Limit.unknown == report.verdict.limit
    assert "no vllm: metrics" in report.verdict.not_known[0]


async def test_nobody_there_is_said_at_once() -> None:
    """Before any load."""
    with pytest.raises(HostError, match=r"127\.0\.0\.1:1 does not answer: Connection refused\. Does it run\?"):
        await measure(Server("http://127.0.0.1:1"), Plan(), asyncio.Event(), lambda what, tally: None)


def test_metrics_of_several_engines_become_one() -> None:
    """Counts add up, the fullest cache counts, labels and other families are passed over."""
    text = (
        "# HELP vllm:num_requests_running Requests.\n# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="a \\"b\\" {c}"} 3.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 4.0\n'
        'vllm:num_requests_running_of_another_kind{engine="0"} 100.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.7\n'
        "llm_serve_plan_max_num_seqs 16.0\nprocess_cpu_seconds_total 12.5\n"
    )

    assert Observation(5.0, running=7, kv_cache_usage=0.7, max_num_seqs=16, front_end_cpu_s=12.5) == observation(
        text, 5.0
    )
    assert None is observation("other_metric 1.0\n", 5.0)
    assert None is observation("vllm:num_requests_running{ nonsense\n", 5.0)


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://[::1]:8000/", "https://[::1]:8000"),
    ],
)
def test_an_address_is_a_server(target: str, url: str) -> None:
    """With or without the /v1 that clients are configured with."""
    assert Server(url, key="sesame") == find(target, {"OPENAI_API_KEY": "sesame"})


@pytest.mark.parametrize("target", ["ftp://a", "http://", "http://a:x", "http://a/b", "http://a?b"])
def test_a_wrong_address_is_named(target: str) -> None:
    """What, and how it should look."""
    with pytest.raises(ConfigError, match="is not the address of a server"):
        find(target, {})


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:8001", Server("http://127.0.0.1:8001", max_queued=9)),
        ("0.0.0.0:8001", Server("http://127.0.0.1:8001", max_queued=9)),
        ("[::]:8001", Server("http://[::1]:8001", max_queued=9)),
        ("unix:/run/x/api.sock", Server("http://localhost", "/run/x/api.sock", max_queued=9)),
    ],
)
def test_an_instance_is_found_by_its_file(tmp_path: Path, listen: str, expected: Server) -> None:
    """Its address, and how many it lets wait."""
    file = tmp_path / "tiny.toml"
    file.write_text(f'model = "m"\n[server]\nlisten = "{listen}"\nmax_queued = 9\n')

    assert expected == find(str(file), {})


def test_the_key_of_an_instance_is_the_first_of_its_file(tmp_path: Path) -> None:
    """The environment's goes first."""
    keys, file = tmp_path / "keys", tmp_path / "tiny.toml"
    keys.write_text("# keys\nfirst-0123456\nsecond-0123456\n")
    keys.chmod(0o600)
    file.write_text(f'model = "m"\n[server]\napi_keys = "{keys}"\n')

    assert "first-0123456" == find(str(file), {}).key
    assert "own" == find(str(file), {"OPENAI_API_KEY": "own"}).key
