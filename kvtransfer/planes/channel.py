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

Asks are numbered from 0 and answered in order; an end that sees another order closes the way.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node import sockets
from baton.node.errors import SettingsError

MAX_WORD_BYTES = 1 << 20
MAX_WORDS_A_POLL = 256
OPTIONS = sockets.Options(max_message_bytes=MAX_WORD_BYTES, heartbeat_ms=500, heartbeat_timeout_ms=1_500)

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


class Channel:
    """One end: a ROUTER that hears, and a DEALER to each peer that speaks. One thread owns it."""

    def __init__(self, context: sockets.Context, identity: str, host: str) -> None:
        """Raises SettingsError if `host` is no address of this machine, or the identity is too long for a socket."""
        self.dropped: Counter[str] = Counter()
        """Words that came in and were not passed on, by reason: stranger, malformed."""
        self._context = context
        self._identity = identity
        self._dealers: dict[str, sockets.Socket] = {}
        self._decoder = msgspec.msgpack.Decoder(Word)
        self._encoder = msgspec.msgpack.Encoder()
        self.socket = sockets.open_router(context, sockets.any_port(host, identity), OPTIONS)
        self.address = sockets.bound_address(self.socket)

    def connect(self, peer: str, address: str) -> bool:
        """False if the address is none; connecting itself goes on in the background."""
        self.disconnect(peer)
        if not sockets.is_address(address):
            return False
        try:
            self._dealers[peer] = sockets.open_dealer(self._context, address, OPTIONS, identity=self._identity)
        except SettingsError:
            return False
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
        return dealer is not None and sockets.send_frames(dealer, [self._encoder.encode(word)])

    def receive(self) -> list[tuple[str, Word]]:
        """What has come in from connected peers, at most MAX_WORDS_A_POLL."""
        words: list[tuple[str, Word]] = []
        for _ in range(MAX_WORDS_A_POLL):
            frames = sockets.receive_frames(self.socket)
            if frames is None:
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
