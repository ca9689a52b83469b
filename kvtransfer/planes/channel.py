"""The words that two NCCL planes exchange, and the sockets they travel over. Carries no KV and knows no GPU.

NCCL matches sends and receives by their order alone, so the order is agreed here first. Each way from a sender to a
receiver has a number of its own, a *way*: 16 random bytes, never used again.

    sender                                     receiver
      Open(way)        ──────────────────────►   both make their rank of a communicator of two,
      Put(way, ...)    ◄─────────────────────►   ... with a store that is tunnelled by Put
      Ask(way, n, key, sizes)  ──────────────►   is this receive posted, of this peer, of this size?
                       ◄──────────────────────   Go(way, n, runs): the receive is issued; or No(way, n)
      the send is issued
      Close(way)       ◄─────────────────────►   by either end: the communicator is aborted at both

Asks are numbered from 0 and answered in order; whoever sees another order closes the way.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated

import msgspec
import zmq
from msgspec import Meta

from baton.node.errors import SettingsError

MAX_WORD_BYTES = 1 << 20
MAX_WORDS_A_POLL = 256
HEARTBEAT_INTERVAL_MS = 500
HEARTBEAT_TIMEOUT_MS = 1_500

_ADDRESS = re.compile(r"tcp://(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,64}\]):([1-9][0-9]{0,4})", re.ASCII)
_LOOPBACK = re.compile(r"tcp://(?:127\.|localhost:|\[::1\])")

WayId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Number = Annotated[int, Meta(ge=0, le=1 << 62)]


class Open(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="open"):
    way: WayId


class StorePut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="put"):
    way: WayId
    key: Annotated[str, Meta(max_length=512)]
    value: Annotated[bytes, Meta(max_length=65_536)]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ask"):
    way: WayId
    number: Number
    transfer_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    seq: Number
    retry: Number
    num_blocks: Number
    block_bytes: Number


class Go(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="go"):
    way: WayId
    number: Number
    lengths: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=65_536)]
    """Blocks of each piece, in the order of the chunk; each is consecutive in both pools."""
    packed: bool
    """The pieces are sent as one, through a buffer at both ends."""


class No(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="no"):
    way: WayId
    number: Number


class Close(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="close"):
    way: WayId


Word = Open | StorePut | Ask | Go | No | Close


def is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and int(match.group(1)) <= 65_535


def is_loopback(text: str) -> bool:
    return _LOOPBACK.match(text) is not None


class Channel:
    """One end: a ROUTER that hears, and a DEALER to each peer that speaks. One thread owns it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], identity: str, host: str) -> None:
        """Raises SettingsError if `host` is no address of this machine, or the identity is too long for a socket."""
        self.dropped: Counter[str] = Counter()
        """Words that came in and were not passed on, by reason: stranger, malformed."""
        self._context = context
        self._identity = identity.encode()
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._decoder = msgspec.msgpack.Decoder(Word)
        self._encoder = msgspec.msgpack.Encoder()
        if not 1 <= len(self._identity) <= 255 or self._identity[0] == 0:
            raise SettingsError(f"{identity!r} cannot name a socket")
        if host in ("", "*", "0.0.0.0", "::"):
            raise SettingsError(f"{host!r} is no address that a peer can connect to")
        self.socket = self._socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.IPV6, ":" in host)
        try:
            self.socket.bind(f"tcp://{f'[{host}]' if ':' in host else host}:*")
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise SettingsError(f"cannot bind a socket on {host!r}: {error}") from None
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, peer: str, address: str) -> bool:
        """False if the address is none; connecting itself goes on in the background."""
        self.disconnect(peer)
        if not is_address(address):
            return False
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self._identity)
        dealer.setsockopt(zmq.IPV6, "[" in address)
        try:
            dealer.connect(address)
        except zmq.ZMQError:
            dealer.close(0)
            return False
        self._dealers[peer] = dealer
        return True

    def disconnect(self, peer: str, linger_ms: int = 0) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            dealer.close(linger_ms)

    def connected(self, peer: str) -> bool:
        return peer in self._dealers

    def send(self, peer: str, word: Word) -> bool:
        """False if the peer is not connected or its queue is full."""
        dealer = self._dealers.get(peer)
        if dealer is None:
            return False
        try:
            dealer.send(self._encoder.encode(word), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> list[tuple[str, Word]]:
        """What has come in from connected peers, at most MAX_WORDS_A_POLL."""
        words: list[tuple[str, Word]] = []
        for _ in range(MAX_WORDS_A_POLL):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take(frames, words)
        return words

    def close(self) -> None:
        for peer in list(self._dealers):
            self.disconnect(peer)
        self.socket.close(0)

    # -- inside

    def _take(self, frames: list[bytes], words: list[tuple[str, Word]]) -> None:
        peer = frames[0].decode(errors="replace")
        if peer not in self._dealers:
            self.dropped["stranger"] += 1
            return
        try:
            words.append((peer, self._decoder.decode(frames[1] if len(frames) == 2 else b"")))
        except (msgspec.DecodeError, msgspec.ValidationError):
            self.dropped["malformed"] += 1

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_WORD_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        return socket
