"""Bounds below the routes, over real sockets: heads, framing, pipelining, slow clients, the number of connections."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from baton.proxy.http.app import app_of
from baton.proxy.http.connections import ConnectionLimits, Connections
from baton.proxy.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_URL_BYTES, bounded_protocol
from baton.proxy.http.service import Service, make_service
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

WAIT_S = 60.0
"""For what must happen; it fails a test that would hang."""
UNLIMITED_S = 1e6
PATIENT = ConnectionLimits(64, UNLIMITED_S, UNLIMITED_S, 1.0, UNLIMITED_S, UNLIMITED_S, 0.01)
"""No connection is too slow; tests set the one limit that they are about."""
READ_BYTES = 256 << 10
"""Of asyncio, at once."""
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def completion(**more: object) -> bytes:
    body = json.dumps({"model": "demo", "prompt": "Tom", "max_tokens": 4, **more}).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


@dataclass
class Served:
    port: int
    service: Service
    connections: Connections

    def refused(self, reason: str) -> float:
        return self.service.metrics.refused[reason]._value.get()

    async def connect(self, sent: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        await client.send(sent)
        return client

    async def ask(self, sent: bytes) -> bytes:
        """All that the server answers on a new connection, until it closes it."""
        client = await self.connect(sent)
        try:
            return await client.rest()
        finally:
            client.close()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    got: bytes = field(default=b"", init=False)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), WAIT_S)

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), WAIT_S)

    async def closed(self) -> None:
        """Returns when the server has closed the connection, in whatever way."""
        try:
            await self.rest()
        except ConnectionError:
            pass

    def close(self) -> None:
        self.writer.close()


Serve = Callable[..., Any]


@pytest.fixture
def serve(engine: FakeEngine, text: ModelText) -> Serve:
    """Serves the app with its connections' limits on a free port."""

    @asynccontextmanager
    async def served(limits: ConnectionLimits = PATIENT, settings: AppSettings | None = None) -> AsyncIterator[Served]:
        service = make_service(engine, {"demo": text}, settings or AppSettings())
        connections = Connections(limits, service.refused)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # unread answers stay in the process
        config = uvicorn.Config(
            app_of(service), http=bounded_protocol(connections), ws="none", lifespan="off", log_config=None
        )
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield Served(listener.getsockname()[1], service, connections)
        finally:
            server.should_exit = True
            await task

    return served


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /live HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n", 431),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (LIVE.replace(b"1.1", b"9.9"), 400),
        (b"GET /live\r\n\r\n", 505),
        (b"GET /live HTTP/1.1\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
        (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + LIVE, 400),
        (POST + b"Content-Length: 0\r\nContent-Length: 40\r\n\r\n" + LIVE, 400),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + LIVE, 400),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + LIVE, 400),
        (POST + b"Content-Length : 5\r\n\r\nhello", 400),
        (b"GET /live HTTP/1.1\nHost: x\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),
    ],
)
async def test_a_bad_head_gets_one_answer_and_no_route(serve: Serve, sent: bytes, status: int) -> None:
    """Guards against heads of any size, and against what two servers read differently: a second request in it."""
    async with serve() as served:
        answer = await served.ask(sent)
        assert statuses(answer) == [status]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"]
        assert b"connection: close" in answer


@pytest.mark.parametrize("before", [b"", LIVE], ids=["the first", "a further one"])
@pytest.mark.parametrize("piece", [b"A: " + b"b" * 1000 + b"\r\n", b"b" * 1000], ids=["headers", "one header"])
async def test_a_head_without_end_is_not_kept(serve: Serve, before: bytes, piece: bytes) -> None:
    """Guards against 300 MiB of headers in memory before a key is asked for, also on a connection that was used."""
    async with serve() as served:
        client = await served.connect(before)
        if before:
            await client.until(b'"ok"}')
        await client.send(b"GET /live HTTP/1.1\r\nHost: x\r\nB: ")
        sending = asyncio.create_task(_send_for_ever(client, piece))
        assert statuses(await client.rest()) == [431]
        sending.cancel()
        assert served.refused("head_too_large") == 1
        client.close()


