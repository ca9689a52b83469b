"""A stage's conversation with the first one, which is on another host: joining, steps, its end of the data plane.

The transport's thread makes all calls but those that wait. The end of the plane is used by it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from queue import Empty, SimpleQueue
from typing import TypeVar

from baton.kvtransfer.blocks.checksum import SUM_BYTES
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import LayerMemory, layer_sums
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.models.batch import Row
from baton.node.errors import PeerLost
from baton.node.sockets import Context
from baton.worker.stages.remote.adapters import GivenAdapters
from baton.worker.stages.remote.copies import StageCopies
from baton.worker.stages.remote.links import ParcelLink
from baton.worker.stages.remote.messages import (
    FROM_FIRST,
    MAX_ROWS,
    MAX_SUMS_BYTES,
    STAGE_VERSION,
    AdapterForgotten,
    BlockSums,
    BlocksWanted,
    Channel,
    PeerForgotten,
    PeerKnown,
    PieceCancel,
    PieceEnded,
    PieceIdle,
    PieceSend,
    StageAssigned,
    StageEnd,
    StageJoin,
    StageMessage,
    StageReady,
    StageRefused,
)
from baton.worker.stages.remote.transport import SILENT_S, Transport

FIRST = "the first stage"
JOIN_EVERY_S = 0.25
IDLE_S = 0.25
BUSY_S = 0.001
"""Between two looks at the plane while it sends."""

T = TypeVar("T")


class NotAPart(PeerLost):
    """The first stage has refused this process."""


class FirstStageLink:
    """The link to the first stage."""

    def __init__(self, context: Context, address: str, identity: str, join_s: float) -> None:
        """SettingsError for no address."""
        self.steps = ParcelLink(FIRST, partial(self._send_parcel, "steps"))
        self.draws = ParcelLink(FIRST, partial(self._send_parcel, "draws"))
        self.ended = False
        """The first stage has said that the worker ends."""
        self._answers: SimpleQueue[StageMessage | PeerLost] = SimpleQueue()
        self._plane: Plane | None = None
        self._num_rows = 0
        """Of the pool, as the end of the plane counts them."""
        self._copies: StageCopies | None = None
        self._adapters: GivenAdapters | None = None
        self._cancelled: set[bytes] = set()
        self._joined = False
        self._join_at = 0.0
        self._transport = Transport(context, address, self, identity=identity)
        self._transport.limit_silence(join_s)
        self._transport.open(FIRST)
        self._transport.begin()

    def receive(self, kind: type[T], wait_s: float) -> T:
        """The first stage's next message about the start. PeerLost without one, NotAPart where it refuses."""
        try:
            answer = self._answers.get(timeout=wait_s)
        except Empty:
            raise PeerLost(f"{FIRST} has not answered for {wait_s:.0f} s") from None
        if isinstance(answer, PeerLost):
            raise answer
        if not isinstance(answer, kind):
            raise PeerLost(f"{type(answer).__name__} from {FIRST}, not {kind.__name__}")
        return answer

    @property
    def turned_at(self) -> float:
        """When the transport's thread last turned."""
        return self._transport.turned_at

    def send(self, message: StageMessage) -> None:
        self._transport.send(FIRST, message)

    def use(self, plane: Plane, pool: BlockPool, adapters: GivenAdapters) -> None:
        """Its end of the data plane, which belongs to the transport's thread from now on, the pool, and what the first
        stage gives of adapters."""
        self._copies, self._num_rows = StageCopies(pool), LayerMemory(pool).num_blocks
        self._adapters = adapters
        ready = StageReady(plane=plane.describe())
        self._plane = plane
        self.send(ready)

    def close(self) -> None:
        self._transport.close()
        if self._plane is not None:
            self._plane.close()

    # -- the transport's thread

    def on_message(self, peer: str, message: StageMessage) -> None:
        match message:
            case StageRefused():
                self._end(NotAPart(message.reason), f"has refused this stage: {message.reason}")
            case StageEnd():
                self.ended = True
                self._end(PeerLost(f"{FIRST} has ended"), "has ended")
            case BlocksWanted() if self._copies is not None:
                self._send_parcel("blocks", *self._copies.give(message))
            case PeerKnown() if self._plane is not None:
                self._plane.connect(message.peer, message.address)
            case PeerForgotten() if self._plane is not None:
                self._plane.forget(message.peer)
            case PieceSend() if self._plane is not None:
                rows = rows_of(message, self._num_rows)
                self._plane.post_send(message.peer, ChunkKey(message.transfer_id, message.seq, message.retry), rows)
            case PieceCancel() if self._plane is not None:
                self._plane.cancel(message.transfer_id)
                self._cancelled.add(message.transfer_id)
            case AdapterForgotten() if self._adapters is not None:
                self._adapters.forget(message.number)
            case _ if isinstance(message, FROM_FIRST):
                if isinstance(message, StageAssigned):
                    self._joined = True
                    self._transport.limit_silence(SILENT_S)
                self._answers.put(message)
            case _:
                raise PeerLost(f"{type(message).__name__} from {FIRST}")

    def on_parcel(self, peer: str, channel: Channel, record: bytes, data: bytearray) -> None:
        match channel:
            case "steps":
                self.steps.deliver(record, data)
            case "draws":
                self.draws.deliver(record, data)
            case "blocks" if self._copies is not None:
                self.send(self._copies.take(record, data))
            case "adapters" if self._adapters is not None:
                self._adapters.take(record, data)
            case _:
                raise PeerLost(f"a parcel of {channel} from {FIRST}, before this stage is ready")

    def on_lost(self, peer: str, reason: str) -> None:
        self._end(PeerLost(f"{FIRST} {reason}"), reason)

    def work(self) -> float:
        now = time.monotonic()
        if not self._joined and self._transport.is_connected and now >= self._join_at:
            self._join_at = now + JOIN_EVERY_S
            self.send(StageJoin(version=STAGE_VERSION))
        if self._plane is None:
            return IDLE_S
        for done in self._plane.poll():
            key, reason = done.key, "" if done.ok else done.reason or "it failed"
            self.send(PieceEnded(transfer_id=key.transfer_id, seq=key.seq, retry=key.retry, reason=reason))
        for transfer_id in [each for each in self._cancelled if self._plane.idle(each)]:
            self._cancelled.discard(transfer_id)
            self.send(PieceIdle(transfer_id=transfer_id))
        return BUSY_S if self._plane.pending or self._cancelled else IDLE_S

    def sockets(self) -> list[object]:
        return [] if self._plane is None else self._plane.sockets()

    # -- inside

    def _end(self, error: PeerLost, reason: str) -> None:
        self._joined = True
        self._answers.put(error)
        for link in (self.steps, self.draws):
            link.shut(reason)

    def _send_parcel(self, channel: Channel, record: bytes, data: bytes | memoryview) -> None:
        self._transport.send_parcel(FIRST, channel, record, data)


