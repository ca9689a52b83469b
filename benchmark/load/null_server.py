"""A server that computes nothing: it streams ready-made chunks in OpenAI's format as fast as its client reads them.

What a client measures here is the client. `baton bench null-server` runs one; self_test measures with it.
Each token is a write of its own, as in a real server, unless the client reads too slowly. It owns as much of HTTP as
that takes: POST with a Content-Length, GET /v1/models. Not for a network: it checks nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
from uvicorn.loops.auto import auto_loop_factory

from baton.node.decoding import DECODE_ERRORS
from baton.node.settings import option, parse, require_loopback

MAX_REQUEST_BYTES = 64 << 20
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"null",'
    b'"choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NullServerSettings:
    host: str = option("127.0.0.1", help="address to listen on: of this machine")
    port: int = option(0, help="port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    gap_ms: float = option(0.0, unit="ms", help="time between two tokens of a stream; 0 is as fast as they are read")

    def __post_init__(self) -> None:
        require_loopback(self.host, insecure_network=False)


class _Wanted(msgspec.Struct):
    max_tokens: int = 16
    prompt: list[int] | str = ""


def main(argv: Sequence[str]) -> int:
    settings = parse(NullServerSettings, argv, "baton bench null-server", "Streams tokens that are not computed.")
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(serve(settings))


async def start(settings: NullServerSettings) -> asyncio.Server:
    """A server that accepts; its port is in `sockets`."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(settings.gap_ms / 1000), settings.host, settings.port)


async def serve(settings: NullServerSettings) -> int:
    """Serve until cancelled."""
    server = await start(settings)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"ready http://{host}:{port}", flush=True)
    await server.serve_forever()
    return 0


class Connection(asyncio.Protocol):
    """One client; its requests are answered one after the other."""

    models = b'{"object":"list","data":[{"id":"null","object":"model"}]}'

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._left = 0
        self._usage = b""
        self._writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._step()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = _content_length(head)
        if len(body) < length <= MAX_REQUEST_BYTES:
            return
        self._received = b""
        assert self._transport is not None
        if head.startswith(b"GET"):
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(self.models), self.models))
            return
        self.begin(body)

    def begin(self, body: bytes) -> None:
        """Answer a request of this body."""
        assert self._transport is not None
        try:
            wanted = msgspec.json.decode(body, type=_Wanted)
        except DECODE_ERRORS:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self._transport.close()
            return
        self._left = max(1, wanted.max_tokens)
        counted = {"prompt_tokens": len(wanted.prompt), "completion_tokens": self._left}
        self._usage = b"data: %s\n\n" % msgspec.json.encode({"choices": [], "usage": counted})
        self._transport.write(HEAD)
        self._loop.call_soon(self._step)

    def _step(self) -> None:
        """One token, and the next one in the loop's next turn: other streams come in between."""
        if self._transport is None or not self._writable or not self._left:
            return
        self._left -= 1
        if not self._left:
            self._transport.write(b"".join(map(_framed, (TOKEN, self._usage, b"data: [DONE]\n\n"))) + b"0\r\n\r\n")
            return
        self._transport.write(_framed(TOKEN))
        if self._gap_s:
            self._loop.call_later(self._gap_s, self._step)
        else:
            self._loop.call_soon(self._step)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return 0


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
