"""The two-sided data plane between GPUs over NCCL: a communicator of two ranks for each one-way connection of a pair.

NCCL has no tags, matches by order, and a kernel that waits for a dead peer spins until its communicator is aborted. So
a movement is agreed upon first (channel.py): a receive that is posted and never requested costs nothing and is
cancelled at once; what was agreed is issued at both ends in one order, and happens. A connection on which nothing ends
for `stall_s` is aborted at both ends and its blocks stay held until nothing can touch them; the next send opens a new
connection.

The plane itself touches no GPU and issues no NCCL call: a `Connector` and its pipes do (pipe.py, communicator.py), in
threads of their own; a fake pair passes the same contract on CPU.
"""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kvtransfer.blocks.runs import common_runs, cut
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.channel import (
    Channel,
    ChannelMessage,
    Close,
    Open,
    SendGranted,
    SendRefused,
    SendRequest,
    StorePut,
)
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.kvtransfer.planes.pipe import Connector, Pipe, PipeOperation, PipeState
from baton.node.addresses import LOOPBACK, ListenHost, is_address, is_loopback
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context
from baton.node.telemetry import log_event

logger = logging.getLogger("kvtransfer.nccl")

PACK_BELOW_BYTES = 1 << 20
"""Pieces that are smaller on average travel packed: one NCCL call costs tens of microseconds."""
MAX_EARLY_REQUESTS = 4096
FAREWELL_MS = 200


@dataclass(slots=True)
class _Move:
    """A movement at one end, from posting (sender) or agreement (receiver) to its end."""

    key: ChunkKey
    blocks: tuple[int, ...]
    number: int = -1
    operation: PipeOperation | None = None
    cancelled: bool = False


@dataclass(slots=True)
class _Connection:
    id: bytes
    peer: str
    sending: bool
    pipe: Pipe
    progress_at: float
    next_number: int = 0
    requested: deque[_Move] = field(default_factory=deque)  # of the sender: no answer yet
    issued: deque[_Move] = field(default_factory=deque)
    early: deque[SendRequest] = field(default_factory=deque)  # of the receiver: before the pipe was ready
    was_ready: bool = False

    @property
    def busy(self) -> bool:
        return bool(self.requested or self.issued)

    def touches(self, transfer_id: bytes) -> bool:
        return any(move.key.transfer_id == transfer_id for move in (*self.requested, *self.issued))


