"""The memory that all bodies have together, and what becomes of one that does not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from baton.node.errors import BadRequest, Overloaded
from baton.proxy.http.app import app_of
from baton.proxy.http.bodies import BodyMemory, read_body
from baton.proxy.http.service import make_service
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

SCOPE: dict[str, Any] = {"type": "http", "headers": []}
Message = dict[str, Any]


def sends(*parts: bytes, then: asyncio.Event | None = None) -> Callable[[], Awaitable[Message]]:
    """A client that sends `parts`, and the last one after `then`."""
    left = list(parts)

    async def receive() -> Message:
        if len(left) == 1 and then is not None:
            await then.wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return receive


def memory(limit_bytes: int, gives_way_after_s: float = 0.0) -> tuple[BodyMemory, list[int]]:
    refused: list[int] = []
    return BodyMemory(limit_bytes, lambda: refused.append(1), gives_way_after_s), refused


async def read(bodies: BodyMemory, receive: Callable[[], Awaitable[Message]], max_bytes: int = 1 << 20) -> bytes:
    with bodies.hold() as held:
        await read_body(SCOPE, receive, max_bytes, held)
        return held.content


async def test_a_body_counts_until_it_is_let_go_of() -> None:
    """Guards against memory that is given back too early, or never."""
    bodies, _ = memory(10)
    with bodies.hold() as held:
        await read_body(SCOPE, sends(b"abc", b"de"), 10, held)
        assert (held.content, bodies.used_bytes) == (b"abcde", 5)
        held.clear()
        assert bodies.used_bytes == 0
    assert bodies.used_bytes == 0
    for receive, error in ((sends(b"abc", b"x" * 20), BadRequest), (sends(b"x" * 9, b"x" * 9), Overloaded)):
        with pytest.raises(error):
            await read(bodies, receive, 15 if error is BadRequest else 20)
        assert bodies.used_bytes == 0


async def test_a_mark_of_utf8_is_no_part_of_a_body() -> None:
    """Guards against a file of an editor of Windows that is sent as it is, and refused as no JSON."""
    bodies, _ = memory(100)
    with bodies.hold() as held:
        await read_body(SCOPE, sends(b"\xef\xbb", b"\xbf{}"), 10, held)
        assert held.content == b"{}"


async def test_a_compressed_body_is_refused_as_such() -> None:
    """Guards a client that compresses from an error about JSON."""
    bodies, _ = memory(100)
    scope = {**SCOPE, "headers": [(b"content-encoding", b"gzip")]}
    with bodies.hold() as held, pytest.raises(BadRequest, match="Content-Encoding gzip") as raised:
        await read_body(scope, sends(b"\x1f\x8b"), 10, held)
    assert raised.value.status == 415


async def test_an_old_body_gives_way_to_a_new_one() -> None:
    """Guards against unfinished bodies that keep everybody else out."""
    bodies, refused = memory(10)
    never = asyncio.Event()
    stalled = asyncio.create_task(read(bodies, sends(b"x" * 9, b"x", then=never)))
    while bodies.used_bytes < 9:
        await asyncio.sleep(0)
    assert await read(bodies, sends(b"abc", b"de")) == b"abcde"
    with pytest.raises(Overloaded) as raised:
        await asyncio.wait_for(stalled, 20)
    assert (raised.value.status, refused, bodies.used_bytes) == (503, [1], 0)


async def test_bodies_that_arrive_fast_are_not_given_up_for_further_ones() -> None:
    """Guards against an overload in which no body ever arrives whole."""
    bodies, refused = memory(10, gives_way_after_s=1e6)
    last = asyncio.Event()
    first = asyncio.create_task(read(bodies, sends(b"x" * 8, b"y", then=last)))
    while bodies.used_bytes < 8:
        await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await read(bodies, sends(b"abc", b"de"))
    last.set()
    assert await asyncio.wait_for(first, 20) == b"x" * 8 + b"y"
    assert refused == [1]


async def test_a_complete_body_does_not_give_way() -> None:
    """Guards against taking a body away from the request that is reading it."""
    bodies, _ = memory(10)
    with bodies.hold() as held:
        await read_body(SCOPE, sends(b"x" * 9), 10, held)
        with pytest.raises(Overloaded):
            await read(bodies, sends(b"abc"))
        assert held.content == b"x" * 9


async def test_a_request_without_room_gets_503(engine: FakeEngine, text: ModelText) -> None:
    """Guards against an answer that says the client did something wrong, or that nothing is counted."""
    service = make_service(engine, {"demo": text}, AppSettings(body_memory_bytes=50))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(service)), base_url="http://proxy") as client:
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Tom " * 100})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "service_unavailable"
        assert service.metrics.refused["body_memory"]._value.get() == 1
        assert (await client.post("/tokenize", json={"prompt": "Tom"})).status_code == 200
        assert service.bodies.used_bytes == 0


async def test_a_body_is_let_go_of_once_its_prompt_is_tokens(engine: FakeEngine, text: ModelText) -> None:
    """Guards against bodies that stay in memory as long as their answers take."""
    service = make_service(engine, {"demo": text}, AppSettings())
    used: list[int] = []

    def script(call: EngineCall) -> list[ScriptStep]:
        used.append(service.bodies.used_bytes)
        return [Delta((300,), (), "length")]

    engine.script = script
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(service)), base_url="http://proxy") as client:
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Tom", "echo": True})
        assert answer.json()["choices"][0]["text"].startswith("Tom")
    assert used == [0]


async def test_bodies_that_arrive_take_no_place_of_a_request(engine: FakeEngine, text: ModelText) -> None:
    """Guards against slow bodies that use up the requests which are answered at once."""
    service = make_service(engine, {"demo": text}, AppSettings(max_requests=1))

    tenant = service.tenants.of_key(b"")
    assert tenant is not None

    async def never_ends() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def hold() -> None:
        async with service.body(SCOPE, never_ends, tenant):
            pass

    slow = asyncio.create_task(hold())
    await asyncio.sleep(0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(service)), base_url="http://proxy") as client:
        assert (await client.post("/v1/completions", json={"model": "demo", "prompt": "Tom"})).status_code == 200
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
