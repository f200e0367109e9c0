"""Clients that do not come to an end, on real sockets with the real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_serve.web.asgi import Receive, Scope, Send
from llm_serve.web.deadlines import MAX_HEAD_BYTES, BoundedHead, Timeouts
from llm_serve.web.places import UNLIMITED, Places
from llm_serve.web.server import Server

TIMEOUTS = Timeouts(header_timeout_s=0.6, body_timeout_s=0.8, write_timeout_s=1.0)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
WITHIN_S = 10.0


class Application:
    """Reads the body, unless it is told not to, and answers with its length."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.hung_up = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self.may_read.wait()
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.hung_up += 1
                return
            length, more = length + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % length})


@contextlib.asynccontextmanager
async def serving(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], protocol: type = BoundedHead, places: Places = UNLIMITED
) -> AsyncIterator[tuple[Server, int]]:
    """The server, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(app, listener, TIMEOUTS, places=places)
        if protocol is not BoundedHead:
            server.config.http = protocol
        await server.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            await server.stop()


async def talk(port: int, *pieces: bytes, pause_s: float = 0.1) -> bytes:
    """Send the pieces with pauses between them, and return everything up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def write() -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause_s)

    writing = asyncio.create_task(write())
    told = b""
    try:
        async with asyncio.timeout(WITHIN_S):
            with contextlib.suppress(ConnectionError):  # what was still on its way to a connection that was closed
                while piece := await reader.read(1 << 16):
                    told += piece
    finally:
        writing.cancel()
        writer.close()
    return told


async def until(is_so: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until something is so."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not is_so():
        assert asyncio.get_running_loop().time() < deadline, "it has not become so"
        await asyncio.sleep(0.005)


BOTH = pytest.mark.parametrize("protocol", [BoundedHead, H11Protocol], ids=["ours", "h11"])


@BOTH
async def test_a_connection_that_says_nothing_is_closed(protocol: type) -> None:
    """Without a word: nothing was asked, so nothing is answered."""
    async with serving(Application(), protocol) as (server, port):
        assert b"" == await talk(port)
        await asyncio.sleep(0.2)
        assert not server.server_state.connections


@BOTH
async def test_half_a_head_is_not_waited_for(protocol: type) -> None:
    """A drop now and then does not keep the connection open."""
    async with serving(Application(), protocol) as (_, port):
        told = await talk(port, HEAD, *(b"x-%d: y\r\n" % number for number in range(60)))

    if protocol is BoundedHead:
        assert told.startswith(b"HTTP/1.1 408 ")
        assert "server.header_timeout_s" in json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    "endless", [b"x-%d: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n", b"y%d"], ids=["headers", "one header"]
)
async def test_a_head_has_an_end(endless: bytes) -> None:
    """A head of a few megabytes is cut off as soon as it is too long, not when its time is over."""
    pieces = [b"".join(endless % number for number in range(1000 * n, 1000 * n + 1000)) for n in range(200)]
    async with serving(Application()) as (_, port):
        told = await talk(port, HEAD + b"x-first: ", *pieces, pause_s=0)

    assert told.startswith(b"HTTP/1.1 431 ")
    assert str(MAX_HEAD_BYTES) in json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_a_long_head_is_no_crime() -> None:
    """Sixty kilobytes in pieces, then a body: served, and so is the next request of the connection."""
    head = HEAD + b"".join(b"x-%d: %s\r\n" % (number, b"y" * 1000) for number in range(58))
    async with serving(Application()) as (_, port):
        told = await talk(
            port,
            head[:30_000],
            head[30_000:] + b"content-length: 100000\r\n\r\n",
            b"x" * 100_000,
            head + b"connection: close\r\ncontent-length: 0\r\n\r\n",
        )

    assert 2 == told.count(b"HTTP/1.1 200 ")


@BOTH
async def test_a_second_head_has_its_deadline_too(protocol: type) -> None:
    """uvicorn's keep-alive timer ends with the first byte of the next request; after that it would wait for ever."""
    async with serving(Application(), protocol) as (_, port):
        told = await talk(port, HEAD + b"content-length: 2\r\n\r\nab", HEAD)

    assert told.startswith(b"HTTP/1.1 200 ")
    assert 1 == told.count(b"200 OK")


@BOTH
async def test_half_a_body_is_not_waited_for(protocol: type) -> None:
    """408 with an error object, and the application hears that the client is gone."""
    app = Application()
    async with serving(app, protocol) as (_, port):
        told = await talk(port, HEAD + b"content-length: 100\r\n\r\n", *[b"x"] * 60)

    assert told.startswith(b"HTTP/1.1 408 ")
    head, _, text = told.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error = json.loads(text)["error"]
    assert ("request_timeout", "invalid_request_error") == (error["code"], error["type"])
    assert "server.body_timeout_s" in error["message"]
    assert 1 == app.hung_up