async def _send_for_ever(client: Client, piece: bytes) -> None:
    while True:
        await client.send(piece)
        await asyncio.sleep(0)  # the server runs in this loop


@pytest.mark.parametrize(
    "piece", [b"1\r\na\r\n" * 4000, b"1;" + b"e" * 9000 + b"\r\na\r\n"], ids=["tiny chunks", "extensions"]
)
async def test_framing_without_content_is_refused(serve: Serve, piece: bytes) -> None:
    """Guards against bodies that cost far more than their size."""
    async with serve() as served:
        client = await served.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        sending = asyncio.create_task(_send_for_ever(client, piece))
        assert statuses(await client.rest()) == [400]
        sending.cancel()
        client.close()


async def test_trailers_are_no_headers_and_bounded(serve: Serve) -> None:
    """Guards against trailers without end after a body that was small."""
    async with serve() as served:
        client = await served.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        sending = asyncio.create_task(_send_for_ever(client, b"A: b\r\n" * 10))
        assert statuses(await client.rest()) == [431]
        sending.cancel()
        client.close()


async def test_chunks_of_usual_size_are_a_body(serve: Serve) -> None:
    """Guards against refusing clients that send a body while they write it."""
    body = json.dumps({"model": "demo", "prompt": "Tom " * 100, "max_tokens": 1}).encode()
    chunks = b"".join(b"8\r\n%s\r\n" % body[at : at + 8].ljust(8) for at in range(0, len(body), 8))
    async with serve() as served:
        client = await served.connect(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.send(chunks + b"0\r\n\r\n")
        assert statuses(await client.rest()) == [200]
        client.close()


async def test_pipelined_requests_are_answered_in_order_up_to_a_bound(serve: Serve) -> None:
    """Guards against thousands of requests of one connection in memory."""
    async with serve() as served:
        few = await served.ask(LIVE * 3 + LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert statuses(few) == [200] * 4
        many = await served.ask(LIVE * 3000)
        assert statuses(many) == [200] * (1 + MAX_PIPELINED)
        assert served.refused("too_many_pipelined") == 1


async def test_bodies_ahead_of_an_answer_are_bounded_together(serve: Serve, engine: FakeEngine) -> None:
    """Guards memory: a connection may have eight requests ahead, and none of their bodies counts yet."""
    running = asyncio.Event()
    engine.script = _first_token_and_then_none(running)
    async with serve() as served:
        client = await served.connect(completion(stream=True))
        await running.wait()
        (connection,) = served.connections._open
        ahead = POST + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)
        client.writer.write(ahead * (MAX_PIPELINED - 1))
        await _until(lambda: connection.flow.read_paused and bool(connection.pipeline))
        held = sum(len(cycle.body) for cycle, _ in connection.pipeline)
        assert held <= HIGH_WATER_LIMIT + READ_BYTES
        client.close()
        connection.drop()


async def test_a_bad_request_behind_an_answer_is_not_answered_in_it(serve: Serve, engine: FakeEngine) -> None:
    """Guards against an error's text in the middle of another answer: the connection is closed, the request ends."""
    running, ended = asyncio.Event(), asyncio.Event()
    engine.script = _first_token_and_then_none(running)
    engine.on_cancel = lambda _: ended.set()
    async with serve() as served:
        client = await served.connect(completion(stream=True))
        await client.until(b"data: ")
        await client.send(b"no request\r\n\r\n")
        rest = await client.rest()
        assert b"HTTP/1.1" not in rest
        await asyncio.wait_for(ended.wait(), WAIT_S)
        client.close()


@pytest.mark.parametrize("together", [True, False])
async def test_a_client_that_leaves_is_noticed_though_it_asked_ahead(
    serve: Serve, engine: FakeEngine, together: bool
) -> None:
    """Guards against tokens for a client that is gone, and an internal error when they are written: the server knew
    only the latest request of a connection, and read no more once there was one ahead."""
    running, ended = asyncio.Event(), asyncio.Event()
    engine.script = _first_token_and_then_none(running)
    engine.on_cancel = lambda _: ended.set()
    async with serve() as served:
        client = await served.connect(completion(stream=True) + LIVE * together)
        await client.until(b"data: ")
        await client.send(LIVE)
        client.close()
        await asyncio.wait_for(ended.wait(), WAIT_S)
        await _until(lambda: served.service.metrics.failed["disconnected"]._value.get() == 1)


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "streamed"])
async def test_a_client_that_sends_no_more_has_left(serve: Serve, engine: FakeEngine, more: dict[str, object]) -> None:
    """Guards against prompts that are computed for clients that are gone: until something is written, one that closed
    its connection looks like one that shut down its sending side."""
    running, ended = asyncio.Event(), asyncio.Event()
    engine.script = _first_token_and_then_none(running)
    engine.on_cancel = lambda _: ended.set()
    async with serve() as served:
        client = await served.connect(completion(**more))
        await running.wait()
        client.writer.write_eof()
        await asyncio.wait_for(ended.wait(), WAIT_S)
        await client.closed()
        client.close()


