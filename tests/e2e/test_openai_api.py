"""The OpenAI API with OpenAI's own client, and what is not part of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_serve.engine import openai_routes
from tests.daemon import MODEL_NAME, Daemon

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

HELLO: Any = [{"role": "user", "content": "Say hello."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_hot": {"type": "boolean"}},
    "required": ["city", "is_hot"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "strict": True, "parameters": SCHEMA},
}


@pytest.fixture
def client(shared: Daemon) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which must not paper over errors by trying again."""
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none-needed", max_retries=0, timeout=120) as client:
        yield client


def assert_is_error(body: Any, status: int) -> None:
    """An OpenAI error object and nothing else."""
    assert {"error"} == body.keys()
    assert {"message", "type", "param", "code"} == body["error"].keys()
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert body["error"]["code"] in (status, "not_found", "method_not_allowed", "invalid_json")


# ---- chat -------------------------------------------------------------------------------------------


def test_chat_answers_with_text_and_usage(client: openai.OpenAI) -> None:
    """A plain chat completion has a message, a reason for its end, and a count that adds up."""
    answer = client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=12, temperature=0)

    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 12


def test_the_model_answers_sensibly(client: openai.OpenAI) -> None:
    """Weights, tokenizer and chat template fit together: the capital of France comes out."""
    question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]

    answer = client.chat.completions.create(model=MODEL_NAME, messages=question, max_tokens=24, temperature=0)

    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_stream_adds_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    """The pieces of a stream, put together, are the answer that is given without one."""
    options: Any = {"model": MODEL_NAME, "messages": HELLO, "max_tokens": 16, "temperature": 0}

    plain = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(**options, stream=True))

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert plain.message.content == streamed
    assert [plain.finish_reason] == reasons


def test_include_usage_ends_a_stream_with_one_count(client: openai.OpenAI) -> None:
    """With stream_options the last chunk, and only that, has the usage and no choice."""
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME, messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )

    counted = [chunk for chunk in chunks if chunk.usage is not None]
    assert [chunks[-1]] == counted
    assert [] == chunks[-1].choices
    assert counted[0].usage is not None
    assert 5 >= counted[0].usage.completion_tokens > 0


def test_max_tokens_is_the_most_that_comes(client: openai.OpenAI) -> None:
    """An answer that would go on is cut after max_tokens and says so."""
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=3, extra_body={"ignore_eos": True}
    )

    assert 3 == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert "length" == answer.choices[0].finish_reason


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    """Sampling with a seed can be repeated, and another seed gives something else."""
    said = [
        client.chat.completions.create(
            model=MODEL_NAME, messages=HELLO, max_tokens=20, temperature=1.5, seed=seed, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .message.content
        for seed in (7, 7, 8)
    ]

    assert said[0] == said[1]
    assert said[0] != said[2]


def test_n_choices_come_with_their_own_index(client: openai.OpenAI) -> None:
    """n = 2 gives two choices for one prompt, which is counted once."""
    one, two = (
        client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=4, n=n, temperature=1.0)
        for n in (1, 2)
    )

    assert [0, 1] == sorted(choice.index for choice in two.choices)
    assert one.usage is not None
    assert two.usage is not None
    assert one.usage.prompt_tokens == two.usage.prompt_tokens


def test_chat_logprobs_name_the_likeliest_tokens(client: openai.OpenAI) -> None:
    """Each token comes with its log-probability and as many alternatives as were asked for."""
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )

    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokens)
    assert all(token.logprob <= 0 for token in tokens)
    assert [3] * len(tokens) == [len(token.top_logprobs) for token in tokens]


def test_json_schema_holds_the_answer_to_its_shape(client: openai.OpenAI) -> None:
    """response_format makes even a small model answer with JSON of the schema."""
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "Is it hot in Rome?"}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}},
    )

    value = json.loads(answer.choices[0].message.content or "")
    assert SCHEMA["properties"].keys() == value.keys()  # type: ignore[attr-defined]
    assert value["city"] in ("Paris", "Rome")
    assert isinstance(value["is_hot"], bool)


# ---- tools ------------------------------------------------------------------------------------------


def test_a_named_function_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    """tool_choice with a name gives one call of that function, whose arguments fit the schema."""
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
        temperature=0,
    )

    (call,) = answer.choices[0].message.tool_calls or []
    assert "function" == call.type
    assert "get_weather" == call.function.name
    assert SCHEMA["properties"].keys() == json.loads(call.function.arguments).keys()  # type: ignore[attr-defined]


def test_a_streamed_call_adds_up_to_valid_arguments(client: openai.OpenAI) -> None:
    """The pieces of a streamed call's arguments are JSON of the schema when put together."""
    chunks = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
        temperature=0,
        stream=True,
    )

    calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or []]
    assert ["get_weather"] == [call.function.name for call in calls if call.function and call.function.name]
    arguments = json.loads("".join(call.function.arguments or "" for call in calls if call.function))
    assert SCHEMA["properties"].keys() == arguments.keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_tools_are_accepted_without_being_forced(client: openai.OpenAI, choice: Any) -> None:
    """tool_choice none never calls; auto is the model's own decision; both are answered."""
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=12, temperature=0
    )

    message = answer.choices[0].message
    assert message.content or message.tool_calls
    assert choice == "auto" or not message.tool_calls