def rows_of(send: PieceSend, num_rows: int) -> list[int]:
    """PeerLost for rows that a pool of so many does not have, and for too many of them."""
    total, end = sum(count for _, count in send.runs), max(first + count for first, count in send.runs)
    if not 0 < total <= MAX_ROWS or end > num_rows:
        raise PeerLost(f"{total} rows in one send, up to {end} of {num_rows}")
    return list(chain.from_iterable(range(first, first + count) for first, count in send.runs))


def written_blocks(rows: Sequence[Row], block_tokens: int) -> list[int]:
    """The blocks that a step with these rows writes, each once."""
    ends = ((row, row.start + len(row.token_ids)) for row in rows if row.token_ids)
    spans = (row.blocks[row.start // block_tokens : -(-end // block_tokens)] for row, end in ends)
    return list(dict.fromkeys(chain.from_iterable(spans)))


def summing(pool: BlockPool, send: Callable[[StageMessage], None]) -> Callable[[Sequence[Row]], None]:
    """What is called with the rows of a step that this stage has computed: sends the sums of what it has written."""
    per_block = pool.num_units * pool.layout.num_layers * SUM_BYTES
    most = max(1, MAX_SUMS_BYTES // per_block)

    def on_computed(rows: Sequence[Row]) -> None:
        blocks = written_blocks(rows, pool.layout.block_tokens)
        for start in range(0, len(blocks), most):
            some = blocks[start : start + most]
            sums = b"".join(layer_sums([pool], block) for block in some)
            send(BlockSums(blocks=tuple(some), sums=sums))

    return on_computed
