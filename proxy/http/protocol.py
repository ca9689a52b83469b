"""uvicorn's HTTP protocol with bounds on what it leaves unbounded: heads, framing, pipelining, times, connections.

uvicorn bounds bodies that are not read (64 KiB, then it stops reading) and idle connections that were answered (5 s).
Its parser, httptools over llhttp, refuses ambiguous framing (two lengths, a length beside chunks), but takes a request
line, headers, trailers and chunk extensions of any size, and so at any speed; and uvicorn takes any number of
connections, and of requests ahead of their answers. A refusal is answered here, before any route, key or log of
access sees the request; how long each phase may take is decided in `connections`. Nothing here runs for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from baton.proxy.http.connections import Connections, Phase
from baton.proxy.http.failures import Failure

MAX_URL_BYTES = 8 << 10
MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 << 10
"""Of request line and headers. As much may be added by trailers and the framing of chunks, plus the size of the body:
chunks of six bytes and more need less."""
MAX_PIPELINED = 8
"""Requests that were sent before the answer to an earlier one; the connection is closed after the last of these."""
RETRY_AFTER_S = 1.0


class _ParsingStopped(Exception):
    """Raised in a callback, to stop the parser."""


@dataclass(frozen=True, slots=True)
class HttpRefusal:
    reason: str
    failure: Failure


def _refusal(reason: str, status: int, message: str, code: str, retry_after_s: float = 0.0) -> HttpRefusal:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return HttpRefusal(reason, Failure(status, message, kind, None, code, retry_after_s))


_LONG_URL = _refusal("head_too_large", 414, f"the URL has more than {MAX_URL_BYTES} bytes", "url_too_long")
_LARGE_HEAD = _refusal(
    "head_too_large",
    431,
    f"more than {MAX_HEADERS} headers, or {MAX_HEAD_BYTES} bytes of them",
    "headers_too_large",
)
_FRAMING = _refusal("head_too_large", 400, "trailers or chunks with too few bytes of the body", "invalid_framing")
_MALFORMED = _refusal("malformed", 400, "this is not a valid HTTP/1.1 request", "invalid_http")
_VERSION = _refusal("malformed", 505, "only HTTP/1.0 and HTTP/1.1 are spoken here", "http_version_not_supported")
_HOST = _refusal("malformed", 400, "HTTP/1.1 needs one header Host", "invalid_http")
_SLOW = {
    Phase.HEAD: _refusal("slow_head", 408, "the headers did not arrive in time", "request_timeout"),
    Phase.BODY: _refusal("slow_body", 408, "the body arrives too slowly", "request_timeout"),
}
_FULL = _refusal("too_many_connections", 503, "too many connections", "service_unavailable", RETRY_AFTER_S)


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn; `connections` are those of its server."""

    def __init__(self, connections: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._connections = connections
        self.since_s = self.loop.time()
        self.body_bytes = 0
        self._num_messages = 0
        self._num_headers = 0
        self._head_bytes = 0
        self._framing_bytes = 0
        """Of the request that is arriving: what came in reads of their own and is no body. Less than there is, by at
        most the read in which the request began."""
        self._receiving = False
        self._in_head = False
        self._deaf = False
        """What else arrives is thrown away."""
        self._closing = False
        """It was refused; the client is given time to read why."""
        self._refusal: HttpRefusal | None = None
        """Why a callback has stopped the parser."""
        self._answering: RequestResponseCycle | None = None
        """The request that is answered; `cycle` is the latest that began to arrive."""

    @property
    def phase(self) -> Phase:
        if self._closing or self.transport.is_closing():
            return Phase.CLOSING
        if self.cycle is not None and not self.cycle.response_complete:
            waits_for_client = self.cycle.more_body and not self.pipeline and not self.flow.read_paused
            return Phase.BODY if waits_for_client else Phase.ANSWER
        if not self._receiving:
            return Phase.IDLE
        return Phase.HEAD if self._in_head else Phase.DRAIN

    @property
    def unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def too_slow(self, phase: Phase) -> None:
        if phase in _SLOW:
            self._refuse(_SLOW[phase])
        elif phase is Phase.CLOSING:
            if self.unsent_bytes:
                self._connections.on_refused("slow_reader", None)
            self.transport.abort()
        else:
            self._close_for_writing()
            self.transport.close()

    def drop(self) -> None:
        self.transport.abort()

    # What uvicorn and the parser call

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not self._connections.admit(self):
            self._refuse(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        message, body_bytes = self._num_messages, self.body_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if not self._deaf:
                self._refuse(self._refusal or _MALFORMED)
            return
        if self._receiving and self._num_messages == message:
            self._framing_bytes += len(data) - (self.body_bytes - body_bytes)
            if self._framing_bytes > MAX_HEAD_BYTES + self.body_bytes:
                self._refuse(_LARGE_HEAD if self._in_head else _FRAMING)

    def _parse(self, data: bytes) -> None:
        """No other protocol is spoken here. The parser takes what follows a head that asks for one as none of HTTP,
        also the body: so the head is read once more without its wish. Clients of Java send it with every request."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._asks_for_upgrade():
                    return
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _asks_for_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return line + b"".join(kept) + b"\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_messages += 1
        self._num_headers = self._head_bytes = self._framing_bytes = self.body_bytes = 0
        self._receiving = self._in_head = True
        self.since_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop(_LONG_URL)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._head_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            self._stop(_LARGE_HEAD)
        if self._in_head:  # a trailer is no header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._asks_for_upgrade():
            return
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(_VERSION)
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (version == "1.1" and not num_hosts):
            self._stop(_HOST)
        self._in_head = False
        self.since_s = self.loop.time()
        super().on_headers_complete()
        if self.pipeline and sum(len(cycle.body) for cycle, _ in self.pipeline) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # a client that leaves is noticed by reading alone
        if version == "1.0":
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[assignment,method-assign]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._asks_for_upgrade():
            return
        self._receiving = False
        super().on_message_complete()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._connections.on_refused("too_many_pipelined", None)
            self._deaf = True
            raise _ParsingStopped

    def on_response_complete(self) -> None:
        self.since_s = self.loop.time()
        was_last = self._deaf and not self.pipeline
        super().on_response_complete()
        if was_last and not self.transport.is_closing():
            self._close_for_writing()

    def _stop(self, refusal: HttpRefusal) -> None:
        self._refusal = refusal
        raise _ParsingStopped

    def _refuse(self, refusal: HttpRefusal) -> None:
        """Answer, unless another answer has begun."""
        self._deaf = True
        self._connections.on_refused(refusal.reason, refusal.failure)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._in_head or cycle.response_started or self.pipeline:
                self.transport.close()
                return
            cycle.disconnected = True  # for its route, the client has gone
            cycle.message_event.set()
        self.transport.write(_answer(refusal.failure))
        self._close_for_writing()

    def _close_for_writing(self) -> None:
        """Read on for a while: closing at once, with something unread, would take the answer from the client."""
        self._deaf = self._closing = True
        self._unset_keepalive_if_required()
        self.since_s = self.loop.time()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()


def bounded_protocol(connections: Connections) -> Any:
    """What uvicorn.Config takes as `http`: a maker of protocols."""
    return partial(BoundedHttpProtocol, connections)


def _without_chunks(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """HTTP/1.0 has no chunks, which uvicorn makes of an answer without a length: it ends with the connection there."""
    send, has_length = cycle.send, False

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if has_length else False
        elif not has_length:  # uvicorn counts down to 0, which it must reach with the last part
            cycle.expected_content_length = len(message.get("body", b"")) + bool(message.get("more_body"))
        await send(message)

    return send_plain


def _answer(failure: Failure) -> bytes:
    body = failure.body()
    more = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**failure.headers, **more}.items())
    return f"HTTP/1.1 {failure.status} {HTTPStatus(failure.status).phrase}\r\n{lines}\r\n".encode() + body
