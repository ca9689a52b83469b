"""Clients that do not read their stream, over real sockets: they end, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import httpx
import msgspec
import pytest
import uvicorn
from starlette.types import Message

from baton.proxy.http.app import app_of
from baton.proxy.http.asgi import ReadWatch, Reply
from baton.proxy.http.service import Service, make_service
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

ENDLESS = 1 << 20
"""Tokens: more than all buffers on the way hold."""
SMALL_BUFFER_BYTES = 4096


def _script(call: EngineCall) -> list[ScriptStep]:
    num_tokens = call.sampling.max_tokens
    return [Delta((300,))] * (num_tokens - 1) + [Delta((300,), finish="length")]


@asynccontextmanager
async def _serving(service: Service) -> AsyncIterator[int]:
    """The port of a server with the app."""
    server = uvicorn.Server(uvicorn.Config(app_of(service), port=0, lifespan="off", log_level="warning"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


def _request(max_tokens: int) -> bytes:
    body = msgspec.json.encode({"model": "demo", "prompt": "Hi", "max_tokens": max_tokens, "stream": True})
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def test_a_client_that_does_not_read_is_ended_and_others_are_not(
    text: ModelText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the proxy's memory and the worker's slot: without an end such a client holds both until its deadline."""
    monkeypatch.setattr("baton.proxy.http.asgi.READ_TIMEOUT_S", 0.1)
    engine = FakeEngine(_script, model_len=2 * ENDLESS)
    service = make_service(engine, {"demo": text}, AppSettings())
    async with _serving(service) as port:
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            silent.connect(("127.0.0.1", port))
            silent.sendall(_request(ENDLESS))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                asked = {"model": "demo", "prompt": "Hi", "max_tokens": 5, "stream": True}
                answer = await client.post("/v1/completions", json=asked)
                assert answer.text.count("data: ") == 6 and answer.text.endswith("data: [DONE]\n\n")
                await _until(lambda: not service.limit.inside)
                page = (await client.get("/metrics")).text
    assert 'baton:request_failures_total{kind="slow_reader",model_name="demo"} 1.0' in page
    (stalled,) = [call.request_id for call in engine.calls if call.sampling.max_tokens == ENDLESS]
    assert stalled in engine.cancelled and not engine.running


async def test_a_client_that_reads_between_two_looks_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards clients on slow links: one that reads now and then is not taken for one that does not. The test is the
    clock: it looks when the watch would."""
    read, looks = asyncio.Semaphore(1), list[Callable[[], None]]()
    loop = asyncio.get_running_loop()

    def call_later(delay_s: float, look: Callable[..., None], *seen: object) -> asyncio.Handle:
        looks.append(partial(look, *seen))
        return asyncio.Handle(looks[-1], (), loop)

    async def send(message: Message) -> None:
        await read.acquire()

    async def write() -> None:
        while True:
            await reply.events(b"data: x\n\n")

    monkeypatch.setattr(loop, "call_later", call_later)
    reply = Reply(send, {})
    writing = asyncio.create_task(write())
    await _until(lambda: reply.waiting_write == 0)
    with ReadWatch(reply) as watch:
        for number in range(1, 5):
            read.release()
            await _until(lambda number=number: reply.waiting_write == number)  # type: ignore[misc]
            looks.pop()()
            assert not watch.stalled.done()
        looks.pop()()
        assert watch.stalled.done()
    writing.cancel()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0)


async def test_a_client_that_reads_slowly_gets_all(text: ModelText) -> None:
    """Guards the end of answers that wait for their client again and again."""
    num_tokens = 3000
    service = make_service(FakeEngine(_script, model_len=2 * num_tokens), {"demo": text}, AppSettings())
    async with _serving(service) as port:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        slow.connect(("127.0.0.1", port))
        slow.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=slow, limit=SMALL_BUFFER_BYTES)
        writer.write(_request(num_tokens))
        got = bytearray()
        while not got.endswith(b"0\r\n\r\n"):
            got += await reader.read(SMALL_BUFFER_BYTES)
            await asyncio.sleep(0)
        writer.close()
    assert got.count(b"data: ") == num_tokens + 1 and b"data: [DONE]" in got
