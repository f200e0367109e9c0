"""The page's files: what is sent with them, and what is not in them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm_serve.web import assets, operations
from llm_serve.web.assets import ASSETS
from tests.doors import Call, gate, snapshot

FOLDER = Path(assets.__file__).parent / "page"
PAGE_LIMIT = 45_000
"""Bytes of everything that is loaded, compressed."""


class Tags(HTMLParser):
    """The tags of a page, and what is between <script> and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more."""
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Text is inline code where the last tag is one of code."""
        if self.found and self.found[-1][0] in {"script", "style"} and data.strip():
            self.inline.append(data)


@pytest.fixture
def page() -> Tags:
    """The page as a browser takes it apart."""
    tags = Tags()
    tags.feed((FOLDER / "index.html").read_text())
    return tags


async def get(path: str, method: str = "GET", **headers: str) -> Call:
    """Ask a gate without keys."""
    return await Call(path, method, {"host": "127.0.0.1:8000"} | headers).ask(gate())


@pytest.mark.parametrize("path", sorted(ASSETS))
async def test_every_file_is_served_under_a_strict_policy(path: str) -> None:
    """Nothing from elsewhere, nothing inline, in nobody's frame."""
    call = await get(path)

    policy = dict(rule.split(" ", 1) for rule in call.head["content-security-policy"].split("; "))
    assert 200 == call.status
    assert "'none'" == policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"]
    assert "'self'" == policy["script-src"] == policy["style-src"] == policy["connect-src"]
    assert ("nosniff", "no-referrer") == (call.head["x-content-type-options"], call.head["referrer-policy"])
    assert not call.head.keys() & {"set-cookie", "access-control-allow-origin"}


async def test_all_files_of_the_folder_are_served() -> None:
    """None is forgotten, and none is served that is not there."""
    served = {asset.name for asset in ASSETS.values()}

    assert {path.name for path in FOLDER.iterdir()} == served


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(page: Tags) -> None:
    """No code and no style within the page, and every address is one of ours, relative, so that a prefix does no harm."""
    addresses = [values.get(name) for _, values in page.found for name in ("src", "href") if values.get(name)]

    assert [] == page.inline
    assert [] == [
        values for _, values in page.found if any(name.startswith("on") or name == "style" for name in values)
    ]
    assert {f"/{address}" for address in addresses if address != "data:,"} <= {*ASSETS, "/status", "/metrics"}


@pytest.mark.parametrize("name", ["page.js", "plots.js"])
def test_texts_are_never_read_as_html(name: str) -> None:
    """A failure's text comes from whatever has failed."""
    code = (FOLDER / name).read_text()

    assert [] == re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|https?://(?!www\.w3\.org/2000/svg)",
        code,
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
    ],
)
def test_what_draws_the_plots_is_as_its_author_released_it(name: str, digest: str) -> None:
    """dist/ of uPlot 1.6.32."""
    assert digest == hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()


async def test_the_page_is_small() -> None:
    """Everything that it loads, as it goes over the wire."""
    calls = [await get(path, **{"accept-encoding": "gzip"}) for path in ASSETS if not path.endswith(".txt")]

    assert all("gzip" == call.head["content-encoding"] for call in calls)
    assert [ASSETS[call.path].content for call in calls] == [gzip.decompress(call.body) for call in calls]
    assert PAGE_LIMIT > sum(len(call.body) for call in calls)


async def test_who_has_a_file_is_not_sent_it_again() -> None:
    """And who does not unpack gets it as it is."""
    first = await get("/page/page.js")
    again = await get("/page/page.js", **{"if-none-match": first.head["etag"]})
    other = await get("/page/page.js", **{"if-none-match": '"another"'})

    assert (FOLDER / "page.js").read_bytes() == first.body
    assert "content-encoding" not in first.head
    assert (304, b"") == (again.status, again.body)
    assert 200 == other.status


@pytest.mark.parametrize("path", sorted(ASSETS))
async def test_the_page_needs_no_key_and_takes_no_orders(path: str) -> None:
    """A browser sends none with an address; there is nothing in the files that is not public."""
    keyed = [(await Call(path, method).ask(gate(["right"]))).status for method in ("GET", "HEAD", "POST")]

    assert [200, 200, 405] == keyed


async def test_what_the_page_shows_needs_the_key() -> None:
    """/status with the history as without it; a path beside the page's tells nothing."""
    wrong = [
        await Call("/status", "GET", headers).ask(gate(["right"]))
        for headers in ({}, {"authorization": "Bearer wrong"})
    ]
    right = await Call("/status", "GET", {"authorization": "Bearer right"}).ask(gate(["right"]))
    nowhere = await Call("/page/../status", "GET").ask(gate(["right"]))

    assert ([401, 401], 200, 401) == ([call.status for call in wrong], right.status, nowhere.status)


@pytest.mark.parametrize(("query", "numbers"), [("", []), ("since=0", [0]), ("since=17", [17])])
async def test_status_tells_the_history_to_who_asks_for_it(query: str, numbers: list[int]) -> None:
    """Everybody else's /status is as it was."""
    asked: list[int] = []
    here = operations.Here(snapshot)

    def history(number: int) -> dict[str, Any]:
        asked.append(number)
        return {"last": number}

    here.history = history
    app = operations.create(snapshot, (), here)

    async def with_query(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"query_string": query.encode()}, receive, send)

    body = json.loads((await Call("/status", "GET").ask(with_query)).body)

    assert (numbers, bool(numbers)) == (asked, "history" in body)


@pytest.mark.parametrize("since", ["x", "-1", "1.5", "", "%C2%B2", "9" * 5000, "1%0A", "<script>"])
async def test_a_number_that_is_none_is_refused(since: str) -> None:
    """400, as an OpenAI error."""

    async def with_query(scope: Any, receive: Any, send: Any) -> None:
        app = operations.create(snapshot, ())
        await app(scope | {"query_string": f"since={since}".encode()}, receive, send)

    call = await Call("/status", "GET").ask(with_query)

    assert (400, "invalid_since") == (call.status, call.error["code"])
