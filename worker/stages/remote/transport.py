"""The thread at one end of the links between the first stage and those on other hosts: it has the sockets.

The first stage has a ROUTER, to which each other stage connects a DEALER. A link is lost, and with it the worker, as
soon as a message of it is missing or is none, the other end is gone, or nothing came from it for some time: whatever
comes counts, and each end sends a beat every BEAT_S.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.node import sockets
from baton.node.connections import NameHolders, NameTaken
from baton.node.errors import PeerLost
from baton.node.sockets import Context, Options
from baton.node.telemetry import log_event
from baton.node.watch import EVERY_S, DealerWatch, RouterWatch
from baton.worker.ranks.messages import BEAT_S
from baton.worker.stages.remote.messages import (
    MESSAGE_BYTES,
    PIECE_BYTES,
    UNNUMBERED,
    Bytes,
    Channel,
    Parcel,
    ParcelPiece,
    StageBeat,
    StageMessage,
    decode_frames,
    encode_frames,
)

logger = logging.getLogger("stages")

SILENT_S = 10.0
"""Without anything from the other end, while stages load and, at a stage, from the first."""
RETRY_S = 0.002
"""Until what a socket did not take is offered again."""
MAX_MESSAGES_A_TURN = 256
STOP_S = 2.0
OPTIONS = Options(
    max_message_bytes=MESSAGE_BYTES,
    heartbeat_ms=5_000,  # beats notice silence earlier; these are for connections that no stage uses
    heartbeat_timeout_ms=15_000,
    handshake_ms=5_000,
    queued_messages=64,
)
"""Not `immediate`, by which libzmq drops what has arrived and was not read when a connection breaks."""


class TransportHandler(Protocol):
    """What uses a transport. The transport's thread makes all calls."""

    def on_message(self, peer: str, message: StageMessage) -> None: ...

    def on_parcel(self, peer: str, channel: Channel, record: bytes, data: bytearray) -> None: ...

    def on_lost(self, peer: str, reason: str) -> None: ...

    def work(self) -> float:
        """What else the thread does; in how many seconds it is to be called again at the latest."""
        ...

    def sockets(self) -> list[object]:
        """Sockets for which `work` shall be called, when they become readable."""
        ...


@dataclass(slots=True)
class IncomingParcel:
    """A parcel of which pieces are missing."""

    parcel: Parcel
    received: bytearray = field(default_factory=bytearray)

    @property
    def size_bytes(self) -> int:
        return self.parcel.record_bytes + self.parcel.data_bytes


@dataclass(slots=True)
class TransportLink:
    """An end that this one has a conversation with."""

    heard_at: float
    prefix: list[bytes]
    """What a message begins with: the id of its connection, at a ROUTER."""
    num_sent: int = 0
    num_received: int = 0
    incoming: IncomingParcel | None = None
    outbox: deque[list[Bytes]] = field(default_factory=deque)


