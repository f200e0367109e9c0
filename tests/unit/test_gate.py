"""The door before the model: keys, paths, waiting, refusing, and bodies and streams that pass unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import REGISTRY

from llm_serve import metrics, passage
from llm_serve.core.admission import Load, reserve
from llm_serve.core.edge import Edge
from llm_serve.core.hosts import Hosts
from llm_serve.core.settings import LimitSettings
from llm_serve.core.status import Snapshot
from llm_serve.engine.openai_routes import allowed
from llm_serve.web import hold, operations
from llm_serve.web.asgi import Message, Receive, Scope, Send
from llm_serve.web.gate import Gate
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits

COMPLETIONS = "/v1/completions"
KEY = {"authorization": "Bearer right"}


@dataclass
class Call:
    """One client: its request in pieces, and what came back."""

    path: str = COMPLETIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] = (b"{}",)
    answers: list[Message] = field(default_factory=list)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    client: str = "127.0.0.1"

    async def ask(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> Call:
        """Send the request and keep the answer."""
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers,
            "client": (self.client, 1),
            "server": ("127.0.0.1", 8000),
        }
        await app(scope, self._receive_from(list(self.pieces)), self._send)
        return self

    def _receive_from(self, rest: list[bytes]) -> Receive:
        async def receive() -> Message:
            if rest:
                piece = rest.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(rest)}
            await self.leaves.wait()
            return {"type": "http.disconnect"}

        return receive

    async def _send(self, message: Message) -> None:
        self.answers.append(message)

    @property
    def status(self) -> int:
        """The status of the answer."""
        return int(self.answers[0]["status"])

    @property
    def head(self) -> dict[str, str]:
        """The headers of the answer."""
        return {name.decode(): value.decode() for name, value in self.answers[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The body of the answer."""
        return b"".join(message.get("body", b"") for message in self.answers[1:])

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the answer."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Model:
    """Stands for vLLM's application: answers with the body that it was sent, in pieces."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.ids: list[bytes] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then answer."""
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body += message["body"]
            more = message["more_body"]
        self.seen.append((scope["path"], body))
        self.ids.append(dict(scope["headers"])[b"x-request-id"])
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"inner")]})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})


def snapshot() -> Snapshot:
    """An instance that is starting."""
    return Snapshot(
        instance="a",
        model="m",
        state="starting",
        why="w",
        since=0.0,
        started=0.0,
        uptime_s=0.0,
        phase="loading weights",
        progress=0.4,
        version="1",
        vllm_version="0.32.0",
        pid=1,
        listen="127.0.0.1:8000",
        source="a.toml",
    )


def gate(keys: Iterable[str] = (), *, open_metrics: bool = False, **limits: Any) -> Gate:
    """A gate that holds, as at the start of a daemon."""
    return Gate(
        keys=Keys(keys),
        limits=Limits(**({"max_queued": 2, "hold_timeout_s": 30.0} | limits)),
        routes=allowed(anthropic_messages=True),
        operations=operations.create(snapshot, ("qwen",)),
        open_metrics=open_metrics,
    )


def open_gate(keys: Iterable[str] = ()) -> tuple[Gate, Model]:
    """A gate that lets through, and the model behind it."""
    door, model = gate(keys), Model()
    door.open(model)
    return door, model


def counted(outcome: str) -> float:
    """Requests that have ended like this."""
    return REGISTRY.get_sample_value("llm_serve_requests_total", {"outcome": outcome}) or 0.0


async def until(is_so: Callable[[], object]) -> None:
    """Let the loop turn until something is so, which is a matter of turns, not of time."""
    for _ in range(10_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it has not become so")


@contextlib.asynccontextmanager
async def waiting(door: Gate, *calls: Call) -> AsyncIterator[list[asyncio.Task[Call]]]:
    """Calls that wait at the gate."""
    tasks = [asyncio.create_task(call.ask(door)) for call in calls]
    await until(lambda: door.held == len(calls))
    yield tasks
    for call in calls:
        call.leaves.set()


# Who may come in.
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "right"}, 401),
        ({"authorization": "Basic right"}, 401),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": "Bearer wrong", "x-api-key": "right"}, 401),
        ({"authorization": "Bearer right"}, 200),
        ({"AUTHORIZATION": "bearer  right "}, 200),
        ({"Authorization": "BEARER second"}, 200),
        ({"X-Api-Key": "right"}, 200),
        ({"authorization": "Basic dTpw", "x-api-key": "second"}, 200),
    ],
)
async def test_a_request_needs_one_of_the_keys(headers: dict[str, str], status: int) -> None:
    """Any of the keys opens, as a bearer token or as x-api-key, and nothing else does."""
    door, _ = open_gate(["right", "second"])

    call = await Call(headers=headers).ask(door)

    assert status == call.status


