"""What a waiting stream is sent, and how an answer that is no stream is put into one that has begun."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_serve.web import sse
from llm_serve.web.answer import Answer
from llm_serve.web.asgi import Message

ERROR = {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}
STREAM: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


def body(piece: bytes, *, more: bool = True) -> Message:
    """One piece of an answer."""
    return {"type": "http.response.body", "body": piece, "more_body": more}


def events(text: bytes) -> list[tuple[str | None, Any]]:
    """The events of a stream as (name, value)."""
    found = []
    for block in text.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            value = fields["data"]
            found.append((fields.get("event"), value if value == "[DONE]" else json.loads(value)))
    return found


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_error_is_an_event_for_openai(path: str) -> None:
    """The error object as it would have been the body, then the end."""
    told = sse.late_answer(path, 400, json.dumps({"error": ERROR}).encode())

    assert [(None, {"error": ERROR}), (None, "[DONE]")] == events(told)


def test_an_error_is_an_event_for_responses() -> None:
    """The documented event of type error; with the error object too, which is what OpenAI's clients look for."""
    ((name, told),) = events(sse.late_answer("/v1/responses", 400, json.dumps({"error": ERROR}).encode()))

    assert ("error", "error", ERROR) == (name, told["type"], told["error"])
    assert ("too long", 400) == (told["message"], told["code"])


def test_an_error_is_an_event_for_anthropic() -> None:
    """The named event whose data has type and error."""
    told = sse.late_answer("/v1/messages", 400, json.dumps({"error": ERROR}).encode())

    expected = {"type": "error", "error": {"type": "BadRequestError", "message": "too long"}}
    assert [("error", expected)] == events(told)


@pytest.mark.parametrize("odd", [b"", b"Internal Server Error", b"[1]", b'{"error": "text"}', b'{"detail": "x"}'])
@pytest.mark.parametrize("path", sorted(sse.STREAMED))
def test_an_error_without_an_error_object_gets_one(path: str, odd: bytes) -> None:
    """Whatever a failing application says, the client's parser is given what it looks for."""
    name, told = events(sse.late_answer(path, 500, odd))[0]

    assert name == (None if "completions" in path else "error")
    assert "Internal Server Error" == told["error"]["message"]


def test_a_whole_answer_is_one_event() -> None:
    """An answer that came whole although a stream was asked for is not lost; line ends cannot break the event."""
    assert [(None, {"id": 1}), (None, "[DONE]")] == events(sse.late_answer("/v1/completions", 200, b'{"id":\n 1}'))


async def until(is_so: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until something is so."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not is_so():
        assert asyncio.get_running_loop().time() < deadline, "it has not become so"
        await asyncio.sleep(0.005)


class Wire:
    """What the client gets."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        """What the server gives the gate as `send`."""
        self.sent.append(message)

    @property
    def text(self) -> bytes:
        """The body so far."""
        return b"".join(message.get("body", b"") for message in self.sent)


def answer(wire: Wire, interval_s: float = 0.02) -> tuple[Answer, sse.Ticker]:
    """An answer to a chat, and the ticker that may keep it alive."""
    ticker = sse.Ticker(interval_s)
    return Answer(wire.send, b"id", "/v1/chat/completions", ticker), ticker


COMMENT = b": waiting for the engine, 0 s\n\n"


async def test_a_quiet_stream_gets_comments_until_it_goes_on() -> None:
    """Between two events, in the middle of an answer; each is well-formed, and the events stay whole."""
    wire = Wire()
    told, _ = answer(wire)
    await told(dict(STREAM))
    await told(body(b"data: 1\n\n"))

    await until(lambda: wire.text.count(COMMENT) >= 3)
    await told(body(b"data: 2\n\n", more=False))
    silent = wire.text
    await asyncio.sleep(0.05)

    assert silent == wire.text
    assert [(None, 1), (None, 2)] == events(wire.text)


async def test_half_an_event_is_not_torn() -> None:
    """No comment while the last bytes did not end an event."""
    wire = Wire()
    told, _ = answer(wire)
    await told(dict(STREAM))
    await told(body(b"data: 1\n"))

    await asyncio.sleep(0.1)

    assert b"data: 1\n" == wire.text


async def test_what_is_no_stream_is_left_alone() -> None:
    """A JSON answer with a pause in it is not spoiled."""
    wire = Wire()
    told, _ = answer(wire)
    told.wants_stream = lambda: False
    told.watch_silence()
    await asyncio.sleep(0.05)
    told.end_hold()
    await told({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await asyncio.sleep(0.1)
    await told(body(b"{}", more=False))

    assert b"{}" == wire.text


async def test_an_interval_of_zero_sends_nothing() -> None:
    """stream_keep_alive_s = 0 means never."""
    wire = Wire()
    told, _ = answer(wire, 0)
    await told(dict(STREAM))

    await asyncio.sleep(0.05)

    assert b"" == wire.text


async def test_one_task_serves_all_streams_and_ends_with_them() -> None:
    """A thousand waiting streams cost one task; without streams there is none."""
    ticker = sse.Ticker(0.04)
    wires = [Wire() for _ in range(1000)]
    answers = [Answer(wire.send, b"id", "/v1/completions", ticker) for wire in wires]
    before = len(asyncio.all_tasks())
    for each in answers:
        await each(dict(STREAM))
    assert before + 1 == len(asyncio.all_tasks())

    await until(lambda: all(wire.text for wire in wires))
    for each in answers:
        each.end_watch()
    await until(lambda: len(asyncio.all_tasks()) == before)


async def test_a_client_that_does_not_read_silences_nobody() -> None:
    """The comment to one that is stuck waits by itself, and only one does."""
    ticker, wire, stuck, tries = sse.Ticker(0.02), Wire(), asyncio.Event(), list[Message]()

    async def blocked(message: Message) -> None:
        if message["type"] == "http.response.body":
            tries.append(message)
            await stuck.wait()

    first, second = (Answer(send, b"id", "/v1/completions", ticker) for send in (blocked, wire.send))
    for each in (first, second):
        await each(dict(STREAM))
    await until(lambda: wire.text.count(COMMENT) >= 5)

    assert 1 == len(tries)
    stuck.set()
    first.end_watch()
    second.end_watch()
