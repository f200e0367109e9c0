"""A headless Chromium, driven over the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.patience import patient

_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
    "--no-proxy-server", "--hide-scrollbars", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP rebound.example 127.0.0.1",
)  # fmt: skip
_START_S, _ANSWER_S = 30.0, 20.0


def executable() -> str | None:
    """Where it is, if it is there."""
    return shutil.which("chromium")


class Page:
    """One tab. `faults` is what its console has heard of errors, and of breaches of the page's policy."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last = 0
        self._is_loaded = asyncio.Event()
        self._reading = asyncio.create_task(self._read())
        self.faults: list[str] = []
        self.requested: list[str] = []
        self.received = 0
        """Bytes over the wire."""

    async def _read(self) -> None:
        async for message in self._socket:
            value = json.loads(message.data)
            if "id" in value:
                self._waiting.pop(value["id"]).set_result(value)
            else:
                self._hear(value["method"], value["params"])

    def _hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._is_loaded.set()
        elif method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
            self.faults.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.faults.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Audits.issueAdded":
            self.faults.append(json.dumps(params["issue"]))
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Network.loadingFinished":
            self.received += int(params["encodedDataLength"])

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to this order."""
        self._last += 1
        number, answer = self._last, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        await self._socket.send_json({"id": number, "method": method, "params": params})
        value = await asyncio.wait_for(answer, _ANSWER_S)
        assert "error" not in value, (method, value)
        result: dict[str, Any] = value["result"]
        return result

    async def open(self, url: str) -> None:
        """Load this, with all that belongs to it."""
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            await self.send(f"{domain}.enable")
        await self._then_loaded(self.send("Page.navigate", url=url))

    async def run_until_loaded(self, code: str) -> None:
        """Run what has the page loaded anew."""
        await self._then_loaded(self.run(code))

    async def _then_loaded(self, order: Awaitable[Any]) -> None:
        self._is_loaded.clear()
        await order
        await asyncio.wait_for(self._is_loaded.wait(), _ANSWER_S)

    async def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def text(self, selector: str) -> str:
        """What is read there."""
        return str(await self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def until(self, code: str, *, within_s: float = 30) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + patient(within_s)
        while not (value := await self.run(code)):
            assert time.monotonic() < deadline, (code, await self.text("body"), self.faults)
            await asyncio.sleep(0.05)
        return value

    async def type(self, words: str) -> None:
        """Type this where the focus is, and press Enter."""
        await self.send("Input.insertText", text=words)
        for kind in ("rawKeyDown", "char", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")

    async def look(self, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Be as wide as that, in light or in dark colours."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        await self.send("Emulation.setEmulatedMedia", features=features)
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def photograph(self, folder: Path | None, name: str) -> None:
        """All of the page, as PNG, where there is a place for it."""
        if folder is None:
            return
        await asyncio.sleep(0.3)  # what follows the window's size is drawn with the next frames
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        _write(folder / f"{name}.png", answer["data"])

    async def close(self) -> None:
        """Listen no more."""
        self._reading.cancel()
        await self._socket.close()


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A browser with one empty tab; nothing of it is left afterwards."""
    with _running() as port:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                yield page
                await page.close()


@contextlib.contextmanager
def _running() -> Iterator[int]:
    """The port of one that has a folder of its own, which goes with it."""
    program = executable()
    assert program is not None
    folder = Path(tempfile.mkdtemp(prefix="lls-browser-"))
    process = subprocess.Popen(
        [program, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"],
        env=os.environ | {"HOME": str(folder)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield _port(folder / "DevToolsActivePort", process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    """Where it listens; it writes that down once it does."""
    deadline = time.monotonic() + patient(_START_S)
    while not (file.exists() and (text := file.read_text())):
        assert process.poll() is None, f"the browser has ended with {process.returncode}"
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return int(text.split()[0])


def _write(path: Path, picture: str) -> None:
    path.write_bytes(base64.b64decode(picture))