def _first_token_and_then_none(running: asyncio.Event) -> Callable[[EngineCall], list[ScriptStep]]:
    def script(call: EngineCall) -> list[ScriptStep]:
        running.set()
        return [Delta((300,)), asyncio.Event()]

    return script


async def test_an_upgrade_is_not_followed(serve: Serve) -> None:
    """Guards against a connection that leaves the bounds, and against refusing clients that ask for HTTP/2."""
    upgrade = b"\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"
    async with serve() as served:
        assert statuses(await served.ask(LIVE.replace(b"\r\n\r\n", upgrade + b"\r\n"))) == [200]
        body = completion(stream=True)[len(POST) :]
        client = await served.connect(POST + upgrade.replace(b", close", b"")[2:] + body)
        assert b"data:" in await client.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")  # Java's client, which then asks again
        await client.send(POST + upgrade[2:] + body[:-5])
        await client.send(body[-5:])
        answer = await client.rest()
        assert statuses(answer) == [200] and answer.count(b"data: [DONE]") == 1
        chunked = POST + upgrade[2:] + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        assert b"model: Field required" in await served.ask(chunked)
        connect = b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
        assert statuses(await served.ask(connect)) == [400]
        websocket = b"\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n"
        assert statuses(await served.ask(LIVE.replace(b"\r\n\r\n", websocket + b"\r\n"))) == [200]


async def test_an_old_client_gets_its_answers_without_chunks(serve: Serve) -> None:
    """Guards against chunks in the text that a client of HTTP/1.0 reads: such an answer ends with the connection."""
    async with serve() as served:
        head, _, events = (await served.ask(completion(stream=True).replace(b"1.1", b"1.0"))).partition(b"\r\n\r\n")
        assert b"connection: close" in head and b"transfer-encoding" not in head
        frames = events.split(b"\n\n")
        assert frames[-2:] == [b"data: [DONE]", b""] and all(json.loads(frame[6:]) for frame in frames[:-2])
        whole = await served.ask(completion().replace(b"1.1", b"1.0"))
        assert b"content-length" in whole and json.loads(whole.partition(b"\r\n\r\n")[2])["choices"]
        assert statuses(await served.ask(LIVE.replace(b"GET", b"HEAD").replace(b"1.1", b"1.0"))) == [200]


