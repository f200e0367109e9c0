"""Who waits before the door for an engine or for room in it, and what ends the wait."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from llm_serve.core.admission import Load, reserve
from llm_serve.web.asgi import Message, Receive, Scope, Send
from llm_serve.web.gate import Gate
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits
from tests.doors import COMPLETIONS, KEY, Call, Model, counted, gate, open_gate, until, waiting


# Waiting.
async def test_a_held_request_is_answered_when_the_gate_opens() -> None:
    """Requests that came too early wait, and are then served as if nothing had been."""
    door, model, before = gate(), Model(), counted("completed")
    calls = [Call(pieces=(b"first",)), Call(pieces=(b"second",))]

    async with waiting(door, *calls) as tasks:
        assert 2.0 == REGISTRY.get_sample_value("llm_serve_requests_held")
        door.open(model)
        await asyncio.gather(*tasks)

    assert [b"first", b"second"] == [call.body for call in calls]
    assert (0, 0, 0.0) == (door.held, door.in_flight, REGISTRY.get_sample_value("llm_serve_requests_held"))
    assert before + 2 == counted("completed")


@pytest.mark.parametrize(
    "pieces", [(b"",), (b"x" * 100_000,), (b"a", b"b", b"", b"c"), tuple(b"%d" % n for n in range(500))]
)
async def test_a_body_survives_the_wait(pieces: tuple[bytes, ...]) -> None:
    """What was read ahead while waiting reaches the model whole and in order."""
    door, model = gate(), Model()
    call = Call(pieces=pieces)

    async with waiting(door, call) as tasks:
        for _ in range(len(pieces) + 5):
            await asyncio.sleep(0)
        door.open(model)
        await tasks[0]

    assert [(COMPLETIONS, b"".join(pieces))] == model.seen


async def test_a_body_that_is_still_on_its_way_takes_no_place() -> None:
    """Neither in the queue nor in the engine: whoever sends half a request keeps nobody else from either."""
    door, model, rest, answers = gate(), Model(), asyncio.Queue[Message](), list[Message]()
    rest.put_nowait({"type": "http.request", "body": b"one ", "more_body": True})
    scope: Scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}

    async def send(message: Message) -> None:
        answers.append(message)

    task = asyncio.create_task(door(scope, rest.get, send))
    await until(lambda: not rest.qsize())
    door.open(model, slots=1)
    assert (0, 0, 1) == (door.held, door._admission.inside, door.in_flight)
    rest.put_nowait({"type": "http.request", "body": b"two", "more_body": False})
    await task

    assert [(COMPLETIONS, b"one two")] == model.seen
    assert 200 == answers[0]["status"]


async def test_the_model_learns_of_a_client_that_leaves_after_the_wait() -> None:
    """The disconnect still reaches the application through what was read ahead."""
    door, heard = gate(), asyncio.Event()

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        heard.set()

    call, before = Call(), counted("aborted")
    async with waiting(door, call) as tasks:
        door.open(listening)
        await asyncio.sleep(0)
        call.leaves.set()
        await tasks[0]

    assert heard.is_set()
    assert before + 1 == counted("aborted")


async def test_a_client_that_leaves_while_it_waits_makes_room() -> None:
    """Its place is free at once, nothing is answered, and it counts as aborted."""
    door, call, before = gate(max_queued=1), Call(), counted("aborted")

    async with waiting(door, call) as tasks:
        call.leaves.set()
        await tasks[0]

    assert ([], 0, 0) == (call.answers, door.held, door.in_flight)
    assert before + 1 == counted("aborted")


async def test_waiting_has_an_end() -> None:
    """After hold_timeout_s the client is told to come back; nothing is left over."""
    door, before = gate(hold_timeout_s=0), counted("rejected")

    call = await Call().ask(door)

    assert (503, "10", "engine_unavailable") == (call.status, call.head["retry-after"], call.error["code"])
    assert "server.hold_timeout_s" in call.error["message"]
    assert (0, 0) == (door.held, door.in_flight)
    assert before + 1 == counted("rejected")


async def test_the_queue_has_an_end() -> None:
    """One request more than max_queued is refused at once; those that wait go on waiting."""
    door, model = gate(max_queued=2), Model()
    calls = [Call(), Call()]

    async with waiting(door, *calls) as tasks:
        refused = await Call().ask(door)
        door.open(model)
        await asyncio.gather(*tasks)

    assert (503, "10") == (refused.status, refused.head["retry-after"])
    assert "server.max_queued" in refused.error["message"]
    assert "connection" not in refused.head
    assert [200, 200] == [call.status for call in calls]


async def test_no_queue_at_all_is_possible() -> None:
    """max_queued = 0 refuses whatever meets a closed gate."""
    assert 503 == (await Call().ask(gate(max_queued=0))).status


async def test_holding_again_makes_new_requests_wait() -> None:
    """After an engine's death the gate holds; a request that was let through goes on."""
    door, model = open_gate()
    model.go_on.clear()
    running = asyncio.create_task(Call(pieces=(b"a",)).ask(door))
    await until(lambda: model.seen)

    door.hold()
    async with waiting(door, Call(pieces=(b"b",))) as tasks:
        model.go_on.set()
        assert b"a" == (await running).body
        assert not tasks[0].done()
        door.open(model)
        assert b"b" == (await tasks[0]).body


