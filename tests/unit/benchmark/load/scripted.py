"""A server of scripted bytes, and clocks that only a test moves: what the client is tested against."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from baton.node.http_client import Origin

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ManualClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    def now_s(self) -> float:
        self.reads += 1
        return self.now

    async def read_again(self) -> None:
        """Until this clock has been read: the client, as it reads bytes."""
        before = self.reads
        async with asyncio.timeout(60):
            while self.reads == before:
                await asyncio.sleep(0)


@asynccontextmanager
async def server(script: Script) -> AsyncIterator[Origin]:
    """Plays `script` for each connection."""
    listening = await asyncio.start_server(script, "127.0.0.1", 0)
    try:
        yield Origin("127.0.0.1", listening.sockets[0].getsockname()[1], False, "")
    finally:
        listening.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Its first line and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0)
    return head.split("\r\n")[0], await reader.readexactly(length)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


def framed(data: bytes) -> bytes:
    """One chunk of HTTP's chunked coding."""
    return b"%x\r\n%s\r\n" % (len(data), data)