# ---- slow clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "limit", "status", "reason"),
    [
        (b"", {"head_timeout_s": 0.05}, [], ""),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nA: ", {"head_timeout_s": 0.5}, [408], "slow_head"),
        (LIVE + b"GET /live", {"head_timeout_s": 0.5}, [200, 408], "slow_head"),
        (POST + b"Content-Length: 10\r\n\r\n{", {"body_grace_s": 0.05, "body_bytes_per_s": 1e9}, [408], "slow_body"),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", {"drain_s": 0.05}, [200], ""),
    ],
    ids=["nothing", "half a head", "half a further head", "half a body", "half of an unread body"],
)
async def test_a_slow_client_is_ended(
    serve: Serve, sent: bytes, limit: dict[str, float], status: list[int], reason: str
) -> None:
    """Guards against connections that are held for ever: 2,000 of 2,000 were. Half a second where what was sent must
    arrive before it ends."""
    async with serve(_with(**limit)) as served:
        assert statuses(await served.ask(sent)) == status
        if reason:
            assert served.refused(reason) == 1


def _with(max_connections: int = 64, **limits: float) -> ConnectionLimits:
    return replace(PATIENT, max_connections=max_connections, **limits)


async def test_a_client_that_reads_no_answer_is_dropped(serve: Serve) -> None:
    """Guards against answers in memory, for ever, of clients that ask and do not read."""
    async with serve(_with(flush_s=0.1)) as served:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", served.port))
        await loop.sock_sendall(sock, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await _until(lambda: served.refused("slow_reader") == 1)
        await _until(lambda: not len(served.connections))
        sock.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_running_request_is_never_too_slow(serve: Serve, engine: FakeEngine) -> None:
    """Guards against ending a request whose first token takes long: it has its own deadline."""
    running, go_on = asyncio.Event(), asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        running.set()
        return [go_on, Delta((300,), (), "length")]

    engine.script = script
    async with serve(_with(head_timeout_s=0.0, body_grace_s=0.0, drain_s=0.0, flush_s=0.0)) as served:
        asking = asyncio.create_task(served.ask(completion()))
        await running.wait()
        assert await _closes(served, b"")  # the sweep runs
        go_on.set()
        assert statuses(await asking) == [200]


async def _closes(served: Served, sent: bytes) -> bool:
    return await served.ask(sent) == b""


# ---- their number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [b"", LIVE, b"GET /live HTTP/1.1\r\nA: ", POST + b"Content-Length: 10\r\n\r\n{"],
    ids=["nothing", "answered", "half a head", "half a body"],
)
async def test_a_connection_without_a_request_gives_way_to_a_new_one(serve: Serve, sent: bytes) -> None:
    """Guards against slow clients that keep all connections from others."""
    async with serve(_with(max_connections=1)) as served:
        slow = await served.connect(sent)
        await _until(lambda: len(served.connections) == 1)
        if sent == LIVE:
            await slow.until(b'"ok"}')
        new = await served.connect(LIVE)
        assert statuses(await new.until(b'"ok"}')) == [200]
        await slow.closed()
        assert served.refused("closed_for_another") == 1
        slow.close()
        new.close()


async def test_running_requests_do_not_give_way(serve: Serve, engine: FakeEngine) -> None:
    """Guards against a flood of connections that ends the requests of others: new ones are refused, until one ends."""
    go_on = asyncio.Event()
    running: list[str] = []

    def script(call: EngineCall) -> list[ScriptStep]:
        running.append(call.request_id)
        return [go_on, Delta((300,), (), "length")]

    engine.script = script
    async with serve(_with(max_connections=2)) as served:
        asked = [await served.connect(completion()) for _ in range(2)]
        await _until(lambda: len(running) == 2)
        refused = await served.connect()
        answer = await refused.rest()
        assert statuses(answer) == [503]
        assert b"retry-after: 1\r\n" in answer
        assert served.refused("too_many_connections") == 1
        go_on.set()
        for client in asked:
            assert b"200 OK" in await client.until(b"\r\n\r\n")
            client.close()
        refused.close()
