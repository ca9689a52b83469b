"""An HTTP/1.1 client on asyncio: takes request bytes, returns the response body with the time of each read.

httptools parses what asyncio's protocols read. The path from the socket to the timestamp is short, so that a load
generator measures the server and not its client; docs/benchmarking.md compares it with aiohttp. It does not know the
OpenAI API.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from baton.node.errors import SettingsError

Sink = Callable[[bytes, float], bool]
"""Takes body bytes and the time of their read; False closes the connection."""

MAX_IDLE_S = 2.0
"""Longest idle time of a reused connection. Servers close idle ones after 5 s or more; a request sent on a connection
that is just being closed would fail."""
MAX_GET_BYTES = 1 << 16


class HttpFailed(Exception):
    """The response is missing or incomplete; the message gives the reason in one line."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The address of a server, parsed from its URL."""

    host: str
    port: int
    tls: bool
    prefix: str
    """Path before /v1, without a slash at its end."""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Parse `url`, without a trailing /v1, which OpenAI clients include. Raises SettingsError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise SettingsError(f"{url!r} is no URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"{url!r} is no URL of the form http://HOST:PORT")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, prefix)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


class HttpClient:
    """Connections to one server, kept alive between requests. Close it in the event loop that used it."""

    def __init__(self, origin: Origin, headers: Mapping[str, str], clock: Callable[[], float]) -> None:
        self.origin = origin
        self._clock = clock
        self._ssl = ssl.create_default_context() if origin.tls else None
        host = str(origin).removesuffix(origin.prefix).partition("://")[2]
        lines = {"Host": host, "Accept-Encoding": "identity", "User-Agent": "baton", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: bytes) -> bytes:
        """The bytes of a request, so that they can be built before the time at which they are sent."""
        first = f"{method} {self.origin.prefix}{path} HTTP/1.1\r\n".encode()
        length = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
        return b"".join((first, self._head, length, b"\r\n", body))

    async def exchange(self, request: bytes, sink: Sink) -> int:
        """Send, and pass the response body to `sink`; returns the status. Raises HttpFailed."""
        connection = self._take() or await self._connect()
        try:
            status = await connection.exchange(request, sink)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; the body is at most MAX_GET_BYTES."""
        parts: list[bytes] = []

        def sink(data: bytes, _: float) -> bool:
            parts.append(data)
            return sum(map(len, parts)) < MAX_GET_BYTES

        return await self.exchange(self.request("GET", path, b""), sink), b"".join(parts)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and self._clock() - connection.idle_since_s < MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        origin = self.origin
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._clock), origin.host, origin.port, ssl=self._ssl
            )
        except ssl.SSLCertVerificationError as error:
            hint = "SSL_CERT_FILE names a file with certificates to trust"
            raise HttpFailed(f"cannot connect to {origin}: {error.verify_message}; {hint}") from None
        except OSError as error:
            raise HttpFailed(f"cannot connect to {origin}: {error.strerror or error}") from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. httptools calls the `on_` methods."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.idle_since_s = 0.0
        self.reusable = False
        self._clock = clock
        self._now_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[int] | None = None
        self._status = 0
        self._until_close = True

    async def exchange(self, request: bytes, sink: Sink) -> int:
        assert self._done is None and self._transport is not None
        self.reusable = False
        self._parser = httptools.HttpResponseParser(self)
        self._sink, self._status, self._until_close = sink, 0, True
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = self._sink = None

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        self._now_s = self._clock()
        if self._done is None:  # no request is in flight: the server closes this connection
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._status and self._until_close and error is None:
            self._finish()
        else:
            self._fail(f"connection lost{' before an answer' if not self._status else ' in the middle of an answer'}")

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_close = False

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._sink is not None and not self._sink(body, self._now_s):
            self._sink = None
            self.close()
            self._finish()

    def on_message_complete(self) -> None:
        if self._status < 200:  # an interim response
            self._status = 0
            return
        self.reusable = self._parser.should_keep_alive() and not self._until_close
        self.idle_since_s = self._now_s
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._status)

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpFailed(message))
        self.close()