async def test_a_refused_key_is_an_openai_error() -> None:
    """401 says what is needed, in the form that clients parse, and leaves nothing running."""
    door, model = open_gate(["right"])

    call = await Call().ask(door)

    assert ("authentication_error", "invalid_api_key") == (call.error["type"], call.error["code"])
    assert "Bearer" == call.head["www-authenticate"]
    assert (0, []) == (door.in_flight, model.seen)


async def test_without_keys_everybody_may_come_in() -> None:
    """An instance on loopback without a key file asks nobody."""
    door, _ = open_gate()

    assert 200 == (await Call(headers={"authorization": "Bearer any"}).ask(door)).status


@pytest.mark.parametrize(
    ("path", "open_metrics", "status"),
    [
        ("/livez", False, 200),
        ("/readyz", False, 503),
        ("/health", False, 503),
        ("/status", False, 401),
        ("/metrics", False, 401),
        ("/metrics", True, 200),
        ("/status", True, 401),
        ("/v1/models", True, 401),
        ("/nothing", True, 401),
    ],
)
async def test_only_probes_are_open_without_a_key(path: str, open_metrics: bool, status: int) -> None:
    """/livez and /readyz tell nothing that is worth a key; /metrics only when the file says so."""
    call = await Call(path, "GET").ask(gate(["right"], open_metrics=open_metrics))

    assert status == call.status


def test_a_wrong_key_is_compared_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the answer does not tell which key was nearly right."""
    compared: list[bytes] = []

    def compare(_: bytes, known: bytes) -> bool:
        compared.append(known)
        return True

    monkeypatch.setattr("llm_serve.web.keys.hmac.compare_digest", compare)

    assert Keys(["a", "b", "c"]).holder({b"x-api-key": b"a"}, None)
    assert 3 == len(set(compared))


# Which paths there are.
@pytest.mark.parametrize(
    "path",
    [
        "",
        "*",
        "//v1/models",
        "/v1/models/",
        "/v1/models\n",
        "/v1//models",
        "/v1/../metrics",
        "/v1/%6dodels",
        "/V1/models",
        "/v1/models;a",
        "/livez/",
        "//livez",
        "/metrics/../v1/completions",
        "/docs",
        "/openapi.json",
        "/v1/responses",
        "/v1/responses/a/b",
        "/v1/responses//cancel",
        "/sleep",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/load_lora_adapter",
        "/v1/messages/batches",
        "\u0000",
        "/v1/completions\u2028",
    ],
)
async def test_what_is_not_on_the_list_is_not_there(path: str) -> None:
    """Tricks with slashes, case, dots and escapes meet 404 or 405, never the model."""
    door, model = open_gate()

    call = await Call(path, "GET", {"host": "\x7f evil.example/v1"}).ask(door)

    assert call.status == (405 if path == "/v1/responses" else 404)
    assert "error" in json.loads(call.body)
    assert [] == model.seen


@pytest.mark.parametrize("host", ["", "evil.example", "a b", "[::1", "localhost:99999", "x" * 5000])
async def test_the_host_header_decides_nothing(host: str) -> None:
    """Whatever a client calls us, the path is what is asked for."""
    door, _ = open_gate(["right"])

    assert 200 == (await Call("/livez", "GET", {"host": host}).ask(door)).status
    assert 401 == (await Call(COMPLETIONS, "POST", {"host": host}).ask(door)).status


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        (COMPLETIONS, "GET", "POST"),
        (COMPLETIONS, "DELETE", "POST"),
        ("/v1/models", "POST", "GET"),
        ("/v1/responses/r1", "POST", "GET"),
        ("/livez", "POST", "GET, HEAD"),
        ("/metrics", "PUT", "GET, HEAD"),
        ("/status", "get", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
async def test_a_wrong_method_is_told_the_right_one(path: str, method: str, allow: str, is_open: bool) -> None:
    """405 carries Allow and an OpenAI error, with an engine and without."""
    door = open_gate()[0] if is_open else gate()

    call = await Call(path, method).ask(door)

    assert (405, allow, "method_not_allowed") == (call.status, call.head["allow"], call.error["code"])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/status", "/metrics"])
async def test_operations_answer_head_as_get(path: str) -> None:
    """A probe that asks for the head alone gets the status that GET has."""
    statuses = {(await Call(path, method).ask(gate())).status for method in ("GET", "HEAD")}

    assert {503 if path in {"/readyz", "/health"} else 200} == statuses


async def test_models_are_listed_before_there_is_an_engine() -> None:
    """/v1/models answers with the names of the file, and later with what the model says."""
    door, model = gate(), Model()

    early = await Call("/v1/models", "GET").ask(door)
    door.open(model)
    await Call("/v1/models", "GET").ask(door)

    assert ["qwen"] == [each["id"] for each in json.loads(early.body)["data"]]
    assert [("/v1/models", b"{}")] == model.seen


async def test_readiness_tells_how_far_the_start_has_come() -> None:
    """503 of /readyz has the state, the phase and when to ask again."""
    call = await Call("/readyz", "GET").ask(gate())

    assert {
        "state": "starting",
        "phase": "loading weights",
        "progress": 0.4,
        "why": "w",
        "is_drained": False,
    } == json.loads(call.body)
    assert "5" == call.head["retry-after"]


# The request's name.
@pytest.mark.parametrize("name", ["abc", "a.b:c_d-1", "x" * 128])
async def test_a_plain_request_id_is_kept(name: str) -> None:
    """The client's own id comes back, and is the one that the model sees."""
    door, model = open_gate()

    call = await Call(headers={"X-Request-ID": name}).ask(door)

    assert name == call.head["x-request-id"]
    assert [name.encode()] == model.ids


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "a\x1b[31m", "é", "<script>", "a\n"])
async def test_an_odd_request_id_is_replaced(name: str) -> None:
    """What could break a log line or a header is not taken over; the model sees the new one too."""
    door, model = open_gate()

    call = await Call(headers={"x-request-id": name}).ask(door)

    given = call.head["x-request-id"]
    assert 32 == len(given)
    assert [given.encode()] == model.ids


