"""A port that says whether a node lives and is ready, for Kubernetes and others: workers and stores have no other HTTP.

`GET /live` and `GET /ready` are answered with 200, or 503 and the reason; no key is asked for, nothing else is said. A
thread of its own answers, from what the node's loops note anyway, so that neither a step nor a stopped loop delays it.
This module does not know any node: `NodeState` is what one says of itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from baton.node.addresses import host_of
from baton.node.errors import SettingsError

LIVE_S = 10.0
"""A loop that has not turned for so long is stopped. An idle one turns several times a second."""
EXCHANGE_S = 2.0
"""A connection ends after this time, whatever was said."""
MAX_CONNECTIONS = 32
"""At the bound, a new connection takes the place of the oldest, so that idle ones keep no probe out."""
MAX_HEAD_BYTES = 8192
BACKLOG = 128
SIOCGIFADDR = 0x8915
STARTING = "starting"
PROBE_HELP = "port of /live and /ready over HTTP, at the host of --bind, for probes; default: none"


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node says of itself at this moment."""

    turned_at: float
    """When the loop that is furthest behind last turned, on the monotonic clock."""
    unready: str
    """Why it takes no requests; "": it does."""


def answer_of(request_line: bytes, state: NodeState, now: float) -> tuple[int, str]:
    """Status and text of the answer."""
    method, _, rest = request_line.decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    stopped_s = now - state.turned_at
    stopped = f"no turn of the loop for {stopped_s:.0f} s" if stopped_s > LIVE_S else ""
    match path:
        case "/live" | "/ready" if method != "GET":
            return 405, "GET only"
        case "/live":
            return (503, stopped) if stopped else (200, "live")
        case "/ready":
            reason = stopped or state.unready
            return (503, reason) if reason else (200, "ready")
    return 404, "there are /live and /ready"


class NoProbes:
    """For a node without a probe port."""

    def watch(self, state: Callable[[], NodeState]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Probes:
    """Answers at a port from `__enter__` to `__exit__`; until `watch`, the node starts: it lives, and is not ready."""

    def __init__(self, host: str, port: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`host` "" stands for all addresses. Raises SettingsError where the port cannot be had."""
        self._clock = clock
        self._state = self._starting
        self._open: dict[_Exchange, None] = {}  # the oldest first
        self._listener = _listen(host, port)
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def watch(self, state: Callable[[], NodeState]) -> None:
        """From now on, answer from `state`, which is called by the thread of the probes."""
        self._state = state

    def __enter__(self) -> Self:
        self._listener.listen(BACKLOG)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(EXCHANGE_S)

    def admit(self, exchange: _Exchange) -> None:
        """Called by a new connection."""
        if len(self._open) >= MAX_CONNECTIONS:
            next(iter(self._open)).abort()
        self._open[exchange] = None

    def forget(self, exchange: _Exchange) -> None:
        self._open.pop(exchange, None)

    def answer(self, request_line: bytes) -> tuple[int, str]:
        return answer_of(request_line, self._state(), self._clock())

    def _starting(self) -> NodeState:
        return NodeState(self._clock(), STARTING)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await self._loop.create_server(lambda: _Exchange(self), sock=self._listener, backlog=BACKLOG)
        await self._ended.wait()
        server.close()
        for exchange in list(self._open):
            exchange.abort()
        await asyncio.sleep(0)  # transports close in a turn of the loop


class _Exchange(asyncio.Protocol):
    """One connection: a head, an answer, the end."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._head = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._probes.admit(self)
        self._timer = asyncio.get_running_loop().call_later(EXCHANGE_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._head += data
        if b"\r\n\r\n" in self._head or len(self._head) > MAX_HEAD_BYTES:
            self._transport.pause_reading()
            self._write(*self._probes.answer(bytes(self._head.partition(b"\r\n")[0])))
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._probes.forget(self)

    def abort(self) -> None:
        self._probes.forget(self)
        self._transport.abort()

    def _write(self, status: int, text: str) -> None:
        reason = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[status]
        body = f"{text}\n".encode()
        self._transport.write(
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            f"Cache-Control: no-store\r\nConnection: close\r\n\r\n".encode()
            + body
        )


def open_probes(port: int | None, bind: str) -> Probes | NoProbes:
    """The probes of a node that is bound at this address. Raises SettingsError where the port cannot be had."""
    return NoProbes() if port is None else Probes(host_of(bind), port)


def _listen(host: str, port: int) -> socket.socket:
    """Bound, but not listening yet. All addresses of IPv6 are those of IPv4 too, as with ZeroMQ's sockets."""
    host = _of_interface(host) or host
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(f"--probe-port {port}: no address for {host!r}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingsError(f"--probe-port {port}: cannot listen at {host or '*'}: {error.strerror}") from None
    return listener


def _of_interface(name: str) -> str:
    """The IPv4 address of a network interface, which ZeroMQ binds by its name; "" where there is none of this name.
    (SIOCGIFADDR of netdevice(7).)"""
    if name not in (interface for _, interface in socket.if_nameindex()):
        return ""
    request = struct.pack("16s24x", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            return socket.inet_ntoa(fcntl.ioctl(asking, SIOCGIFADDR, request)[20:24])
        except OSError:
            return ""
