"""The messages that two NCCL planes exchange, and the sockets they travel over. Carries no KV and knows no GPU.

NCCL matches sends and receives by their order alone, so the order is agreed here first. Each one-way *connection*
from a sender to a receiver has an id of its own: 16 random bytes, never used again.

    sender                                  receiver
      Open(id)                ──────────►     both make their rank of a communicator of two,
      StorePut(id, ...)       ◄────────►      with a store that is tunnelled by StorePut
      SendRequest(id, n, key, sizes)  ──►     is this receive posted, for this peer, of this size?
                              ◄──────────     SendGranted(id, n, runs): the receive is issued; or SendRefused(id, n)
      the send is issued
      Close(id)               ◄────────►      by either end: the communicator is aborted at both

Requests are numbered from 0 and answered in order; an end that sees another order closes the connection.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node import sockets
from baton.node.addresses import ListenHost, is_address
from baton.node.connections import NameHolders, NameTaken
from baton.node.credentials import PAIRED_WITH
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.node.watch import EVERY_S, DealerWatch

MAX_MESSAGE_BYTES = 1 << 20
MAX_MESSAGES_PER_POLL = 256
OPTIONS = sockets.Options(
    max_message_bytes=MAX_MESSAGE_BYTES, heartbeat_ms=500, heartbeat_timeout_ms=1_500, handshake_ms=5_000
)

ConnectionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Number = Annotated[int, Meta(ge=0, le=1 << 62)]


class Open(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="open"):
    connection: ConnectionId


class StorePut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="put"):
    connection: ConnectionId
    key: Annotated[str, Meta(max_length=512)]
    value: Annotated[bytes, Meta(max_length=65_536)]


class SendRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="request"):
    connection: ConnectionId
    number: Number
    transfer_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    seq: Number
    retry: Number
    num_blocks: Number
    block_bytes: Number


class SendGranted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="granted"):
    connection: ConnectionId
    number: Number
    lengths: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=65_536)]
    """Blocks of each piece, in the order of the chunk; each is consecutive in both pools."""
    packed: bool
    """The pieces are sent as one, through a buffer at both ends."""


class SendRefused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    connection: ConnectionId
    number: Number


class Close(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="close"):
    connection: ConnectionId


ChannelMessage = Open | StorePut | SendRequest | SendGranted | SendRefused | Close


class Channel:
    """One end: a ROUTER that receives, and a DEALER to each peer. One thread owns it."""

    def __init__(self, context: sockets.Context, identity: str, host: ListenHost) -> None:
        """Raises SettingsError if `host` is not bound to this machine, or the identity is too long for a socket."""
        self.dropped: Counter[str] = Counter()
        """Messages that came in and were not passed on, by reason: wrong_peer, malformed."""
        self._context = context
        self._identity = identity
        self._secret = secrets.token_bytes(16)
        self._holders = NameHolders()
        self._dealers: dict[str, sockets.Socket] = {}
        self._watches: dict[str, DealerWatch] = {}
        self._watched_at = 0.0
        self._decoder = msgspec.msgpack.Decoder(ChannelMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self.socket = sockets.open_router(context, sockets.any_port(host, identity), OPTIONS)
        self.address = host.advertise(sockets.bound_address(self.socket))

    def connect(self, peer: str, address: str) -> bool:
        """False if the address is none, or the process may open no more files; connecting itself goes on in the
        background."""
        self.disconnect(peer)
        if not is_address(address):
            return False
        try:
            dealer = sockets.open_dealer(
                self._context,
                address,
                OPTIONS,
                server=PAIRED_WITH[self._context.role],
                identity=self._identity,
                secret=self._secret,
            )
            self._watches[peer] = DealerWatch(self._context, dealer, address)
        except SettingsError:
            return False
        self._dealers[peer] = dealer
        return True

    def disconnect(self, peer: str, linger_ms: int = 0) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            self._watches.pop(peer).close()
            dealer.close(linger_ms)

    def connected(self, peer: str) -> bool:
        return peer in self._dealers

    def send(self, peer: str, message: ChannelMessage) -> bool:
        """False if the peer is not connected or its queue is full."""
        dealer = self._dealers.get(peer)
        return dealer is not None and sockets.send_frames(dealer, [self._encoder.encode(message)])

    def receive(self) -> list[tuple[str, ChannelMessage]]:
        """What has come in from connected peers, at most MAX_MESSAGES_PER_POLL."""
        self._watch_links(time.monotonic())
        messages: list[tuple[str, ChannelMessage]] = []
        for _ in range(MAX_MESSAGES_PER_POLL):
            frames = sockets.receive_frames(self.socket)
            if frames is None:
                break
            self._take(frames, messages)
        return messages

    def close(self) -> None:
        for peer in list(self._dealers):
            self.disconnect(peer)
        self.socket.close(0)

    # -- inside

    def _watch_links(self, now: float) -> None:
        if now - self._watched_at >= EVERY_S:
            self._watched_at = now
            for watch in self._watches.values():
                watch.turn(now)

    def _take(self, frames: list[bytes], messages: list[tuple[str, ChannelMessage]]) -> None:
        try:  # the socket lets in workers of the other role only
            peer = (self._holders.find(frames[0]) or self._holders.learn(frames[0], None)).name
        except (NameTaken, UnicodeDecodeError):
            peer = ""
        if peer not in self._dealers:
            self.dropped["wrong_peer"] += 1
            return
        try:
            messages.append((peer, self._decoder.decode(frames[1] if len(frames) == 2 else b"")))
        except DECODE_ERRORS:
            self.dropped["malformed"] += 1
