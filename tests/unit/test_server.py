"""Several servers on one socket, on real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from llm_serve.host.board import Board, Seat
from llm_serve.web.asgi import Receive, Scope, Send
from llm_serve.web.server import Server

COUNT = 3


@contextlib.asynccontextmanager
async def crowd() -> AsyncIterator[tuple[list[Server], list[Seat], int]]:
    """Servers that answer with their number, as processes would, and the port that they share."""
    board = Board(COUNT)
    seats = [Seat(board, place) for place in range(COUNT)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        servers = []
        for seat in seats:
            seat.row.turned_at = float("inf")

            async def app(scope: Scope, receive: Receive, send: Send, place: int = seat.place) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
                await send({"type": "http.response.body", "body": b"%d" % place})

            servers.append(Server(app, listener.dup(), share=seat))
        for server in servers:
            await server.start()
        try:
            yield servers, seats, listener.getsockname()[1]
        finally:
            await asyncio.gather(*(server.stop() for server in servers))


class Client:
    """One connection, which stays."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int) -> Client:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self) -> int:
        """Who answers."""
        self.writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        return int((await self._reader.readuntil(b"\r\n\r\n") + await self._reader.readexactly(1))[-1:])


async def test_connections_that_come_at_once_are_spread() -> None:
    """Left alone, the loop that wakes up first would take them all."""
    async with crowd() as (_, _seats, port):
        clients = await asyncio.gather(*(Client.to(port) for _ in range(10 * COUNT)))
        answers = Counter([await client.ask() for client in clients])
        for client in clients:
            client.writer.close()

    assert set(range(COUNT)) == answers.keys()
    assert max(answers.values()) - min(answers.values()) <= 2, answers


async def test_one_that_hangs_keeps_nobody_from_being_served() -> None:
    """It has fewest connections and takes none: the others yield to it for a moment, and then do not."""
    async with crowd() as (servers, _seats, port):
        assert servers[0]._accepting is not None
        servers[0]._accepting.cancel()
        await asyncio.sleep(0)

        clients = await asyncio.wait_for(asyncio.gather(*(Client.to(port) for _ in range(20))), 10)
        answers = Counter([await asyncio.wait_for(client.ask(), 10) for client in clients])
        for client in clients:
            client.writer.close()

    assert {1, 2} == answers.keys()


async def test_a_server_that_stops_leaves_connections_to_the_others() -> None:
    """What it has accepted it still answers; new ones wait for one that stays."""
    async with crowd() as (servers, seats, port):
        first = [await Client.to(port) for _ in range(COUNT)]
        assert {0, 1, 2} == {await client.ask() for client in first}
        stopping = asyncio.create_task(servers[2].stop())
        await asyncio.sleep(0.05)
        assert not seats[2].row.accepts
        later = [await Client.to(port) for _ in range(6)]
        assert 2 not in {await client.ask() for client in later}
        for client in (*first, *later):
            client.writer.close()
        await stopping


@pytest.mark.parametrize("error", [OSError(24, "Too many open files")])
async def test_a_process_without_descriptors_goes_on_later(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """A connection that cannot be accepted now waits in the kernel."""
    from llm_serve.web import server as module

    monkeypatch.setattr(module, "_NO_DESCRIPTOR_S", 0.05)
    async with crowd() as (servers, _seats, port):
        failed = asyncio.Event()

        class Empty:
            def __init__(self, listener: socket.socket) -> None:
                self._listener = listener

            def fileno(self) -> int:
                return self._listener.fileno()

            def accept(self) -> tuple[socket.socket, object]:
                if not failed.is_set():
                    failed.set()
                    raise error
                return self._listener.accept()

        for server in servers:
            assert server._accepting is not None
            server._accepting.cancel()
            server._listener = Empty(server._listener)  # type: ignore[assignment]
            assert server._share is not None
            server._accepting = asyncio.create_task(server._accept(server._share))
        client = await Client.to(port)

        assert await asyncio.wait_for(client.ask(), 10) in range(COUNT)
        assert failed.is_set()
        client.writer.close()


async def test_a_client_that_reads_nothing_stops_who_writes_to_it() -> None:
    """What a slow reader costs is what the kernel and one buffer hold, however long its answer is."""
    sent, is_over = 0, asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for _ in range(4096):
                await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
                sent += 65_536
        finally:
            is_over.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        server = Server(app, listener)
        await server.start()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.sleep(0.3)
        before = sent
        await asyncio.sleep(0.2)
        assert 0 < before == sent < 16 << 20
        client.close()
        await asyncio.wait_for(is_over.wait(), 10)
        await server.stop()
