"""The data plane over ZeroMQ and TCP: works between any two hosts and needs nothing but pyzmq.

Each end binds one ROUTER, where it receives, and connects one DEALER to each peer, where it sends. One movement is one
message: a header and the bytes of the blocks in pieces of at most 4 MiB, straight out of pool memory. The receiver
copies a message into its blocks only if it has posted that very movement for that very peer and every size fits;
anything else is counted in `dropped` and has no effect. How much is under way is bounded by the protocol's credits,
with the high-water marks of the sockets behind them.

Facts used (libzmq's zmq_setsockopt(3), zmq_msg_send(3)): IMMEDIATE drops the queue when a connection breaks, so
heartbeats bound the time for which a cancelled send still refers to memory; the parts of a message are taken all or
none, unless the connection breaks in between.
"""

from __future__ import annotations

import secrets
import struct
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import zmq

from baton.kvtransfer.blocks.memory import BlockMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.node import sockets
from baton.node.addresses import LOOPBACK, ListenHost, is_address, is_loopback
from baton.node.connections import stated_name
from baton.node.credentials import PAIRED_WITH
from baton.node.errors import SettingsError
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Socket
from baton.node.watch import EVERY_S, DealerWatch

PIECE_BYTES = 4 << 20
MAX_MESSAGES_A_POLL = 32
"""So that a flood cannot keep the owner from its timers; the socket stays readable."""
MAX_QUEUED_MESSAGES = 256
RECEIVING = sockets.Options(
    max_message_bytes=PIECE_BYTES,
    heartbeat_ms=1_000,
    heartbeat_timeout_ms=5_000,
    handshake_ms=5_000,
    queued_messages=MAX_QUEUED_MESSAGES,
)
SENDING = replace(RECEIVING, max_message_bytes=4096, immediate=True)
"""Peers answer nothing here but the handshake and heartbeats."""

_HEADER = struct.Struct("<4sH16sQHIQ")
"""Magic, version, transfer id, seq, retry, blocks, bytes a block."""
_MAGIC, _VERSION = b"BKVX", 1


@dataclass(slots=True)
class _Send:
    key: ChunkKey
    blocks: tuple[int, ...]


@dataclass(slots=True)
class _Link:
    address: PlaneAddress
    socket: Socket
    watch: DealerWatch
    queue: deque[_Send] = field(default_factory=deque)  # not yet taken by the socket
    taken: dict[ChunkKey, list[zmq.MessageTracker]] = field(default_factory=dict)  # whose memory the socket may read


