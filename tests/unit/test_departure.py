"""A client that leaves takes its work along, and nobody else's; the gate is the only one who looks for that."""

from __future__ import annotations

import asyncio

import pytest

from llm_serve.web.asgi import Receive, Scope, Send
from tests.doors import Call, counted, gate, until

_START = {"type": "http.response.start", "status": 200, "headers": []}


async def test_the_work_ends_with_the_client() -> None:
    """Wherever the application is: here it waits for an engine, and does not look at its client."""
    door, ended = gate(), asyncio.Event()

    async def working(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(_START)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    door.open(working, 4)
    before = counted("aborted")
    call = Call()
    asking = asyncio.create_task(call.ask(door))
    await until(lambda: call.answers)
    call.leaves.set()
    await asyncio.wait_for(asking, 10)

    assert ended.is_set()
    assert not asking.cancelled()
    assert 0 == door.in_flight
    assert before + 1 == counted("aborted")


async def test_who_answers_nevertheless_has_answered_nobody() -> None:
    """vLLM's handlers catch the cancellation and return an error; the request is not a completed one for that."""
    door = gate()

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await send(_START)
            await send({"type": "http.response.body", "body": b"client disconnected"})

    door.open(stubborn, 4)
    before = counted("aborted")
    call = Call()
    call.leaves.set()
    asking = asyncio.create_task(call.ask(door))
    await asyncio.wait_for(asking, 10)

    assert before + 1 == counted("aborted")
    assert 0 == asking.cancelling()


async def test_what_is_left_to_do_after_an_answer_is_done() -> None:
    """The server says that the client has gone as soon as its answer is complete."""
    door, is_done = gate(), asyncio.Event()
    call = Call()

    async def with_work_left(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(_START)
        await send({"type": "http.response.body", "body": b"all"})
        call.leaves.set()
        for _ in range(10):
            await asyncio.sleep(0)
        is_done.set()

    door.open(with_work_left, 4)
    before = counted("completed")
    await call.ask(door)

    assert is_done.is_set()
    assert before + 1 == counted("completed")


@pytest.mark.parametrize("leaves", [False, True])
async def test_another_cancellation_goes_on(*, leaves: bool) -> None:
    """The server's, at its end, also in the moment in which the client leaves."""
    door = gate()

    async def working(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.Event().wait()

    door.open(working, 4)
    call = Call()
    asking = asyncio.create_task(call.ask(door))
    await asyncio.sleep(0.01)
    asking.cancel()
    if leaves:
        call.leaves.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert 0 == door.in_flight


async def test_an_error_of_the_application_goes_on() -> None:
    """It is not mistaken for the client's leaving."""
    door = gate()

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise ValueError("broken")

    door.open(broken, 4)
    with pytest.raises(ValueError, match="broken"):
        await Call().ask(door)
    await until(lambda: 1 == len(asyncio.all_tasks()))


async def test_applications_are_told_not_to_look() -> None:
    """Starlette's streams look by themselves, in tasks of their own, where ASGI is older than 2.4."""
    door, seen = gate(), dict[str, str]()

    async def looking(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope["asgi"])
        await send(_START)
        await send({"type": "http.response.body", "body": b""})

    door.open(looking, 4)
    await Call().ask(door)

    assert (2, 4) <= tuple(map(int, seen["spec_version"].split(".")))
