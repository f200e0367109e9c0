"""The pipe between the supervisor and its front ends."""

from __future__ import annotations

import asyncio
import socket

from llm_serve.front_ends import messages
from llm_serve.front_ends.messages import Message, Pipe


async def pipes() -> tuple[Pipe, Pipe, socket.socket]:
    """Both ends, and the second one's socket."""
    one, other = socket.socketpair()
    return await Pipe.over(one), await Pipe.over(other), other


async def test_messages_come_in_order_and_as_they_were() -> None:
    """Also one that is longer than any buffer."""
    ours, theirs, _ = await pipes()
    sent: list[Message] = [
        messages.Attach(1, b"x" * 5_000_000),
        messages.Open(None),
        messages.Judge(may_be_a_request=True, everywhere=3),
        messages.Logged("info", "an event", {"value": 1}),
    ]
    for message in sent:
        ours.send(message)

    assert sent == [await theirs.receive() for _ in sent]
    ours.close()
    theirs.close()


async def test_a_wait_that_is_given_up_loses_nothing() -> None:
    """Not even in the middle of a message."""
    ours, theirs, _ = await pipes()
    big = messages.Attach(1, b"x" * 5_000_000)
    waiting = asyncio.create_task(theirs.receive())
    ours.send(big)
    await asyncio.sleep(0)
    while theirs._expected is None:  # noqa: ASYNC110 - no event tells that a wait is half over
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})

    assert waiting.cancelled()
    assert big == await theirs.receive()
    ours.close()
    theirs.close()


async def test_the_end_of_the_other_is_told() -> None:
    """What is sent after it is lost without an error."""
    ours, theirs, _ = await pipes()
    theirs.close()

    assert None is await ours.receive()
    ours.send(messages.Hold())
    ours.close()


async def test_the_end_in_the_middle_of_a_message_is_one() -> None:
    """A front end that is killed while it speaks."""
    ours, theirs, other = await pipes()
    other.send(messages._LENGTH.pack(100) + b"too short")
    theirs.close()

    assert None is await ours.receive()
    ours.close()