def test_the_result_of_a_call_can_be_sent_back(client: openai.OpenAI) -> None:
    """A conversation with a call and its result goes through the chat template."""
    conversation: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "Sunny, 20 degrees."},
    ]

    answer = client.chat.completions.create(model=MODEL_NAME, messages=conversation, tools=[WEATHER], max_tokens=8)

    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


# ---- completions, responses, models, tokens ---------------------------------------------------------


def test_a_completion_goes_on_from_its_prompt(client: openai.OpenAI) -> None:
    """The older endpoint answers as well, with echo and with log-probabilities."""
    answer = client.completions.create(
        model=MODEL_NAME, prompt="One, two, three,", max_tokens=6, temperature=0, echo=True, logprobs=2
    )

    assert answer.choices[0].text.startswith("One, two, three,")
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) > 6


def test_several_prompts_give_several_choices(client: openai.OpenAI) -> None:
    """A list of prompts is answered in its order."""
    answer = client.completions.create(model=MODEL_NAME, prompt=["One, two,", "A, B,"], max_tokens=3, temperature=0)

    assert [0, 1] == [choice.index for choice in answer.choices]


def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI) -> None:
    """The answer ends where the stop string would begin, with the reason stop."""
    options: Any = {"model": MODEL_NAME, "prompt": "One, two, three, four,", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**options).choices[0].text
    stop = re.findall(r"\w+", whole)[2]

    answer = client.completions.create(**options, stop=[stop]).choices[0]

    assert whole[: whole.index(stop)] == answer.text
    assert "stop" == answer.finish_reason


def test_a_streamed_completion_is_the_plain_one(client: openai.OpenAI) -> None:
    """Both forms of a completion give the same text."""
    options: Any = {"model": MODEL_NAME, "prompt": "One, two,", "max_tokens": 10, "temperature": 0}

    plain = client.completions.create(**options).choices[0].text
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**options, stream=True) if chunk.choices
    )

    assert plain == streamed


def test_a_response_has_text(client: openai.OpenAI) -> None:
    """The Responses API answers without a stream."""
    answer = client.responses.create(model=MODEL_NAME, input="Say hello.", max_output_tokens=10)

    assert answer.output_text
    assert answer.status in ("completed", "incomplete")
    assert answer.usage is not None
    assert 10 >= answer.usage.output_tokens > 0


def test_a_streamed_response_goes_from_created_to_its_end(client: openai.OpenAI) -> None:
    """The events of a response are numbered, begin with its creation and end with the whole of it."""
    events = list(client.responses.create(model=MODEL_NAME, input="Say hello.", max_output_tokens=10, stream=True))

    kinds = [event.type for event in events]
    assert "response.created" == kinds[0]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert list(range(len(events))) == [event.sequence_number for event in events]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == deltas  # type: ignore[union-attr]


def test_the_models_are_those_of_the_file(client: openai.OpenAI) -> None:
    """GET /v1/models names what served_model_name says, and its length."""
    (served,) = client.models.list().data

    assert MODEL_NAME == served.id
    assert 2048 == served.max_model_len  # type: ignore[attr-defined]


def test_tokens_there_and_back_are_the_text(shared: Daemon) -> None:
    """What /tokenize takes apart, /detokenize puts together."""
    text = "Grüße, 世界!"

    tokens = shared.http.post("/tokenize", json={"model": MODEL_NAME, "prompt": text}).raise_for_status().json()
    back = (
        shared.http.post("/detokenize", json={"model": MODEL_NAME, "tokens": tokens["tokens"]})
        .raise_for_status()
        .json()
    )

    assert tokens["count"] == len(tokens["tokens"])
    assert text == back["prompt"]


