"""Streams that pass piece by piece or wait with comments, and how requests are counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llm_serve import metrics, passage
from llm_serve.web.asgi import Receive, Scope, Send
from llm_serve.web.gate import Gate
from tests.doors import COMPLETIONS, Call, Model, counted, gate, waiting


# Streams and outcomes.
async def test_a_stream_passes_piece_by_piece() -> None:
    """Each piece is with the client before the model makes the next one."""
    door, call = gate(), Call()

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            assert b"%d" % number == call.answers[-1]["body"]
        await send({"type": "http.response.body", "body": b""})

    door.open(streaming)
    await call.ask(door)

    assert [b"0", b"1", b"2", b""] == [message["body"] for message in call.answers[1:]]


@pytest.mark.parametrize(
    ("replays", "is_interrupted", "is_complete", "outcome"),
    [
        (0, False, True, "completed"),
        (1, False, True, "replayed"),
        (0, True, True, "interrupted"),
        (2, True, True, "interrupted"),
        (1, True, False, "aborted"),
    ],
)
async def test_a_request_is_counted_by_how_it_ended(
    replays: int, is_interrupted: bool, is_complete: bool, outcome: str
) -> None:
    """What happened on the way, and whether the answer was complete, decides the label."""
    door = gate()

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        journey = passage.here()
        journey.replays, journey.is_interrupted = replays, is_interrupted
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": not is_complete})

    before = {each: counted(each) for each in metrics.OUTCOMES}
    door.open(answering)
    await Call().ask(door)

    after = {each: counted(each) for each in metrics.OUTCOMES}
    assert before | {outcome: before[outcome] + 1} == after


async def test_a_model_that_raises_leaves_nothing_in_flight() -> None:
    """The server hears of the error, and the request is counted as aborted."""
    door, before = gate(), counted("aborted")

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")

    door.open(failing)
    with pytest.raises(RuntimeError, match="a bug"):
        await Call().ask(door)

    assert 0 == door.in_flight
    assert before + 1 == counted("aborted")


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """A server that is torn down under a waiting request does not leave its place taken."""
    door = gate()

    async with waiting(door, Call()) as tasks:
        tasks[0].cancel()
        await asyncio.wait(tasks)

    assert (0, 0) == (door.held, door.in_flight)


async def test_requests_do_not_share_their_history() -> None:
    """What happened to one request is not counted for one that runs beside it."""
    door, together, before = gate(), asyncio.Barrier(2), counted("replayed")

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["body"] == b"unlucky":
            passage.here().replays = 1
        await together.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    door.open(answering)
    await asyncio.gather(Call(pieces=(b"unlucky",)).ask(door), Call(pieces=(b"lucky",)).ask(door))

    assert before + 1 == counted("replayed")


# Streams that wait.
STREAM = b'{"prompt": "x", "stream": true}'


def streaming_gate(**limits: Any) -> Gate:
    """A gate that keeps streams alive every fiftieth of a second."""
    return gate(stream_keep_alive_s=0.02, **limits)


async def until_comment(call: Call, number: int = 1) -> None:
    """Wait until so many comments have come."""
    for _ in range(2000):
        if call.body.count(b": waiting for the engine") >= number:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"no {number} comments came: {call.body!r}")


async def events_of_model(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as vLLM does when a stream is asked for."""
    assert STREAM == (await receive())["body"]
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def test_a_held_stream_is_kept_alive_and_goes_on_with_the_answer() -> None:
    """200 and comments while it waits, then the model's events, in one answer."""
    door, call, before = streaming_gate(), Call(pieces=(STREAM,)), counted("completed")

    async with waiting(door, call) as tasks:
        await until_comment(call, 2)
        door.open(events_of_model)
        await tasks[0]

    assert 200 == call.status
    assert call.head["content-type"].startswith("text/event-stream")
    assert 32 == len(call.head["x-request-id"])
    assert 1 == [message["type"] for message in call.answers].count("http.response.start")
    assert call.body.endswith(b"s\n\ndata: {}\n\ndata: [DONE]\n\n")
    assert before + 1 == counted("completed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(COMPLETIONS, b'{"prompt": "x"}', id="no stream asked for"),
        pytest.param(COMPLETIONS, b'{"stream": false}', id="no stream wanted"),
        pytest.param(COMPLETIONS, b'{"tools": {"stream": true}}', id="a stream elsewhere in the body"),
        pytest.param(COMPLETIONS, b'{"prompt": "\\"stream\\": true"}', id="a prompt about streams"),
        pytest.param(COMPLETIONS, b'{"stream": true', id="no JSON"),
        pytest.param(COMPLETIONS, b"", id="nothing"),
        pytest.param("/v1/embeddings", STREAM, id="a route without streams"),
    ],
)
async def test_only_a_stream_begins_before_its_answer(path: str, body: bytes) -> None:
    """Every other request gets the status and body that the model gives."""
    door, model, call = streaming_gate(), Model(), Call(path, pieces=(body,))

    async with waiting(door, call) as tasks:
        await asyncio.sleep(0.1)
        assert [] == call.answers
        door.open(model)
        await tasks[0]

    assert body == call.body