class NcclPlane:
    """One end, called `identity` as its worker's endpoint is; `host` is where its channel listens and peers reach it.

    `warm`: open the connection to a peer as soon as it is connected, not at the first send (for workers that send).
    """

    name = "nccl"
    pulls = False

    def __init__(
        self,
        context: Context,
        connector: Connector,
        identity: str,
        host: ListenHost = LOOPBACK,
        *,
        warm: bool = False,
        stall_s: float = 2.0,
        open_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises SettingsError as Channel does."""
        self.dropped: Counter[str] = Counter()
        """Requests that were refused, by reason: unknown, wrong_peer, size."""
        self._connector = connector
        self._warm = warm
        self._stall_s = stall_s
        self._open_s = open_s
        self._clock = clock
        self._host = host_identity()
        self._channel = Channel(context, identity, host)
        self._ledger = IoLedger()
        self._sources: dict[ChunkKey, tuple[int, ...]] = {}  # of posted receives, the sender's blocks
        self._addresses: dict[str, PlaneAddress] = {}
        self._connections: dict[bytes, _Connection] = {}
        self._stopping: list[_Connection] = []
        self._waiting: dict[str, deque[_Move]] = {}  # sends that were not requested yet, by peer
        self._outbox: queue.SimpleQueue[tuple[bytes, str, bytes]] = queue.SimpleQueue()  # by threads of pipes

    def describe(self) -> PlaneAddress:
        text = f"{self._channel.address}|{self._connector.device}"
        return PlaneAddress(plane=self.name, host=self._host, address=text)

    def reaches(self, peer: PlaneAddress) -> bool:
        """Another GPU, the same NCCL, and an address that makes sense from here; nothing is sent to find out."""
        address, _, device = peer.address.partition("|")
        if peer.plane != self.name or not is_address(address):
            return False
        own_gpu, _, own_version = self._connector.device.partition(":")
        gpu, _, version = device.partition(":")
        if not gpu or gpu == own_gpu or version != own_version:
            return False
        return peer.host == self._host or not is_loopback(address)

    def connect(self, peer: str, address: PlaneAddress) -> None:
        """An address that makes no sense (it is a peer's text) leaves the peer unconnected: sends to it fail."""
        if self._addresses.get(peer) == address:
            return
        if peer in self._addresses:
            self.forget(peer)
        if self._channel.connect(peer, address.address.partition("|")[0]):
            self._addresses[peer] = address
            log_event(logger, "plane_connected", plane=self.name, peer=peer)
            if self._warm:
                self._open(peer)

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._connector.num_blocks, blocks)
        if peer not in self._addresses:
            self._ledger.end_send(key, "the peer is not connected")
            return
        self._waiting.setdefault(peer, deque()).append(_Move(key, tuple(blocks)))
        self._request(peer)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._connector.num_blocks, blocks, source)
        self._ledger.post_receive(peer, key, blocks)
        self._sources[key] = tuple(source)

    def poll(self) -> list[IoDone]:
        while not self._outbox.empty():
            connection_id, key, value = self._outbox.get_nowait()
            if (connection := self._connections.get(connection_id)) is not None:
                self._channel.send(connection.peer, StorePut(connection_id, key, value))
        for peer, message in self._channel.receive():
            self._on_message(peer, message)
        for connection in list(self._connections.values()):
            self._advance(connection)
        for peer in [peer for peer, moves in self._waiting.items() if moves]:
            self._request(peer)
        self._stopping = [connection for connection in self._stopping if not self._reap(connection)]
        return self._ledger.report()

    def cancel(self, transfer_id: bytes) -> None:
        self._ledger.cancel(transfer_id)
        for key in [key for key in self._sources if key.transfer_id == transfer_id]:
            del self._sources[key]
        for peer, moves in self._waiting.items():
            self._waiting[peer] = deque(move for move in moves if move.key.transfer_id != transfer_id)
        for connection in (*self._connections.values(), *self._stopping):
            for move in (*connection.requested, *connection.issued):
                move.cancelled |= move.key.transfer_id == transfer_id

    def idle(self, transfer_id: bytes) -> bool:
        """Whether nothing is posted, agreed upon or issued; what was agreed upon ends, or its connection is aborted."""
        if self._ledger.receiving(transfer_id):
            return False
        if any(move.key.transfer_id == transfer_id for moves in self._waiting.values() for move in moves):
            return False
        return not any(connection.touches(transfer_id) for connection in (*self._connections.values(), *self._stopping))

    def forget(self, peer: str) -> None:
        """Abort every connection to and from it. What was issued fails as soon as nothing can touch its blocks."""
        for move in self._waiting.pop(peer, ()):
            self._ledger.end_send(move.key, "the peer is gone")
        for connection in [each for each in self._connections.values() if each.peer == peer]:
            self._break(connection, "the peer is gone", level=logging.INFO)
        self._ledger.forget(peer, but={move.key for connection in self._stopping for move in connection.issued})
        self._channel.disconnect(peer, FAREWELL_MS)
        self._addresses.pop(peer, None)

    @property
    def pending(self) -> bool:
        """A pipe that opens, a movement that was agreed upon, or an abort under way."""
        opening = any(
            connection.pipe.state is not PipeState.READY or connection.busy for connection in self._connections.values()
        )
        return bool(opening or self._stopping or any(self._waiting.values()))

    def sockets(self) -> list[object]:
        return [self._channel.socket]

    def close(self) -> None:
        """Aborts all pipes and waits for that, a few seconds at most."""
        for peer in list(self._addresses):
            self.forget(peer)
        self._connector.close(patience_s=5.0)
        self._channel.close()
        self._ledger.clear()
        self._stopping.clear()
        self._sources.clear()

    # -- connections

    def _open(self, peer: str) -> None:
        """Open a connection to it."""
        connection = self._add(secrets.token_bytes(16), peer, sending=True)
        self._channel.send(peer, Open(connection.id))

    def _add(self, connection_id: bytes, peer: str, sending: bool) -> _Connection:
        pipe = self._connector.open(sending, lambda key, value: self._outbox.put((connection_id, key, value)))
        connection = _Connection(connection_id, peer, sending, pipe, self._clock())
        self._connections[connection_id] = connection
        return connection

    def _outgoing(self, peer: str) -> _Connection | None:
        return next((each for each in self._connections.values() if each.sending and each.peer == peer), None)

    def _advance(self, connection: _Connection) -> None:
        """End what has ended, and break the connection if it is broken or makes no progress."""
        now = self._clock()
        if connection.pipe.state is PipeState.BROKEN:
            self._break(connection, connection.pipe.reason)
            return
        if connection.pipe.state is PipeState.OPENING:
            if now - connection.progress_at > self._open_s:
                self._break(connection, f"no communicator after {self._open_s} s")
            return
        if not connection.was_ready:
            connection.was_ready, connection.progress_at = True, now
        while connection.early and connection.id in self._connections:
            self._on_request(connection, connection.early.popleft())
        while connection.issued and connection.issued[0].operation is not None and connection.issued[0].operation.done:
            self._end(connection, connection.issued.popleft(), "")
            connection.progress_at = now
        if connection.busy and now - connection.progress_at > self._stall_s:
            self._break(connection, f"nothing moved for {self._stall_s} s")

    def _end(self, connection: _Connection, move: _Move, reason: str) -> None:
        if move.cancelled:
            return
        if connection.sending:
            self._ledger.end_send(move.key, reason)
        elif self._ledger.receive(move.key) is not None:
            self._sources.pop(move.key, None)
            self._ledger.end_receive(move.key, reason)

    def _break(self, connection: _Connection, reason: str, level: int = logging.WARNING) -> None:
        """Abort it here and have the peer do the same. Requests without an answer fail; what was issued waits for
        the end of the abort. Sends that were not requested stay, for a new connection, unless none can be made."""
        del self._connections[connection.id]
        self._channel.send(connection.peer, Close(connection.id))
        connection.pipe.abort()
        log_event(
            logger, "connection_broken", level=level, peer=connection.peer, sending=connection.sending, reason=reason
        )
        while connection.requested:
            self._end(connection, connection.requested.popleft(), reason)
        if connection.sending and not connection.was_ready:
            for move in self._waiting.pop(connection.peer, ()):
                self._ledger.end_send(move.key, reason)
        self._stopping.append(connection)

    def _reap(self, connection: _Connection) -> bool:
        """Report what was issued on an aborted connection, when nothing can touch its blocks any more."""
        if not connection.pipe.stopped:
            return False
        while connection.issued:
            self._end(connection, connection.issued.popleft(), "the communicator was aborted")
        return True

    # -- sending

    def _request(self, peer: str) -> None:
        """Request every waiting send, in order; without a connection one is opened."""
        connection = self._outgoing(peer)
        if connection is None:
            self._open(peer)
            return
        if connection.pipe.state is not PipeState.READY:
            return
        waiting = self._waiting.get(peer, deque())
        while waiting and self._channel.send(peer, self._request_for(connection, waiting[0])):
            move = waiting.popleft()
            if not connection.busy:
                connection.progress_at = self._clock()
            move.number = connection.next_number
            connection.next_number += 1
            connection.requested.append(move)

    def _request_for(self, connection: _Connection, move: _Move) -> SendRequest:
        key, size = move.key, self._connector.block_bytes
        number, num_blocks = connection.next_number, len(move.blocks)
        return SendRequest(connection.id, number, key.transfer_id, key.seq, key.retry, num_blocks, size)

    def _on_answer(self, connection: _Connection, answer: SendGranted | SendRefused) -> None:
        """Answers come in the order of the requests: anything else means that messages were lost."""
        if not connection.requested or connection.requested[0].number != answer.number:
            self._break(connection, f"answer {answer.number} is out of order")
            return
        move = connection.requested.popleft()
        connection.progress_at = self._clock()
        if isinstance(answer, SendRefused):
            self._end(connection, move, "the peer does not want it")
            return
        pieces = cut(move.blocks, answer.lengths)
        if pieces is None or connection.pipe.state is not PipeState.READY:
            connection.requested.appendleft(move)
            self._break(connection, "the peer's pieces do not fit")
            return
        move.operation = connection.pipe.send(pieces, answer.packed)
        connection.issued.append(move)

    # -- receiving

    def _on_message(self, peer: str, message: ChannelMessage) -> None:
        connection = self._connections.get(message.connection)
        if isinstance(message, Open):
            if connection is None:
                self._on_open(peer, message.connection)
            return
        if connection is None or connection.peer != peer:
            if not isinstance(message, Close):
                self._channel.send(peer, Close(message.connection))
            return
        match message:
            case StorePut():
                connection.pipe.deliver(message.key, message.value)
            case Close():
                self._break(connection, "closed by the peer", level=logging.INFO)
            case SendRequest() if not connection.sending:
                if len(connection.early) < MAX_EARLY_REQUESTS:
                    connection.early.append(message)
                    self._advance(connection)
            case SendGranted() | SendRefused() if connection.sending:
                self._on_answer(connection, message)
            case _:
                self._break(connection, "a message in the wrong direction")

    def _on_open(self, peer: str, connection_id: bytes) -> None:
        """A peer has one connection to us: an older one is broken, though its Close was lost."""
        for old in [each for each in self._connections.values() if each.peer == peer and not each.sending]:
            self._break(old, "the peer opens a new connection")
        self._add(connection_id, peer, sending=False)

    def _on_request(self, connection: _Connection, request: SendRequest) -> None:
        """Issue the receive and grant the send, or refuse it; the order of SendGranted is the order of the receives."""
        if request.number != connection.next_number:
            self._break(connection, f"request {request.number} is out of order")
            return
        connection.next_number += 1
        key = ChunkKey(request.transfer_id, request.seq, request.retry)
        receive = self._ledger.receive(key)
        refusal = ""
        if receive is None or key not in self._sources:
            refusal = "unknown"
        elif receive.peer != connection.peer:
            refusal = "wrong_peer"
        elif (request.num_blocks, request.block_bytes) != (len(receive.blocks), self._connector.block_bytes):
            refusal = "size"
        if receive is None or refusal:
            self.dropped[refusal] += 1
            self._answer(connection, SendRefused(connection.id, request.number))
            return
        runs = common_runs(self._sources.pop(key), receive.blocks)
        packed = len(runs) > 1 and len(receive.blocks) * self._connector.block_bytes < PACK_BELOW_BYTES * len(runs)
        if not connection.busy:
            connection.progress_at = self._clock()
        operation = connection.pipe.receive([(run.target, run.length) for run in runs], packed)
        connection.issued.append(_Move(key, receive.blocks, request.number, operation))
        lengths = tuple(run.length for run in runs)
        self._answer(connection, SendGranted(connection.id, request.number, lengths, packed))

    def _answer(self, connection: _Connection, message: SendGranted | SendRefused) -> None:
        if not self._channel.send(connection.peer, message):
            self._break(connection, "the answer cannot be sent")
