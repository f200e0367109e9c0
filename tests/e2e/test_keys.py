"""Who may come in, and what is never written down."""

from __future__ import annotations

import openai
import pytest

from tests.browser import browser, executable
from tests.daemon import MODEL_NAME, Daemon, Tables, eventually
from tests.e2e.conftest import Stage

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

FIRST, SECOND, WRONG = "first-key-7f3a9c", "second-key-b81d2e", "wrong-key-55aa01"
MARKER = "Xylophonquartz"
IS_HIDDEN = "document.querySelector('main').hidden"


@pytest.fixture(scope="session")
def keyed_tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A server with two keys that logs as much as it can."""
    keys = tmp_path_factory.mktemp("keys") / "tiny.keys"
    keys.write_text(f"# two clients\n{FIRST}\n{SECOND}\n")
    keys.chmod(0o600)
    return {"server": {"api_keys": str(keys), "anthropic_messages": True}, "log": {"level": "debug"}}


@pytest.fixture
def keyed(stage: Stage, keyed_tables: Tables) -> Daemon:
    """A ready daemon with keys."""
    return stage.reuse(keyed_tables)


@pytest.mark.parametrize("key", [FIRST, SECOND])
def test_each_key_opens_the_api(keyed: Daemon, key: str) -> None:
    """Any of the keys will do, as OpenAI's client sends it."""
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
        assert [MODEL_NAME] == [model.id for model in client.models.list().data]


def test_a_wrong_key_is_an_authentication_error(keyed: Daemon) -> None:
    """OpenAI's client knows the refusal for what it is."""
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=WRONG, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()

    assert "invalid_api_key" == caught.value.code
    assert WRONG not in str(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"authorization": ""}, id="empty"),
        pytest.param({"authorization": "Bearer"}, id="no token"),
        pytest.param({"authorization": f"Bearer {FIRST}x"}, id="too long"),
        pytest.param({"authorization": f"Bearer {FIRST[:-1]}"}, id="too short"),
        pytest.param({"authorization": f"Bearer {FIRST.upper()}"}, id="other case"),
        pytest.param({"authorization": f"Basic {FIRST}"}, id="other scheme"),
        pytest.param({"authorization": f"Bearer {FIRST} {SECOND}"}, id="two at once"),
        pytest.param({"x-api-key": WRONG}, id="wrong x-api-key"),
        pytest.param({"cookie": f"api_key={FIRST}"}, id="cookie"),
    ],
)
def test_without_a_right_key_nobody_comes_in(keyed: Daemon, headers: dict[str, str]) -> None:
    """401 as an OpenAI error that says how a key is sent."""
    answer = keyed.http.get("/v1/models", headers=headers)

    assert 401 == answer.status_code
    assert "Bearer" == answer.headers["www-authenticate"]
    assert {"message", "type", "param", "code"} == answer.json()["error"].keys()
    assert "Authorization: Bearer" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/nowhere", "/docs", "/v1/messages"])
def test_a_stranger_does_not_learn_what_is_there(keyed: Daemon, path: str) -> None:
    """Without a key, paths that exist and paths that do not look the same."""
    assert 401 == keyed.http.post(path, json={}).status_code


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 200), ("/health", 200), ("/status", 401), ("/metrics", 401)])  # fmt: skip
def test_only_the_probes_are_open(keyed: Daemon, path: str, status: int) -> None:
    """Probes have no key; what tells about the instance needs one."""
    assert status == keyed.http.get(path).status_code
    assert 200 == keyed.http.get(path, headers={"authorization": f"Bearer {SECOND}"}).status_code


@pytest.mark.skipif(executable() is None, reason="no chromium here (packaging/test-tools installs it)")
async def test_the_page_asks_for_a_key(keyed: Daemon) -> None:
    """A wrong one is refused; a right one is kept in the tab alone, until it is forgotten, and is part of no address."""
    async with browser() as page:
        await page.open(f"{keyed.url}/")
        await page.until("!document.querySelector('#door').hidden")
        await page.type(WRONG)
        await page.until("document.querySelector('#door-word').textContent.includes('not valid')")
        assert [True, ""] == [await page.run(IS_HIDDEN), await page.text("#figures")]

        await page.type(FIRST)
        await page.until("document.querySelector('#door').hidden")
        assert "Serving" == await page.text("#state")
        assert "" == await page.run("document.cookie")
        assert [0, FIRST] == await page.run("[localStorage.length, sessionStorage.getItem('llm-serve-key')]")
        assert [] == [url for url in page.requested if FIRST in url or WRONG in url]

        await page.run_until_loaded("document.querySelector('#forget').click()")
        await page.until(
            "document.querySelector('#figures').innerText === '' && !document.querySelector('#door').hidden"
        )
        assert [True, 0] == [await page.run(IS_HIDDEN), await page.run("sessionStorage.length")]


def test_x_api_key_is_a_key_too(keyed: Daemon) -> None:
    """Anthropic's clients send it under that name."""
    assert 200 == keyed.http.get("/v1/models", headers={"x-api-key": FIRST}).status_code


def test_neither_keys_nor_prompts_nor_answers_are_logged(keyed: Daemon) -> None:
    """At level debug, with requests of every kind, right and wrong, the log holds no word of them."""
    right = {"authorization": f"Bearer {FIRST}"}
    chat = {"model": MODEL_NAME, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 4}
    plain = {"model": MODEL_NAME, "prompt": MARKER, "max_tokens": 4}
    requests = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/chat/completions", chat | {"messages": MARKER}),
        ("/v1/chat/completions", chat | {"temperature": MARKER}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": f"{MARKER} " * 3000}]}),
        ("/v1/chat/completions", chat | {"model": "somebody-else"}),
        ("/v1/chat/completions", chat | {"stop": [MARKER]}),
        ("/v1/chat/completions", chat | {"chat_template": "{{ " + MARKER + "() }}"}),
        ("/v1/chat/completions", chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": MARKER}}}}),
        ("/v1/completions", plain | {"echo": True}),
        ("/v1/completions", plain | {"stream": True}),
        ("/v1/completions", plain | {"max_tokens": -1}),
        ("/v1/responses", {"model": MODEL_NAME, "input": MARKER, "max_output_tokens": 4}),
        ("/v1/messages", {"model": MODEL_NAME, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 4}),
        ("/tokenize", {"model": MODEL_NAME, "prompt": MARKER}),
        (f"/v1/nothing?q={MARKER}", {}),
    ]  # fmt: skip

    statuses = [keyed.http.post(path, json=body, headers=right).status_code for path, body in requests]
    for key in (WRONG, FIRST):
        keyed.http.get("/v1/models", headers={"x-api-key": key})

    assert 500 > max(statuses), statuses
    eventually(keyed.log, lambda log: log.count("/v1/responses") > 0, within_s=10, what="the log")
    lines = keyed.log().splitlines()
    assert [] == [line for line in lines if MARKER in line]
    assert [] == [line for line in lines if any(key in line for key in (FIRST, SECOND, WRONG))]


def test_open_metrics_need_no_key(daemon: object, keyed_tables: Tables) -> None:
    """open_metrics lets a scraper in without a key, from the first second, and nobody else."""
    tables = dict(keyed_tables) | {"server": dict(keyed_tables["server"]) | {"open_metrics": True}}
    opened = daemon(tables).wait_for_answers()  # type: ignore[operator]

    assert 200 == opened.http.get("/metrics").status_code
    assert 401 == opened.http.get("/status").status_code