class ZmqPlane:
    """One end, called `identity` as its worker's endpoint is; `host` is where it listens and peers reach it."""

    name = "zmq"
    pulls = False

    def __init__(
        self, context: sockets.Context, memory: BlockMemory, identity: str, host: ListenHost = LOOPBACK
    ) -> None:
        """Raises SettingsError if `host` is not bound to this machine, or the identity is too long for a socket."""
        self.dropped: Counter[str] = Counter()
        """Messages that arrived and were not taken, by reason: header, unknown, wrong_peer, size."""
        self._context = context
        self._memory = memory
        self._identity = identity
        self._secret = secrets.token_bytes(16)
        self._host = host_identity()
        self._listen_host = host
        self._ledger = IoLedger()
        self._links: dict[str, _Link] = {}
        self._watched_at = 0.0
        self._draining: list[tuple[bytes, zmq.MessageTracker]] = []  # of sends that are over, memory still in use
        self._router = sockets.open_router(context, sockets.any_port(host, identity), RECEIVING)

    def describe(self) -> PlaneAddress:
        text = self._listen_host.advertise(sockets.bound_address(self._router))
        return PlaneAddress(plane=self.name, host=self._host, address=text)

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether each address makes sense from the other host; nothing is sent to find out."""
        if peer.plane != self.name or not is_address(peer.address):
            return False
        return peer.host == self._host or not any(map(is_loopback, (peer.address, self.describe().address)))

    def connect(self, peer: str, address: PlaneAddress) -> None:
        """Connecting goes on in the background, so that the first chunk need not wait for it.

        An address that makes no sense (it is a peer's text), or a process that may open no more files, leaves the
        peer unconnected: sends to it fail.
        """
        known = self._links.get(peer)
        if known is not None and known.address == address:
            return
        if known is not None:
            self._hang_up(peer)
        link = self._dial(address)
        if link is not None:
            self._links[peer] = link

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._memory.num_blocks, blocks)
        link = self._links.get(peer)
        if link is None:
            self._ledger.end_send(key, "the peer is not connected")
            return
        link.queue.append(_Send(key, tuple(blocks)))
        self._flush(peer)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._memory.num_blocks, blocks, source)
        self._ledger.post_receive(peer, key, blocks)

    def poll(self) -> list[IoDone]:
        self._watch_links(time.monotonic())
        for peer in list(self._links):
            self._flush(peer)
            self._end_sends(self._links.get(peer))
        for _ in range(MAX_MESSAGES_A_POLL):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._on_message(frames)
        return self._ledger.report()

    def cancel(self, transfer_id: bytes) -> None:
        self._ledger.cancel(transfer_id)
        for link in self._links.values():
            link.queue = deque(send for send in link.queue if send.key.transfer_id != transfer_id)
            for key in [key for key in link.taken if key.transfer_id == transfer_id]:
                self._draining += [(transfer_id, tracker) for tracker in link.taken.pop(key)]

    def idle(self, transfer_id: bytes) -> bool:
        """Whether nothing is posted, and no socket refers to blocks of a send any more."""
        self._draining = [(owner, tracker) for owner, tracker in self._draining if not tracker.done]
        if self._ledger.receiving(transfer_id) or any(owner == transfer_id for owner, _ in self._draining):
            return False
        return not any(
            key.transfer_id == transfer_id
            for link in self._links.values()
            for key in [*link.taken, *(send.key for send in link.queue)]
        )

    def forget(self, peer: str) -> None:
        self._ledger.forget(peer)
        if peer in self._links:
            self._hang_up(peer)

    @property
    def pending(self) -> bool:
        """Sends that the socket could not take yet, or memory that it has not let go."""
        return bool(self._draining) or any(link.queue or link.taken for link in self._links.values())

    def sockets(self) -> list[object]:
        return [self._router]

    def close(self) -> None:
        for peer in list(self._links):
            self._hang_up(peer)
        self._router.close(0)
        self._ledger.clear()
        self._draining.clear()

    # -- sockets

    def _watch_links(self, now: float) -> None:
        if now - self._watched_at >= EVERY_S:
            self._watched_at = now
            for link in self._links.values():
                link.watch.turn(now)

    def _dial(self, address: PlaneAddress) -> _Link | None:
        if not is_address(address.address):
            return None
        try:
            socket = sockets.open_dealer(
                self._context,
                address.address,
                SENDING,
                server=PAIRED_WITH[self._context.role],
                identity=self._identity,
                secret=self._secret,
            )
            return _Link(address, socket, DealerWatch(self._context, socket, address.address))
        except SettingsError:
            return None

    def _hang_up(self, peer: str) -> None:
        """Close the connection: what the socket had taken and not sent is dropped, and its memory let go."""
        link = self._links.pop(peer)
        link.watch.close()
        link.socket.close(0)
        for key, trackers in link.taken.items():
            self._draining += [(key.transfer_id, tracker) for tracker in trackers]
        for key in [*link.taken, *(send.key for send in link.queue)]:
            self._ledger.end_send(key, "the peer is gone")

    # -- sending

    def _flush(self, peer: str) -> None:
        """Hand the socket as much as it takes now."""
        link = self._links[peer]
        while link.queue and int(link.socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            if not self._hand_over(link.socket, link.queue.popleft(), link.taken):
                self._hang_up(peer)
                self.connect(peer, link.address)
                return

    def _hand_over(self, socket: Socket, send: _Send, taken: dict[ChunkKey, list[zmq.MessageTracker]]) -> bool:
        """Send one message; False if the connection broke inside it: this socket would drop parts of the next one."""
        header = _HEADER.pack(_MAGIC, _VERSION, *send.key, len(send.blocks), self._memory.block_bytes)
        trackers = taken[send.key] = []
        pieces = list(self._pieces(send.blocks))
        try:
            socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
            for number, piece in enumerate(pieces, 1):
                more = zmq.SNDMORE if number < len(pieces) else 0
                tracker = socket.send(piece, zmq.NOBLOCK | more, copy=False, track=True)
                assert tracker is not None
                trackers.append(tracker)
        except zmq.Again:
            return False
        return True

    def _end_sends(self, link: _Link | None) -> None:
        """Report the sends whose memory the socket has let go."""
        taken = link.taken if link is not None else {}
        for key in [key for key, trackers in taken.items() if all(tracker.done for tracker in trackers)]:
            del taken[key]
            self._ledger.end_send(key)

    def _pieces(self, blocks: Sequence[int]) -> Iterator[memoryview]:
        """The bytes of the blocks in order, cut as both ends cut them."""
        for index in blocks:
            block = self._memory.block(index)
            for start in range(0, len(block), PIECE_BYTES):
                yield block[start : start + PIECE_BYTES]

    # -- receiving

    def _on_message(self, frames: Sequence[zmq.Frame]) -> None:
        """Copy a movement that was asked for; count anything else."""
        if len(frames) < 2 or (header := _parse(frames[1].buffer)) is None:
            self.dropped["header"] += 1
            return
        key, num_blocks, block_bytes = header
        receive = self._ledger.receive(key)
        if receive is None:
            self.dropped["unknown"] += 1
        elif not _is_called(frames[0].bytes, receive.peer):
            self.dropped["wrong_peer"] += 1
        elif (num_blocks, block_bytes) == (len(receive.blocks), self._memory.block_bytes) and self._copy(
            [frame.buffer for frame in frames[2:]], receive.blocks
        ):
            self._ledger.end_receive(key)
        else:
            self.dropped["size"] += 1

    def _copy(self, payload: Sequence[memoryview], blocks: Sequence[int]) -> bool:
        """Fill `blocks`; False, and nothing is written, unless every piece has the right size."""
        targets = list(self._pieces(blocks))
        if [len(piece) for piece in payload] != [len(target) for target in targets]:
            return False
        for target, piece in zip(targets, payload, strict=True):
            target[:] = piece
        return True


def _is_called(connection: bytes, peer: str) -> bool:
    try:
        return stated_name(connection) == peer
    except UnicodeDecodeError:
        return False


def _parse(header: memoryview) -> tuple[ChunkKey, int, int] | None:
    """Key, number of blocks and bytes of a block; None for what is no header of ours."""
    if len(header) != _HEADER.size:
        return None
    magic, version, transfer_id, seq, retry, num_blocks, block_bytes = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, _VERSION):
        return None
    return ChunkKey(transfer_id, seq, retry), num_blocks, block_bytes
