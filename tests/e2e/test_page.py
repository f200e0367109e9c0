"""The page in a real browser: it follows an instance through a recovery, and nothing in it breaks its own policy.

With LLM_SERVE_PICTURES=DIR the browser takes pictures and leaves them there, for people to look at.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser import Page, browser, executable
from tests.daemon import Daemon
from tests.e2e.test_operations import kill_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(executable() is None, reason="no chromium here (packaging/test-tools installs it)"),
]

IS_PAINTED = """[...document.querySelectorAll("#plots canvas")].every((canvas) => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.some((value) => value !== 0);
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STRETCHES = "[...document.querySelectorAll('#strip rect')].slice(-3).map((each) => each.dataset.tone).join()"
LAST_FAILURE = "document.querySelector('#failures details')?.dataset.time ?? ''"
RECOVERIES = "document.querySelector('#events').innerText.split('recovering -> serving').length - 1"
STATE_IS = 'document.querySelector("#state").textContent === "{}"'


@pytest.fixture
def pictures() -> Path | None:
    """Where pictures are to go, if anybody wants some."""
    if not (name := os.environ.get("LLM_SERVE_PICTURES")):
        return None
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def test_it_follows_an_instance_through_a_recovery(shared: Daemon, pictures: Path | None) -> None:
    """Serving, then recovering with its progress, then serving again, with the failure, its evidence and the journal."""
    with shared.stream(1500) as stream:
        stream.wait_for_tokens(20)
        async with browser() as page:
            await page.look()
            await page.open(f"{shared.url}/")
            await page.until(STATE_IS.format("Serving"))
            await page.until(f"{IS_PAINTED} && document.querySelectorAll('#figures dd').length === 8")
            await page.until("document.querySelector('#figures').innerText.includes('1 of 16')")
            await page.photograph(pictures, "serving")

            failures, recoveries = await page.run(LAST_FAILURE), await page.run(RECOVERIES)
            kill_engine(shared)

            await page.until(STATE_IS.format("Recovering"))
            assert await page.run("!document.querySelector('#start').hidden")
            await page.until("document.querySelector('#progress').value > 0.1")
            await page.photograph(pictures, "recovering")
            await page.until(STATE_IS.format("Serving"), within_s=60)
            stream.wait_for_tokens(len(stream.events) + 1)
            assert failures != await page.run(LAST_FAILURE)
            assert recoveries + 1 == await page.run(RECOVERIES)
            await page.run(
                "(failure => { failure.focus(); failure.click(); })(document.querySelector('#failures summary'))"
            )
            assert "SIGKILL" in await page.text("#failures details[open] dl")
            # It stays open and keeps the focus while the page goes on being told of news.
            await page.until(f"{STRETCHES} === 'good,busy,good'")
            assert "SUMMARY" == await page.run("document.activeElement.tagName")
            assert await page.run("document.querySelector('#failures details').open")

            for name, width, is_dark in (
                ("light", 1280, False),
                ("dark", 1280, True),
                ("phone", 375, False),
                ("phone-dark", 375, True),
                ("narrow", 360, False),
            ):
                await page.look(width=width, is_dark=is_dark)
                await page.photograph(pictures, name)
                await page.until(f"{OVERFLOW} <= 0", within_s=5)
            await _newcomer_sees_what_was(page, shared)

            assert [] == page.faults
            assert {shared.url} == {
                "/".join(url.split("/")[:3]) for url in page.requested if not url.startswith("data:")
            }


async def _newcomer_sees_what_was(page: Page, daemon: Daemon) -> None:
    """A page that is opened after the recovery shows it too."""
    await page.open(f"{daemon.url}/")
    await page.until(f"{STRETCHES} === 'good,busy,good'")
    assert 0 < await page.run(RECOVERIES)


async def test_a_daemon_that_is_gone_is_said_to_be_gone(shared: Daemon) -> None:
    """What was seen last stays, and the page finds the daemon again."""
    async with browser() as page:
        await page.open(f"{shared.url}/")
        await page.until(STATE_IS.format("Serving"))
        await page.send(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        await page.until(STATE_IS.format("No answer"))
        assert "does not answer" in await page.text("#why")
        await page.send(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        await page.until(STATE_IS.format("Serving"))


async def test_another_name_for_this_machine_shows_nothing(shared: Daemon) -> None:
    """A name that somebody else's page has had resolved to this machine: DNS rebinding."""
    async with browser() as page:
        await page.open(f"http://rebound.example:{shared.port}/")
        assert "unknown_host" in await page.until(
            "document.body.innerText.includes('unknown_host') && document.body.innerText"
        )
