"""node.local_http: an answer of another process of this user, or none; never an exception, never another user's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from baton.node import local_http
from baton.node.errors import SettingsError
from baton.node.local_http import proxy_socket, require_private

LONG_S = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as path:  # pytest's own are too long for a socket
        yield Path(path)


@asynccontextmanager
async def answering(socket: Path, answer: bytes | None) -> AsyncIterator[list[bytes]]:
    """A server that gives this answer to each request, or none; yields the requests."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        if answer is not None:
            writer.write(answer)
            writer.close()

    server = await asyncio.start_unix_server(serve, str(socket))
    try:
        yield requests
    finally:
        server.close()


async def test_a_whole_answer_is_returned(folder: Path) -> None:
    """Guards metrics larger than a read, and statuses other than 200."""
    socket, body = proxy_socket(folder, 0), b"x" * 300_000
    async with answering(socket, b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as requests:
        assert await local_http.get(socket, "/metrics", LONG_S) == (503, body)
    assert requests[0].startswith(b"GET /metrics HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfour",
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nx",
        b"x" * 100_000,
    ],
)
async def test_a_broken_answer_is_none(folder: Path, answer: bytes) -> None:
    """Guards a scrape against a proxy that dies while it answers."""
    socket = proxy_socket(folder, 0)
    async with answering(socket, answer):
        assert await local_http.get(socket, "/", LONG_S) == (0, b"")


async def test_nothing_and_silence_are_none(folder: Path) -> None:
    """Guards a scrape against a proxy that restarts, and one that is frozen."""
    socket = proxy_socket(folder, 0)
    assert await local_http.get(socket, "/", LONG_S) == (0, b"")
    async with answering(socket, None):
        assert await local_http.get(socket, "/", 0.0) == (0, b"")


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_a_folder_that_others_can_enter_is_refused(folder: Path, mode: int) -> None:
    """Guards against another user who speaks for a proxy, or asks it without a key."""
    require_private(folder)
    folder.chmod(mode)
    with pytest.raises(SettingsError, match="0700"):
        require_private(folder)
    with pytest.raises(SettingsError, match="No such file"):
        require_private(folder / "nothing")
    folder.chmod(0o700)
