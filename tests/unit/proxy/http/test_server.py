"""Guards TLS below the routes, over real sockets and on both event loops: silent connections, ciphers."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
import uvicorn
import uvloop

from baton.node.tls import own_server_context, server_context
from baton.proxy.http.app import app_of
from baton.proxy.http.connections import ConnectionLimits, Connections
from baton.proxy.http.protocol import bounded_protocol
from baton.proxy.http.server import HANDSHAKE_TIMEOUT_S, BoundedServer
from baton.proxy.http.service import make_service
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine
from baton.tests.certificate import make_certificate

WAIT_S = 60.0
"""For what must happen; it fails a test that would hang."""
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

Run = Callable[[Callable[[int], Awaitable[None]], float], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, engine: FakeEngine, text: ModelText, tmp_path: Path) -> Run:
    """Runs a coroutine that is given the port of an HTTPS server, whose handshakes have the given time."""
    context = server_context(*make_certificate(tmp_path))

    async def main(act: Callable[[int], Awaitable[None]], handshake_timeout_s: float) -> None:
        service = make_service(engine, {"demo": text}, AppSettings())
        http = bounded_protocol(Connections(ConnectionLimits(64), service.refused))
        config = uvicorn.Config(app_of(service), http=http, ws="none", lifespan="off", log_config=None)
        config.timeout_graceful_shutdown = 1
        listener = socket.create_server(("127.0.0.1", 0))
        server = BoundedServer(config, context, handshake_timeout_s)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(WAIT_S):
                await act(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await task

    def run_with(act: Callable[[int], Awaitable[None]], handshake_timeout_s: float) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main(act, handshake_timeout_s))

    return run_with


async def ask(port: int, context: ssl.SSLContext) -> tuple[bytes, str]:
    """The answer, and the cipher."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    with closing(writer):
        writer.write(LIVE)
        return await reader.read(), writer.get_extra_info("cipher")[0]


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_end_is_closed(run: Run, sent: bytes) -> None:
    """Guards files and memory against connections that say nothing: asyncio keeps each for 60 s."""

    async def act(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            writer.write(sent)
            try:
                assert await reader.read() == b""
            except ConnectionError:
                pass

    assert ConnectionLimits(1).head_timeout_s == HANDSHAKE_TIMEOUT_S
    run(act, 0.1)


def test_ciphers_are_those_of_python(run: Run) -> None:
    """Guards against uvicorn's list of ciphers: in TLS 1.2 it has none but those of CBC, without authentication of the
    record's bytes, and anonymous ones."""

    async def act(port: int) -> None:
        context = own_server_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AESGCM")
        answer, cipher = await ask(port, context)
        assert answer.startswith(b"HTTP/1.1 200") and "GCM" in cipher
        context.set_ciphers("ECDHE-RSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA:AECDH:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(port, context)

    run(act, WAIT_S)