async def test_a_body_that_we_do_not_read_is_not_late() -> None:
    """A long body that stands in the network because it has to wait here is not the client's fault."""
    app = Application()
    app.may_read.clear()
    body = b"x" * (4 << 20)
    async with serving(app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        await asyncio.sleep(TIMEOUTS.body_timeout_s * 2)
        app.may_read.set()
        async with asyncio.timeout(WITHIN_S):
            answer = await reader.readuntil(b"%d" % len(body))
        writer.close()

    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_busy_connection_is_left_alone() -> None:
    """Requests one after the other, for longer than both limits, none of which is late."""
    async with serving(Application()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(10):
            writer.write(HEAD + b"content-length: 2\r\n\r\n")
            await asyncio.sleep(0.1)
            writer.write(b"ab")
            async with asyncio.timeout(WITHIN_S):
                answer = await reader.readuntil(b"1\r\n2\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.1)
        writer.close()


async def test_a_slow_answer_is_no_slow_client() -> None:
    """A request that is complete may wait for its answer as long as it takes."""
    app = Application()
    app.may_read.clear()
    async with serving(app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"content-length: 2\r\n\r\nab")
        await asyncio.sleep(TIMEOUTS.body_timeout_s * 2)
        app.may_read.set()
        async with asyncio.timeout(WITHIN_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_many_half_open_connections_do_not_pile_up() -> None:
    """Three hundred that never finish their head are gone after the deadline, and others are served meanwhile."""
    async with serving(Application()) as (server, port):
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        for _, writer in opened:
            writer.write(HEAD)
        await asyncio.sleep(0.2)
        assert 300 == len(server.server_state.connections)
        assert b"200 OK" in await talk(port, HEAD + b"connection: close\r\ncontent-length: 1\r\n\r\na", pause_s=0)
        await until(lambda: not server.server_state.connections)
        for _, writer in opened:
            writer.close()


class Long:
    """Answers with 32 MiB, more than the kernel keeps for a client."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.is_over = pieces, asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for left in range(self.pieces)[::-1]:
            body = b"x" * ((32 << 20) // self.pieces)
            await send({"type": "http.response.body", "body": body, "more_body": bool(left)})
        self.is_over.set()


async def _ask_and_not_read(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, HEAD + b"content-length: 0\r\n\r\n")
    return client


@pytest.mark.parametrize("pieces", [1, 64])
@BOTH
async def test_an_answer_that_nobody_takes_is_dropped(protocol: type, pieces: int) -> None:
    """Whether the application is done with it or waits for room; and with it goes its connection."""
    app = Long(pieces)
    async with serving(app, protocol) as (server, port):
        with await _ask_and_not_read(port):
            await until(lambda: server.server_state.connections)
            await until(lambda: not server.server_state.connections)
            await asyncio.wait_for(app.is_over.wait(), WITHIN_S)


async def test_an_answer_that_is_taken_slowly_is_not_dropped() -> None:
    """A reader that takes twice as long as the limit for all of it, but never as long for some of it."""
    async with serving(Long(1)) as (_, port):
        with await _ask_and_not_read(port) as client:
            loop, taken, began = asyncio.get_running_loop(), 0, time.monotonic()
            while piece := await asyncio.wait_for(loop.sock_recv(client, 1 << 20), WITHIN_S):
                taken += len(piece)
                if taken > 32 << 20:
                    break
                if time.monotonic() - began < 2 * TIMEOUTS.write_timeout_s:
                    await asyncio.sleep(0.01)

    assert 32 << 20 < taken
    assert time.monotonic() - began > 2 * TIMEOUTS.write_timeout_s


async def test_too_many_connections_are_told_so() -> None:
    """503 with the option, at once; those that are there are served, and one that goes makes room."""
    head = HEAD + b"content-length: 0\r\n\r\n"
    async with serving(Application(), places=Places(100, 3)) as (server, port):
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await until(lambda: 3 == len(server.server_state.connections))

        told = await talk(port)
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5" in told
        assert "server.max_connections_per_client" in json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        opened[0][1].write(head)
        assert b"HTTP/1.1 200 OK\r\n" == await asyncio.wait_for(opened[0][0].readline(), WITHIN_S)

        opened[1][1].close()
        await until(lambda: 2 == len(server.server_state.connections))
        assert b"200 OK" in await talk(port, HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        for _, writer in opened:
            writer.close()


async def test_an_upgrade_leaves_nothing_behind() -> None:
    """Who asks for a WebSocket gets an ordinary answer, and his place is free again afterwards."""
    upgrade = (
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n\r\n"
    )
    async with serving(Application(), places=Places(100, 2)) as (server, port):
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n" + upgrade)
            assert b"HTTP/1.1 200 OK\r\n" == await asyncio.wait_for(reader.readline(), WITHIN_S)
            writer.close()
            await until(lambda: not server.server_state.connections)


async def test_the_kernel_is_asked_to_notice_dead_peers() -> None:
    """Accepted connections inherit the probes of the listening socket."""
    async with serving(Application()) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.1)
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert 1 == accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert 120_000 == accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        writer.close()


def test_uvicorn_still_has_what_is_read_here() -> None:
    """The hook and the attributes of both protocols, by name, so that a new uvicorn fails here and not in service."""
    config = uvicorn.Config(Application(), log_config=None)
    config.load()
    assert callable(uvicorn.Server(config).on_tick)
    for protocol in (HttpToolsProtocol, H11Protocol):
        made = protocol(config, uvicorn.Server(config).server_state, {}, asyncio.new_event_loop())
        for name in ("cycle", "flow", "scope", "client", "transport", "timeout_keep_alive_task"):
            assert hasattr(made, name)
        made.loop.close()