async def test_other_keys_and_limits_count_from_the_next_request() -> None:
    """After a reload of the file the old key is worth nothing, and as many may wait as it says then."""
    door = gate(["left"], max_queued=0)
    before = await Call(headers=KEY).ask(door)
    door.reconfigure(Keys(["right"]), Limits(max_queued=1, hold_timeout_s=30.0), open_metrics=True)

    async with waiting(door, Call(headers=KEY)):
        full = await Call(headers=KEY).ask(door)
        gone, scraped = (
            await Call(headers={"authorization": "Bearer left"}).ask(door),
            await Call("/metrics", "GET").ask(door),
        )
        assert (401, 503, 401, 200) == (before.status, full.status, gone.status, scraped.status)
        assert 1 == door.held


async def test_refusing_wakes_those_who_wait() -> None:
    """At the end nobody is left waiting, and nobody new is let in."""
    door, call = gate(), Call()

    async with waiting(door, call) as tasks:
        door.refuse("this instance is stopping.", 5)
        await tasks[0]
    late = await Call().ask(door)

    for refused in (call, late):
        assert (503, "5", "close") == (refused.status, refused.head["retry-after"], refused.head["connection"])
        assert "this instance is stopping." == refused.error["message"]


async def test_refusing_lets_running_requests_end() -> None:
    """A drain cuts nothing that has been let through; reading the list of models stays possible."""
    door, model = open_gate()
    model.go_on.clear()
    running = asyncio.create_task(Call(pieces=(b"a",)).ask(door))
    await until(lambda: model.seen)

    door.refuse("this instance is stopping.", 5)
    assert 1 == door.in_flight
    model.go_on.set()

    assert b"a" == (await running).body
    assert 200 == (await Call("/v1/models", "GET").ask(door)).status
    assert 0 == door.in_flight


# Room in the engine.
async def fill(door: Gate, model: Model, slots: int) -> list[asyncio.Task[Call]]:
    """As many requests as an engine of so many slots is given, all of them still running."""
    model.go_on.clear()
    door.open(model, slots)
    most = slots + reserve(slots)
    for _ in range(most):
        door.note(Load())
    running = [asyncio.create_task(Call(pieces=(b"%d" % number,)).ask(door)) for number in range(most)]
    await until(lambda: len(model.seen) == most)
    return running


async def test_what_the_engine_cannot_take_waits_at_the_gate() -> None:
    """A full batch and its reserve go in; the next one goes in when one of those has ended."""
    door, model = gate(), Model()
    running = await fill(door, model, 4)

    async with waiting(door, Call(pieces=(b"next",))) as tasks:
        door.note(Load(4, 2, 0.5))
        assert 1 == door.held
        model.go_on.set()
        await asyncio.gather(*running, *tasks)

    assert (COMPLETIONS, b"next") == model.seen[-1]
    assert (0, 0) == (door.held, door.in_flight)


async def test_a_step_of_the_engine_can_make_room() -> None:
    """The engine had more sequences than requests; when it says that they are gone, the queue moves."""
    door, model = gate(), Model()
    model.go_on.clear()
    door.open(model, 4)
    running = asyncio.create_task(Call().ask(door))
    await until(lambda: model.seen)
    door.note(Load(30, 0, 0.5))

    async with waiting(door, Call(pieces=(b"next",))) as tasks:
        door.note(Load(1, 0, 0.1))
        await until(lambda: len(model.seen) == 2)
        model.go_on.set()
        await asyncio.gather(running, *tasks)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/responses/r1/cancel", "/v1/messages/count_tokens"])