class Transport:
    """One end: of the first stage, bound at an address, or of another one, connected to it as `identity`."""

    def __init__(self, context: Context, address: str, handler: TransportHandler, *, identity: str = "") -> None:
        """SettingsError if the address cannot be used. `begin` starts the thread."""
        self._handler = handler
        self._watch: RouterWatch | DealerWatch
        if identity:
            self._socket = sockets.open_dealer(
                context, address, OPTIONS, server="stage", identity=identity, secret=secrets.token_bytes(16)
            )
            self._watch = DealerWatch(context, self._socket, address)
        else:
            self._socket = sockets.open_router(context, address, OPTIONS, mandatory=True)
            self._watch = RouterWatch(context, self._socket)
        self._is_router = not identity
        self._holders = NameHolders()
        self.rejected = 0
        """Messages that were none, or of no peer."""
        self._context = context
        self._links: dict[str, TransportLink] = {}
        self._silent_s = SILENT_S
        self._beat_at = self._watched_at = 0.0
        self.turned_at = time.monotonic()
        self._todo: deque[tuple[str, StageMessage, Bytes]] = deque()
        self._waker, self._wakee = sockets.open_pair(context, f"stages-{secrets.token_hex(8)}")
        self._lock = threading.RLock()  # a signal's handler may send, too
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stages", daemon=True)

    @property
    def address(self) -> str:
        return sockets.bound_address(self._socket)

    @property
    def is_connected(self) -> bool:
        """Whether this end's DEALER has a connection."""
        return isinstance(self._watch, DealerWatch) and self._watch.is_established

    def begin(self) -> None:
        self._thread.start()

    # -- from any thread

    def send(self, peer: str, message: StageMessage, data: Bytes = b"") -> None:
        """It is sent in its turn, or the link is lost."""
        self._todo.append((peer, message, data))
        self._wake()

    def send_parcel(self, peer: str, channel: Channel, record: bytes, data: Bytes) -> None:
        parts: list[tuple[str, StageMessage, Bytes]] = [
            (peer, Parcel(channel=channel, record_bytes=len(record), data_bytes=len(data)), b"")
        ]
        for whole in (memoryview(record), memoryview(data)):
            starts = range(0, len(whole), PIECE_BYTES)
            parts += [(peer, ParcelPiece(), whole[start : start + PIECE_BYTES]) for start in starts]
        with self._lock:  # one parcel after the other
            self._todo.extend(parts)
        self._wake()

    def limit_silence(self, silent_s: float) -> None:
        """A link that is silent for longer is lost."""
        self._silent_s = silent_s

    def close(self) -> None:
        """Send what is left, for a moment, and end the thread. May be repeated."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2 * STOP_S)

    # -- for the handler

    def open(self, peer: str, connection: Sequence[bytes] = ()) -> None:
        """From now on messages of this peer are numbered, and it must not be silent."""
        self._links[peer] = TransportLink(time.monotonic(), list(connection))

    def connection_of(self, peer: str) -> list[bytes]:
        """What a message to a peer that is heard begins with."""
        connection = self._holders.connection_of(peer) if self._is_router else None
        return [] if connection is None else [connection]

    def lose(self, peer: str, reason: str) -> None:
        if self._links.pop(peer, None) is not None and not self._stopping.is_set():
            self._handler.on_lost(peer, reason)

    # -- the thread

    def _wake(self) -> None:
        with self._lock:
            if not self._waker.closed:
                sockets.send_frames(self._waker, [b""])

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
            self._send_waiting()
            sockets.linger(self._socket, STOP_S)
        except BaseException as error:  # what waits for the other ends must hear of it
            for peer in list(self._links):
                self.lose(peer, f"is not served: {error}")
            raise
        finally:
            self._watch.close()
            self._socket.close()
            with self._lock:
                self._waker.close()
                self._wakee.close()

    def _turn(self) -> None:
        wait_s = self._handler.work()
        if self._todo or any(link.outbox for link in self._links.values()):
            wait_s = min(wait_s, RETRY_S)
        sockets.wait_readable((self._socket, self._wakee, *self._handler.sockets()), min(wait_s, EVERY_S))
        while sockets.receive_frames(self._wakee) is not None:
            pass
        was_broken = isinstance(self._watch, DealerWatch) and self._watch.breaks > 0
        for _ in range(MAX_MESSAGES_A_TURN):
            frames = sockets.receive_frames(self._socket)
            if frames is None:
                break
            self._take(frames)
        if was_broken:  # and all that came before is read
            for peer in list(self._links):
                self.lose(peer, "is gone")
        self._send_waiting()
        self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Beats, silence, and the connections of the socket."""
        pause_s, self.turned_at = now - self.turned_at, now
        if pause_s > 2 * BEAT_S:  # this process stood still
            for link in self._links.values():
                link.heard_at += pause_s
        if now - self._watched_at >= EVERY_S:
            self._watched_at = now
            self._watch.turn(now)
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            for peer, link in self._links.items():
                if self._is_router or link.num_received:  # the other end has this one for a peer
                    self.send(peer, StageBeat())
        for peer, link in list(self._links.items()):
            if now - link.heard_at > self._silent_s:
                self.lose(peer, "does not answer")

    def _send_waiting(self) -> None:
        for _ in range(len(self._todo)):
            peer, message, data = self._todo.popleft()
            link = self._links.get(peer)
            if isinstance(message, UNNUMBERED):
                with contextlib.suppress(PeerLost):
                    sockets.offer_frames(self._socket, [*self.connection_of(peer), *encode_frames(0, message)])
            elif link is not None:
                link.num_sent += 1
                link.outbox.append(encode_frames(link.num_sent, message, data))
        for peer, link in list(self._links.items()):
            try:
                while link.outbox and sockets.offer_frames(self._socket, [*link.prefix, *link.outbox[0]]):
                    link.outbox.popleft()
            except PeerLost as error:
                self.lose(peer, str(error))

    def _take(self, frames: list[bytes]) -> None:
        peer = self._peer_of(frames.pop(0)) if self._is_router and frames else next(iter(self._links), "")
        link = self._links.get(peer)
        try:
            number, message, data = decode_frames(frames)
            if number and link is None:
                raise PeerLost(f"{type(message).__name__} of none that has joined")
            if number and link is not None:
                self._follow(peer, link, number, message, data)
            elif peer or not self._is_router:
                self._handler.on_message(peer, message)
        except PeerLost as error:
            self._reject(str(error))
            if link is not None:
                self.lose(peer, str(error))

    def _follow(self, peer: str, link: TransportLink, number: int, message: StageMessage, data: bytes) -> None:
        link.heard_at = time.monotonic()
        link.num_received += 1
        if number != link.num_received:
            raise PeerLost(f"message {link.num_received} is lost, {number} came")
        if isinstance(message, Parcel):
            if link.incoming is not None:
                raise PeerLost("a parcel begins within another one")
            link.incoming = IncomingParcel(message)
        elif isinstance(message, ParcelPiece):
            if link.incoming is None:
                raise PeerLost("a piece of no parcel")
            link.incoming.received += data
        elif not isinstance(message, StageBeat):
            self._handler.on_message(peer, message)
        if (incoming := link.incoming) is not None and len(incoming.received) >= incoming.size_bytes:
            if len(incoming.received) > incoming.size_bytes:
                raise PeerLost("a parcel is longer than it said")
            link.incoming = None
            record = bytes(memoryview(incoming.received)[: incoming.parcel.record_bytes])
            data_part = bytearray(memoryview(incoming.received)[incoming.parcel.record_bytes :])
            self._handler.on_parcel(peer, incoming.parcel.channel, record, data_part)

    def _peer_of(self, connection: bytes) -> str:
        try:
            return (self._holders.find(connection) or self._holders.learn(connection, None)).name
        except (NameTaken, UnicodeDecodeError):
            return ""

    def _reject(self, reason: str) -> None:
        """Count, and log at 1, 2, 4, 8 ..."""
        self.rejected += 1
        if self.rejected & (self.rejected - 1) == 0:
            log_event(logger, "message_rejected", level=logging.WARNING, count=self.rejected, reason=reason)
