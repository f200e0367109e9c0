"""`llm-serve bench` as a process, against a server in this one: what it prints, and its exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_serve
from tests.sse_server import MODEL_NAME, Behaviour, serve

_ENTRY = "from llm_serve.cli.main import main; main()"
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(llm_serve.__file__).parents[1]), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def behaviour() -> Behaviour:
    """A server with four places, 20 tokens a second in each: nothing that a slow machine could not do."""
    return Behaviour(token_s=0.05, slots=4)


@pytest.fixture(scope="module")
def url(behaviour: Behaviour) -> Iterator[str]:
    """The server, in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    address, end = asyncio.run_coroutine_threadsafe(serve(behaviour), loop).result(10)
    yield address
    asyncio.run_coroutine_threadsafe(_awaited(end), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _awaited(end: Any) -> None:
    await end()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for answers that take half a second."""
    file = tmp_path_factory.mktemp("prompts") / "short.txt"
    file.write_text("".join(f"{number}. How are you?\n" for number in range(100)))
    return ["--prompts", str(file), "--tokens", "10"]


def bench(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    command = [sys.executable, "-c", _ENTRY, "bench", *words]
    return subprocess.run(command, env=_ENVIRONMENT | options, capture_output=True, text=True, check=False, timeout=50)


def test_a_table_and_the_limit(url: str, short: list[str]) -> None:
    """Steps to a little beyond what the server runs at once, a line for each, and what binds."""
    done = bench(url, "--seconds", "3", *short)

    assert 0 == done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{MODEL_NAME} at {url}: prompts of a file (100)"
    assert lines[2].split()[:3] == ["load", "requests/s", "tokens/s"]
    assert ["1 stream", "4 streams", "8 streams"] == [" ".join(line.split()[:2]) for line in lines[3:6]]
    assert "Limit at 8 streams: max_num_seqs" in lines
    assert "  Try max_num_seqs = 8 (--max-num-seqs)." in lines
    assert "8 streams: " in done.stderr


def test_json_and_png(url: str, short: list[str], tmp_path: Path) -> None:
    """The same for programs, and a picture that is one."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"

    done = bench(url, "--rates", "4,2", "--constant", "--seconds", "2", "--json", "--png", str(picture), *short)

    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)
    assert [2.0, 4.0] == [step["rate"] for step in told["steps"]]
    assert [4, 8] == [step["answered"] for step in told["steps"]]
    assert {"limit", "evidence", "advice", "not_known"} == told["verdict"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_own_prompts_and_thinking_reach_the_server(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    """As they are in the file; and it is said that they were used again."""
    prompts = tmp_path / "own.jsonl"
    prompts.write_text('How are you?\n{"prompt": "Who?", "max_tokens": 3}\n')
    behaviour.bodies.clear()

    done = bench(
        url,
        "--prompts",
        str(prompts),
        "--tokens",
        "5",
        "--streams",
        "1",
        "--requests",
        "4",
        "--no-thinking",
        "--warm-up",
        "0",
    )

    assert 0 == done.returncode, done.stderr
    assert [5, 3, 5, 3] == [body["max_tokens"] for body in behaviour.bodies]
    assert {"How are you?", "Who?"} == {body["messages"][0]["content"] for body in behaviour.bodies}
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in behaviour.bodies)
    assert "used several times" in done.stdout


def test_an_interrupted_test_prints_what_there_is(url: str, short: list[str]) -> None:
    """Ctrl-C in the second step: both steps are in the table, and it ends at once."""
    command = [
        sys.executable,
        "-c",
        _ENTRY,
        "bench",
        url,
        "--streams",
        "1,4",
        "--seconds",
        "3",
        "--warm-up",
        "0",
        *short,
    ]
    process = subprocess.Popen(command, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1 stream: ")
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)

    assert 0 == process.returncode
    assert "(100), interrupted" in out
    assert {"1", "4"} <= {line.split()[0] for line in out.splitlines() if "stream" in line}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["http://127.0.0.1:1"], 75, "http://127.0.0.1:1 does not answer: Connection refused. Does it run?"),
        (["http://127.0.0.1:1/x"], 78, "is not the address of a server"),
        (["nosuch"], 78, "nosuch.toml: does not exist"),
        (["http://a", "--scenario", "long"], 2, "--scenario long: there are short, chat, mixed"),
        (["http://a", "--streams", "1,x"], 2, "--streams 1,x: must be numbers above 0 like 1,8,64"),
        (["http://a", "--streams", "0"], 2, "--streams 0: must be numbers above 0"),
        (["http://a", "--rates", "nan"], 2, "--rates nan: must be numbers above 0"),
        (["http://a", "--streams", "1", "--rates", "1"], 2, "two different tests"),
        (["http://a", "--rates", "1", "--requests", "1"], 2, "--requests belongs to --streams"),
        (["http://a", "--tokens", "1"], 2, "--tokens belongs to --prompts"),
        (["http://a", "--prompts", "/nowhere"], 78, "/nowhere: cannot be read: No such file or directory"),
        (["http://a", "--png", "/nowhere/x.png"], 2, "there is no folder /nowhere"),
    ],
)
def test_wrong_words_are_named(words: list[str], status: int, said: str) -> None:
    """One line: what, where, what to do."""
    done = bench(*words)

    assert status == done.returncode
    assert said in done.stderr
    assert 1 == len(done.stderr.splitlines())
    assert "" == done.stdout


def test_a_server_that_only_fails_is_no_success(url: str, behaviour: Behaviour) -> None:
    """The kinds of errors are counted, and the exit status says to try again."""
    behaviour.status = 503
    try:
        done = bench(url, "--streams", "2", "--seconds", "0.5", "--warm-up", "0")
    finally:
        behaviour.status = 200

    assert 75 == done.returncode
    assert "Limit at 2 streams: nothing answered" in done.stdout
    assert " x HTTP 503" in done.stdout