async def test_what_needs_no_engine_does_not_wait_for_one(path: str) -> None:
    """A full engine, or none after the first, is no reason to keep back what the handlers answer themselves."""
    door, model = gate(), Model()
    running = await fill(door, model, 1)
    model.go_on.set()
    asked = await Call(path).ask(door)
    door.hold()
    held = await Call(path).ask(door)
    await asyncio.gather(*running)

    assert [200, 200] == [asked.status, held.status]


async def test_keys_share_the_engine() -> None:
    """One key's crowd delays another key's request by one of its own, not by all."""
    door, model = gate(["many", "few"], max_queued=10), Model()
    crowd = [Call(headers={"x-api-key": "many"}, pieces=(b"many%d" % number,)) for number in range(4)]
    calls = [*crowd, Call(headers={"x-api-key": "few"}, pieces=(b"few",))]

    async with waiting(door, *calls) as tasks:
        door.open(model)
        await asyncio.gather(*tasks)

    assert [b"many0", b"few", b"many1", b"many2", b"many3"] == [body for _, body in model.seen]


async def test_without_keys_addresses_share_the_engine() -> None:
    """An instance without keys tells clients apart by where they are."""
    door, model = gate(max_queued=10), Model()
    calls = [Call(pieces=(b"%d" % number,), client="10.0.0.1") for number in range(3)]
    calls.append(Call(pieces=(b"other",), client="10.0.0.2"))

    async with waiting(door, *calls) as tasks:
        door.open(model)
        await asyncio.gather(*tasks)

    assert [b"0", b"other", b"1", b"2"] == [body for _, body in model.seen]


async def test_a_key_that_floods_the_queue_leaves_room_for_another() -> None:
    """The crowd of one key is refused before the queue is full; another key's request still finds a place."""
    door, model, before = gate(["many", "few"], max_queued=5), Model(), counted("rejected")
    crowd = [Call(headers={"x-api-key": "many"}, pieces=(b"%d" % number,)) for number in range(4)]

    async with waiting(door, *crowd) as tasks:
        assert 503 == (await Call(headers={"x-api-key": "many"}).ask(door)).status
        few = asyncio.create_task(Call(headers={"x-api-key": "few"}, pieces=(b"few",)).ask(door))
        await until(lambda: door.held == 5)
        door.open(model)
        await asyncio.gather(*tasks, few)

    assert {b"0", b"few", b"1", b"2", b"3"} == {body for _, body in model.seen}
    assert before + 1 == counted("rejected")


async def test_a_crowd_is_served_in_its_order() -> None:
    """A hundred who wait reach the model in the order in which they came, a few at a time."""
    door, model, most = gate(max_queued=150), Model(), 0

    async def watching(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal most
        most = max(most, door.in_flight - door.held)
        await model(scope, receive, send)

    calls = [Call(pieces=(b"%03d" % number,)) for number in range(100)]
    async with waiting(door, *calls) as tasks:
        door.open(watching, 8)
        await asyncio.gather(*tasks)

    assert sorted(body for _, body in model.seen) == [body for _, body in model.seen]
    assert 100 == len(model.seen)
    assert most <= 8 + reserve(8)


async def test_a_request_that_is_let_in_at_once_costs_one_task() -> None:
    """With nothing to wait for, the request runs in the server's own task, beside the look for its client's end."""
    door, tasks = gate(), list[int]()

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(len(asyncio.all_tasks()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    door.open(counting, 4)
    before = len(asyncio.all_tasks())
    await Call().ask(door)

    assert [before + 1] == tasks
    await until(lambda: before == len(asyncio.all_tasks()))


@pytest.mark.parametrize("how", ["cancelled", "raises"])
async def test_a_place_inside_is_given_back(how: str) -> None:
    """However a request ends, the next one gets its place."""
    door, reached = gate(), asyncio.Event()

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        reached.set()
        await asyncio.sleep(0 if how == "raises" else 60)
        raise RuntimeError("a bug")

    door.open(failing, 1)
    for _ in range(10):
        reached.clear()
        task = asyncio.create_task(Call().ask(door))
        await reached.wait()
        if how == "cancelled":
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() or isinstance(task.exception(), RuntimeError)

    door.open(Model(), 1)
    assert 200 == (await Call().ask(door)).status


async def test_retry_after_is_what_it_took_before() -> None:
    """After one start that took two seconds, a full queue at the next death says two seconds."""
    door, model = gate(max_queued=0), Model()
    door._closed_at = (door._closed_at or 0.0) - 2.0
    door.open(model)
    door.hold()

    refused = await Call().ask(door)

    assert refused.head["retry-after"] in {"2", "3"}  # rounded up, and this test takes time too