@pytest.mark.parametrize("path", ["/livez", "/nothing", COMPLETIONS])
async def test_every_answer_has_one_request_id(path: str) -> None:
    """Whoever answers, the header is there once; the model's own is replaced."""
    door, _ = open_gate(["right"])

    for headers in ({}, KEY):
        call = await Call(path, headers=dict(headers)).ask(door)
        assert 1 == [name for name, _ in call.answers[0]["headers"]].count(b"x-request-id")


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


async def test_a_request_that_is_let_in_at_once_costs_no_task() -> None:
    """With nothing to wait for, the request runs in the server's own task alone."""
    door, tasks = gate(), list[int]()

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(len(asyncio.all_tasks()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    door.open(counting, 4)
    before = len(asyncio.all_tasks())
    await Call().ask(door)

    assert [before] == tasks


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


@pytest.mark.parametrize("how", ["nothing", "stream", "middle of an event", "waits"])
async def test_a_request_has_an_end(how: str) -> None:
    """504 or an error event, as far as one can still be sent; the place inside is free, and the model hears of it."""
    door, was_told = gate(request_timeout_s=0.2, hold_timeout_s=30, max_queued=2), []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if how != "nothing":
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
    call = await asyncio.wait_for(Call(pieces=(STREAM,)).ask(door), 30)

    if how in ("nothing", "waits"):
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


# By which name we are called.
@pytest.mark.parametrize("path", ["/", "/livez", "/status", "/v1/models", COMPLETIONS, "/nothing"])
async def test_a_foreign_name_is_refused_on_every_path(path: str) -> None:
    """A web page whose name was made to point here gets 421, whatever it asks for."""
    door, model = gate(), Model()
    door.open(model)
    door.reconfigure(Keys(()), Limits(1, 1.0), open_metrics=True, hosts=Hosts(frozenset()))

    foreign = await Call(path, headers={"host": "evil.example:8000"}).ask(door)
    own = await Call(path, headers={"host": "localhost:8000"}).ask(door)

    assert (421, "unknown_host") == (foreign.status, foreign.error["code"])
    assert "server.hosts" in foreign.error["message"]
    assert own.status != 421
    assert len(model.seen) == (path == COMPLETIONS)