@pytest.mark.parametrize("end", ["late", "stopping"])
async def test_a_stream_that_has_begun_ends_with_the_refusal(end: str) -> None:
    """What would have been a 503 is an error event, then the end; it counts as rejected."""
    door = streaming_gate(max_queued=2, hold_timeout_s=0.2 if end == "late" else 30)
    calls = [Call(pieces=(STREAM,)) for _ in range(2)]
    before = counted("rejected")

    async with waiting(door, *calls) as tasks:
        await until_comment(calls[1])
        if end == "stopping":
            door.refuse("this instance is stopping.", 5)
        await asyncio.gather(*tasks)

    text = calls[1].body.rpartition(b"s\n\n")[2].decode()
    event, done = text.split("\n\n", 1)
    error = json.loads(event.removeprefix("data: "))["error"]
    assert ("engine_unavailable", "data: [DONE]\n\n") == (error["code"], done)
    assert not calls[1].answers[-1].get("more_body")
    assert before + 2 == counted("rejected")


@pytest.mark.parametrize("how", ["nothing", "stream", "middle of an event", "waits", "reads"])
async def test_a_request_has_an_end(how: str) -> None:
    """504 or an error event, as far as one can still be sent; the place inside is free, and the model hears of it."""
    door, was_told = gate(request_timeout_s=0.2, hold_timeout_s=30, max_queued=2), []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if how not in ("nothing", "reads"):
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            event = b"data: 1\n\n" if how == "stream" else b"data: "
            await send({"type": "http.response.body", "body": event, "more_body": True})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_told.append(how)
            raise

    if how != "waits":
        door.open(endless, 1)
    asked = Call("/v1/models", method="GET") if how == "reads" else Call(pieces=(STREAM,))
    call = await asyncio.wait_for(asked.ask(door), 30)

    if how in ("nothing", "waits", "reads"):
        assert (504, "request_timeout") == (call.status, call.error["code"])
        assert "server.request_timeout_s" in call.error["message"]
    elif how == "stream":
        assert call.body.startswith(b'data: 1\n\ndata: {"error":')
        assert b"server.request_timeout_s" in call.body
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert not call.answers[-1].get("more_body")
    else:
        assert b"data: " == call.body  # the server closes the connection: an answer that was cut, and looks so
    assert ([how] if how != "waits" else []) == was_told
    assert (0, 0, 0) == (door.in_flight, door.held, door._admission.inside)


async def test_a_client_that_leaves_a_held_stream_makes_room() -> None:
    """Comments do not hide that the client has gone."""
    door, call, before = streaming_gate(), Call(pieces=(STREAM,)), counted("aborted")

    async with waiting(door, call) as tasks:
        await until_comment(call)
        call.leaves.set()
        await tasks[0]

    assert (0, 0) == (door.held, door.in_flight)
    assert before + 1 == counted("aborted")
