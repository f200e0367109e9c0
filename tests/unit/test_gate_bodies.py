"""Bodies before the door: how long they may be, and what they may ask for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_serve.core.edge import Edge
from llm_serve.core.settings import LimitSettings
from llm_serve.web import hold
from llm_serve.web.asgi import Message, Receive, Scope, Send
from llm_serve.web.gate import Gate
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits
from tests.doors import COMPLETIONS, Call, Model, counted, gate, until


# How long a body may be.
@pytest.mark.parametrize(
    ("pieces", "headers"),
    [
        pytest.param((b"x" * 2001,), {"content-length": "2001"}, id="said at once"),
        pytest.param((b"x" * 1000, b"x" * 1000, b"x"), {}, id="found out"),
        pytest.param((b"x" * 2001,), {"transfer-encoding": "chunked", "content-length": "1"}, id="said wrongly"),
    ],
)
@pytest.mark.parametrize("is_open", [True, False], ids=["an engine", "no engine"])
async def test_a_body_that_is_too_long_is_refused(
    pieces: tuple[bytes, ...], headers: dict[str, str], is_open: bool
) -> None:
    """413 names the limit; the model does not get to see the body, and what it answers to that is not heard."""
    door, call, before = gate(max_body_bytes=2000), Call(pieces=pieces, headers=headers), counted("completed")

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        assert message["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"hung up"})

    if is_open:
        door.open(reading)
    await call.ask(door)

    assert (413, "request_too_large") == (call.status, call.error["code"])
    assert "2000 bytes (server.max_body_bytes)" in call.error["message"]
    assert (0, before) == (door.in_flight, counted("completed"))


@pytest.mark.parametrize("headers", [{"content-length": "2000"}, {}], ids=["said", "chunked"])
async def test_a_body_of_just_the_limit_passes(headers: dict[str, str]) -> None:
    """The limit itself is allowed."""
    door, model = gate(max_body_bytes=2000), Model()
    door.open(model)

    assert 200 == (await Call(pieces=(b"x" * 1000, b"x" * 1000), headers=headers).ask(door)).status


async def test_long_bodies_share_a_budget_and_short_ones_need_none() -> None:
    """What is read is bounded for all together; what finds no room stays in the network and is refused in the end."""
    door, model = gate(hold_timeout_s=0.0), Model()
    door.open(model)
    door._budget.left = 2500
    half_sent, rest = asyncio.Queue[Message](), b"b" * 70_000
    half_sent.put_nowait({"type": "http.request", "body": b"a" * 70_000, "more_body": True})
    scope: Scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    ignored = Call()
    slow = asyncio.create_task(door(scope, half_sent.get, ignored._send))
    await until(lambda: door._budget.left < 0)

    short = await Call(pieces=(b"s" * 1000, b"s" * 60_000)).ask(door)
    long = await Call(pieces=(b"l" * 70_000, b"l" * 70_000)).ask(door)
    half_sent.put_nowait({"type": "http.disconnect"})
    await slow
    after = await Call(pieces=(rest[:65_000], rest[65_000:])).ask(door)

    assert (200, 503, 200) == (short.status, long.status, after.status)
    assert "engine_unavailable" == long.error["code"]
    assert int(long.head["retry-after"]) > 0
    assert [61_000, 70_000] == [len(body) for _, body in model.seen]
    assert (2500, 0) == (door._budget.left, door.in_flight)


async def test_a_budget_that_frees_up_lets_a_long_body_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, as long as for an engine."""
    monkeypatch.setattr(hold, "_LOOK_AGAIN_S", 0.001)
    door, model = gate(), Model()
    door.open(model)
    other = hold.Body(asyncio.Queue[Message]().get, door._budget)
    door._budget.take(other, door._budget.left)
    task = asyncio.create_task(Call(pieces=(b"l" * 70_000, b"l" * 70_000)).ask(door))
    await asyncio.sleep(0.01)
    assert not task.done()
    other.close()

    assert 200 == (await task).status
    assert [140_000] == [len(body) for _, body in model.seen]


# What a body may ask for.
def guarded(model: Model | None = None, **limits: Any) -> Gate:
    """A gate that looks into bodies, open where there is a model."""
    door = gate(edge=Edge.of(LimitSettings(), {}), **limits)
    if model is not None:
        door.open(model)
    return door


@pytest.mark.parametrize("is_open", [True, False])
async def test_what_is_not_allowed_is_told_at_once(is_open: bool) -> None:
    """Before it waits, and before the model sees any of it: 400 with the field and the setting."""
    model, before = Model(), counted("rejected")
    door = guarded(model if is_open else None)

    call = await Call(pieces=(b'{"prompt": "a", ', b'"n": 9}')).ask(door)

    assert (400, "n", "over_limit") == (call.status, call.error["param"], call.error["code"])
    assert "`n` is 9, and at most 8 are allowed here (limits.max_choices)." == call.error["message"]
    assert ([], 0, 0, before + 1) == (model.seen, door.in_flight, door.held, counted("rejected"))


async def test_other_limits_count_from_the_next_request() -> None:
    """A changed file changes what may be asked for."""
    model = Model()
    door = guarded(model)
    edge = Edge.of(LimitSettings(max_choices=9), {})
    door.reconfigure(Keys(()), Limits(max_queued=1, hold_timeout_s=1.0, edge=edge), open_metrics=False)

    assert 200 == (await Call(pieces=(b'{"n": 9}',)).ask(door)).status
