"""node.http_client against scripted servers: every body framing, kept and lost connections, clear errors."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest

from baton.node.errors import SettingsError
from baton.node.http_client import MAX_IDLE_S, HttpClient, HttpFailed, Origin
from baton.tests.unit.benchmark.load.scripted import (
    STREAM_END,
    STREAM_HEAD,
    ManualClock,
    Script,
    framed,
    read_request,
    server,
)


def answering(*answers: bytes, close: bool = False) -> Script:
    """A server script that answers successive requests with these bytes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await read_request(reader)
            writer.write(answer)
            await writer.drain()
        if close:
            writer.close()

    return script


async def get(http: HttpClient) -> tuple[int, bytes]:
    async with asyncio.timeout(60):
        return await http.get("/x")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello")),
        (STREAM_HEAD + framed(b"he") + framed(b"llo") + STREAM_END, (200, b"hello")),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello")),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", (503, b"busy")),
    ],
)
async def test_bodies_of_every_framing(answer: bytes, expected: tuple[int, bytes]) -> None:
    async with server(answering(answer)) as origin:
        with closing(HttpClient(origin, {}, ManualClock().now_s)) as http:
            assert await get(http) == expected


async def test_a_body_that_ends_with_its_connection() -> None:
    """Guards against failing every request to a server that ends bodies by closing the connection."""
    async with server(answering(b"HTTP/1.1 200 OK\r\n\r\nhello", close=True)) as origin:
        with closing(HttpClient(origin, {}, ManualClock().now_s)) as http:
            assert await get(http) == (200, b"hello")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "connection lost before an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "in the middle of an answer"),
        (STREAM_HEAD + framed(b"he"), "in the middle of an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP"),
    ],
)
async def test_a_truncated_response_is_a_failure(answer: bytes, reason: str) -> None:
    """Guards measurements: a truncated response counted as complete makes a dying server look fast."""
    async with server(answering(answer, close=True)) as origin:
        http = HttpClient(origin, {}, ManualClock().now_s)
        with closing(http), pytest.raises(HttpFailed, match=reason):
            await get(http)


async def test_a_refused_connection_names_the_address() -> None:
    unreachable = Origin("127.0.0.1", 1, False, "")
    with closing(HttpClient(unreachable, {}, ManualClock().now_s)) as http, pytest.raises(HttpFailed) as failure:
        await get(http)
    assert "cannot connect to http://127.0.0.1:1: " in str(failure.value)


async def test_connections_are_reused_until_idle_too_long() -> None:
    """Guards against a round trip per request, and against requests on a connection that is about to close."""
    clock, connections = ManualClock(), []
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await answering(ok, ok, ok)(reader, writer)

    async with server(script) as origin:
        with closing(HttpClient(origin, {}, clock.now_s)) as http:
            await get(http)
            await get(http)
            assert len(connections) == 1
            clock.now += MAX_IDLE_S
            await get(http)
            assert len(connections) == 2


async def test_a_connection_that_the_server_closes_is_not_reused() -> None:
    close = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with server(answering(close)) as origin:
        with closing(HttpClient(origin, {}, ManualClock().now_s)) as http:
            assert [await get(http) for _ in range(3)] == [(200, b"")] * 3


async def test_a_sink_that_returns_false_ends_the_exchange_and_the_connection() -> None:
    """Guards disconnect tests: the server must see the end of the connection."""
    gone = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + framed(b"one"))
        try:
            await reader.read()
        except ConnectionResetError:
            pass
        gone.set()

    async with server(script) as origin:
        with closing(HttpClient(origin, {}, ManualClock().now_s)) as http:
            async with asyncio.timeout(60):
                assert await http.exchange(http.request("GET", "/", b""), lambda data, now_s: False) == 200
                await gone.wait()


async def test_the_request_bytes() -> None:
    """Guards against a wrong length or missing key, which would only appear as a server's error."""
    asked = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"{}"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with server(script) as origin:
        origin = Origin(origin.host, origin.port, False, "/base")
        with closing(HttpClient(origin, {"Authorization": "Bearer k"}, ManualClock().now_s)) as http:
            async with asyncio.timeout(60):
                await http.exchange(http.request("POST", "/v1/completions", b"{}"), lambda data, now_s: True)
    head, _, body = asked[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/v1/completions HTTP/1.1" and body == b"{}"
    assert f"Host: 127.0.0.1:{origin.port}" in lines and "Content-Length: 2" in lines
    assert "Authorization: Bearer k" in lines and "Accept-Encoding: identity" in lines


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:8000", Origin("127.0.0.1", 8000, False, "")),
        ("http://host/", Origin("host", 80, False, "")),
        ("https://host/api/v1/", Origin("host", 443, True, "/api")),
        ("http://[::1]:9/v1", Origin("::1", 9, False, "")),
    ],
)
def test_urls(url: str, origin: Origin) -> None:
    assert Origin.parse(url) == origin and Origin.parse(str(origin)) == origin


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"]
)
def test_an_invalid_url_is_a_settings_error(url: str) -> None:
    with pytest.raises(SettingsError, match="URL"):
        Origin.parse(url)