# ---- wrong requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "phrase"),
    [
        pytest.param({"messages": "hello"}, "list", id="messages are no list"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}, "temperature", id="no number"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, "temperature", id="below zero"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}, "max_tokens", id="negative max_tokens"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}, "2048", id="max_tokens too many"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "n": 0}, "n", id="no choice at all"),
        pytest.param({"messages": []}, "empty conversation", id="no message"),
        pytest.param({"messages": [{"role": "user", "content": "again " * 5000}]}, "2048", id="prompt too long"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "x"}}, "response_format", id="format"),
        pytest.param({"messages": [{"role": "user", "content": "x"}], "logit_bias": {"999999": 1}}, "logit_bias", id="no such token"),
        pytest.param({}, "messages", id="nothing"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_what_is_wrong(shared: Daemon, body: dict[str, Any], phrase: str) -> None:
    """A request that cannot be served is a 400 whose message names the matter, and harms nobody else."""
    answer = shared.http.post("/v1/chat/completions", json={"model": MODEL_NAME} | body)

    assert 400 == answer.status_code, answer.text
    assert_is_error(answer.json(), 400)
    assert phrase in answer.json()["error"]["message"]
    assert 200 == shared.chat(max_tokens=1).status_code


def test_a_body_that_is_no_json_is_refused(shared: Daemon) -> None:
    """Broken JSON is the client's mistake, not the server's."""
    answer = shared.http.post("/v1/chat/completions", content=b"{broken", headers={"content-type": "application/json"})

    assert 400 == answer.status_code
    assert_is_error(answer.json(), 400)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    """A model that is not served is a 404 that names those that are."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)

    assert "gpt-5" in caught.value.message
    assert MODEL_NAME in caught.value.message


def test_an_endpoint_that_the_model_cannot_serve_is_an_error_object(shared: Daemon) -> None:
    """Embeddings of a model that only generates are a 404 in OpenAI's form."""
    answer = shared.http.post("/v1/embeddings", json={"model": MODEL_NAME, "input": "x"})

    assert 404 == answer.status_code
    assert_is_error(answer.json(), 404)
    assert "/v1/embeddings" in answer.json()["error"]["message"]


# ---- what is not there ------------------------------------------------------------------------------


def routes_of_vllm(model: Path) -> list[tuple[str, str]]:
    """Every (method, path) that vLLM's own server has for a model that generates, in development mode too."""
    from vllm.entrypoints.launchers.app import build_app

    from llm_serve.core.plan import EnginePlan
    from llm_serve.engine import arguments

    plan = EnginePlan(model=str(model), arguments={"dtype": "bfloat16"}, env={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        args = arguments.parse_plan(plan, source="test")
        args.enable_tokenizer_info_endpoint = args.enable_offline_docs = True
        app = build_app(args, ("generate", "embed", "classify", "score", "transcription"), None)
    found = set()
    for route in app.routes:
        for method in getattr(route, "methods", None) or {"GET", "POST"}:
            found.add((method, getattr(route, "path", "/")))
    return sorted(found)


def test_nothing_of_vllm_answers_that_is_not_on_the_list(shared: Daemon, model: Path) -> None:
    """Every route of vLLM's own server is on the allow-list, or ours, or not there: 405 is for a path that is like ours."""
    ours = {"/health", "/metrics"}
    others = [
        (method, path)
        for method, path in routes_of_vllm(model)
        if path not in ours and path not in {allowed for _, allowed in openai_routes.allowed(anthropic_messages=True)}
    ]

    assert len(others) > 20
    answered = {}
    for method, path in others:
        answer = shared.http.request(method, re.sub(r"\{[^}]+\}", "x", path), json={})
        if answer.status_code not in (404, 405):
            answered[method, path] = answer.status_code
        elif method != "HEAD":
            assert_is_error(answer.json(), answer.status_code)
    assert {} == answered


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/chat/completions/",
        "//v1/models",
        "/v1/%6dodels/x",
        "/v1/../docs",
        "/V1/MODELS",
        "/v1/responses/a/b",
    ],
)
def test_a_path_that_is_nearly_one_of_ours_is_not_found(shared: Daemon, path: str) -> None:
    """Paths are compared exactly."""
    answer = shared.http.get(path)

    assert 404 == answer.status_code
    assert_is_error(answer.json(), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("PUT", "/tokenize", "POST"),
        ("DELETE", "/v1/responses/x", "GET"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("POST", "/livez", "GET, HEAD"),
        ("POST", "/status", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_names_the_right_one(shared: Daemon, method: str, path: str, allowed: str) -> None:
    """405 with an Allow header and an error object."""
    answer = shared.http.request(method, path)

    assert 405 == answer.status_code
    assert sorted(allowed.split(", ")) == sorted(answer.headers["allow"].split(", "))
    assert_is_error(answer.json(), 405)


# ---- names of requests ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/nowhere"])
def test_every_answer_has_a_request_id_of_its_own(shared: Daemon, path: str) -> None:
    """Without one in the request, each answer gets a new x-request-id."""
    first, second = (shared.http.get(path).headers["x-request-id"] for _ in range(2))

    assert re.fullmatch(r"[A-Za-z0-9-]{16,}", first)
    assert first != second


def test_the_clients_request_id_comes_back_and_names_the_answer(shared: Daemon) -> None:
    """A client's own id is echoed, and vLLM uses it for the answer's id."""
    answer = shared.chat(headers={"x-request-id": "mine-42"}, max_tokens=1)

    assert ["mine-42"] == answer.headers.get_list("x-request-id")
    assert "mine-42" in answer.json()["id"]


def test_a_request_id_that_could_forge_a_log_line_is_replaced(shared: Daemon) -> None:
    """An id with blanks or of great length is not repeated."""
    for given in ("two words", "x" * 200, 'a"b'):
        assert given != shared.http.get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"]


def test_no_answer_names_the_server_software_or_allows_other_origins(shared: Daemon) -> None:
    """A web page of somebody else cannot read answers, and no version is given away."""
    answer = shared.http.get("/v1/models", headers={"origin": "https://example.com"})

    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers
