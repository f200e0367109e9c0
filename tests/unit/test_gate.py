"""The door before the model: keys, paths, and by which name we are called."""

from __future__ import annotations

import json

import pytest

from llm_serve.core.hosts import Hosts
from llm_serve.web.keys import Keys
from llm_serve.web.limits import Limits
from tests.doors import COMPLETIONS, KEY, Call, Model, gate, open_gate


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
