"""Decode's half of the transfer protocol: grant, accept in order, verify every chunk, acknowledge. See transfer.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.protocol.transfer import (
    Action,
    Arrived,
    CancelIo,
    DigestsOf,
    Ended,
    PostReceive,
    Repeater,
    SendMessage,
    State,
    Timing,
)
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.transfer import (
    Abort,
    Aborted,
    Accept,
    Ack,
    Finish,
    Grant,
    Offer,
    Renew,
    Valid,
    Validate,
)


@dataclass(frozen=True, slots=True)
class Incoming:
    """What decode promises to receive: its own `blocks` for blocks [first_block, first_block + len(blocks)) of the
    sequence, from `peer`, until `deadline`."""

    transfer_id: bytes
    leg: LegKey
    peer: str
    first_block: int
    blocks: tuple[int, ...]
    deadline: float

    def destination(self, offer: Offer) -> tuple[int, ...]:
        """The blocks that an offer's chunk is written to."""
        begin = offer.first_block - self.first_block
        return self.blocks[begin : begin + len(offer.source)]


class _ChunkState(Enum):
    OFFERED = auto()
    MOVING = auto()
    VALIDATING = auto()
    LANDED = auto()


@dataclass(slots=True)
class Landings:
    """Chunks of all transfers from one peer that have landed: on a slow link each of many transfers waits for its turn,
    and none of them has stalled. Before the first one the plane may still be setting up."""

    count: int = 0


@dataclass(slots=True)
class _Chunk:
    offer: Offer
    state: _ChunkState = _ChunkState.OFFERED
    retry: int = 0
    give_up_at: float = float("inf")


@dataclass(slots=True)
class _Finished:
    """The sender's Finish: when it first came, and from when on bytes moved after it."""

    message: Finish
    at: float
    moved_at: float | None
    """None: nothing has moved since."""

    def arrived(self, now: float) -> Arrived:
        moved_at = now if self.moved_at is None else self.moved_at
        wait_s = self.message.waited_s + moved_at - self.at
        return Arrived(self.message.token_id, self.message.logprob, wait_s, now - moved_at)


class Receiver:
    """Decode's half of one transfer."""

    MAX_RETRIES = 1

    def __init__(
        self,
        incoming: Incoming,
        digests_of: DigestsOf,
        landings: Landings,
        *,
        pulls: bool,
        window: int,
        timing: Timing,
    ) -> None:
        """`landings`: of the peer. `pulls`: the plane reads the sender's memory. `window`: most chunks in flight."""
        self.state = State.OPEN
        self.transfer_id = incoming.transfer_id
        self._incoming = incoming
        self._digests_of = digests_of
        self._pulls = pulls
        self._window = window
        self._timing = timing
        self._chunks: dict[int, _Chunk] = {}
        self._next_seq = 0  # chunks are accepted in order: NCCL matches by order alone
        self._covered = 0  # blocks that offers cover so far, also in order
        self._finished: _Finished | None = None
        self._repeat = Repeater(timing)
        self._renew_at = float("inf")
        self._landings = landings
        self._landed_before = 0  # of them, at the last renewal
        self._heard = False  # the sender knows this transfer: before that the grant is repeated, and nothing to renew
        self._num_unheard = 0  # renewals since the sender's last message
        self._num_unmoved = 0  # renewals since a chunk of the peer landed, while some of this transfer are in motion
        self._outcome = Ended(False, "never started")

    @property
    def num_blocks(self) -> int:
        return len(self._incoming.blocks)

    def start(self, now: float) -> list[Action]:
        self._repeat.start(now)
        self._renew_at = now + self._timing.renew_s
        return [SendMessage(self._grant_message())]

    def abort(self, reason: str, now: float, *, cancelled: bool = False) -> list[Action]:
        """Give up; also the way to end a transfer whose sequence was cancelled."""
        if self.state is not State.OPEN:
            return []
        stop = self._stop(Ended(False, reason, cancelled))
        return [*stop, self._abort_message()]

    def on_message(self, message: Message, now: float) -> list[Action]:
        self._heard, self._num_unheard = True, 0
        match message:
            case Abort():
                return [
                    *self._stop(Ended(False, message.reason, message.cancelled)),
                    SendMessage(Aborted(transfer_id=self.transfer_id)),
                ]
            case Aborted():
                return self._stop(Ended(False, "aborted by the peer"))
        if self.state is State.DONE:
            return [SendMessage(Ack(transfer_id=self.transfer_id))]
        if self.state is not State.OPEN:
            return [self._abort_message()]
        match message:
            case Offer():
                return self._on_offer(message, now)
            case Valid():
                return self._on_valid(message, now)
            case Finish():
                return self._on_finish(message, now)
        return []

    def on_io_done(self, key: ChunkKey, ok: bool, now: float, digest: bytes = b"") -> list[Action]:
        """A posted receive ended. What it wrote is checked here, before anyone may use it: by the digest that the plane
        made, if it did."""
        chunk = self._chunks.get(key.seq)
        if (
            self.state is not State.OPEN
            or chunk is None
            or chunk.state is not _ChunkState.MOVING
            or key.retry != chunk.retry
        ):
            return []
        self._landings.count += ok
        if ok and not digest:
            (digest,) = self._digests_of([self._incoming.destination(chunk.offer)])
        if not ok or digest != chunk.offer.digest:
            return self._ask_again(chunk, now)
        if self._pulls:
            chunk.state = _ChunkState.VALIDATING
            self._repeat.start(now)
            return [SendMessage(Validate(transfer_id=self.transfer_id, seq=key.seq, retry=key.retry))]
        return self._land(chunk, now)

    def on_timer(self, now: float) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        if now >= self._incoming.deadline:
            return self.abort("deadline", now)
        if any(now >= chunk.give_up_at for chunk in self._chunks.values() if chunk.state is not _ChunkState.LANDED):
            return self.abort("chunk did not arrive in time", now)
        actions: list[Action] = []
        if now >= self._renew_at:
            if stall := self._stall():
                return self.abort(stall, now)
            self._renew_at = now + self._timing.renew_s
            if self._heard:
                actions.append(SendMessage(Renew(transfer_ids=(self.transfer_id,))))
        if self._repeat.due(now):
            actions += self._unanswered()
        return actions

    def on_idle(self, now: float) -> list[Action]:
        if self.state is not State.STOPPING:
            return []
        self.state = State.CLOSED
        return [self._outcome]

    @property
    def wake_at(self) -> float:
        if self.state is not State.OPEN:
            return float("inf")
        chunks = (c.give_up_at for c in self._chunks.values() if c.state is not _ChunkState.LANDED)
        return min(self._incoming.deadline, self._renew_at, self._repeat.at, min(chunks, default=float("inf")))

    # -- inside

    def _stall(self) -> str:
        """Called at each renewal: why the transfer has stalled by now, or ""."""
        landed, self._landed_before = self._landings.count - self._landed_before, self._landings.count
        waits = self._landed_before > 0 and any(c.state is _ChunkState.MOVING for c in self._chunks.values())
        self._num_unheard += 1
        self._num_unmoved = self._num_unmoved + 1 if waits and not landed else 0
        if self._num_unheard >= self._timing.stall_renewals:
            return "the prefill worker is not heard"
        if self._num_unmoved >= self._timing.stall_renewals:
            return "no chunk arrives any more"
        return ""

    def _on_offer(self, offer: Offer, now: float) -> list[Action]:
        known = self._chunks.get(offer.seq)
        if known is not None:
            return [SendMessage(self._accept_message(known))] if known.state is _ChunkState.MOVING else []
        if offer.seq != len(self._chunks):
            return []  # an earlier offer was lost: it will be repeated, and this one after it
        first_block = self._incoming.first_block
        begin = offer.first_block - first_block
        if begin != self._covered or begin + len(offer.source) > self.num_blocks:
            return self.abort(f"offer {offer.seq} does not follow on block {first_block + self._covered}", now)
        self._covered += len(offer.source)
        self._chunks[offer.seq] = _Chunk(offer)
        return self._accept_more(now)

    def _on_finish(self, finish: Finish, now: float) -> list[Action]:
        if self._finished is None:
            self._finished = _Finished(finish, now, now if self._num_moving() else None)
        self._finished.message = finish
        return self._arrive_if_whole(now)

    def _num_moving(self) -> int:
        return sum(c.state in (_ChunkState.MOVING, _ChunkState.VALIDATING) for c in self._chunks.values())

    def _accept_more(self, now: float) -> list[Action]:
        moving = self._num_moving()
        actions: list[Action] = []
        while moving < self._window and (chunk := self._chunks.get(self._next_seq)) is not None:
            self._next_seq += 1
            moving += 1
            actions += self._post(chunk, now)
        return actions

    def _post(self, chunk: _Chunk, now: float) -> list[Action]:
        chunk.state = _ChunkState.MOVING
        if self._finished is not None and self._finished.moved_at is None:
            self._finished.moved_at = now
        chunk.give_up_at = now + self._timing.chunk_s
        self._repeat.start(now)
        key = ChunkKey(self.transfer_id, chunk.offer.seq, chunk.retry)
        receive = PostReceive(key, chunk.offer.source, self._incoming.destination(chunk.offer))
        return [receive, SendMessage(self._accept_message(chunk))]

    def _ask_again(self, chunk: _Chunk, now: float) -> list[Action]:
        if chunk.retry >= self.MAX_RETRIES:
            return self.abort(f"chunk {chunk.offer.seq} arrived damaged twice", now)
        chunk.retry += 1
        return self._post(chunk, now)

    def _on_valid(self, valid: Valid, now: float) -> list[Action]:
        chunk = self._chunks.get(valid.seq)
        if chunk is None or chunk.state is not _ChunkState.VALIDATING or valid.retry != chunk.retry:
            return []
        return self._land(chunk, now)

    def _land(self, chunk: _Chunk, now: float) -> list[Action]:
        chunk.state = _ChunkState.LANDED
        return [*self._accept_more(now), *self._arrive_if_whole(now)]

    def _arrive_if_whole(self, now: float) -> list[Action]:
        finished = self._finished
        if finished is None or finished.message.num_chunks != len(self._chunks):
            return []
        if self._covered != self.num_blocks:
            return self.abort(f"finished after {self._covered} of {self.num_blocks} blocks", now)
        if any(chunk.state is not _ChunkState.LANDED for chunk in self._chunks.values()):
            return []
        self.state = State.DONE
        return [finished.arrived(now), SendMessage(Ack(transfer_id=self.transfer_id))]

    def _unanswered(self) -> list[Action]:
        if not self._heard:
            return [SendMessage(self._grant_message())]
        actions: list[Action] = []
        for seq, chunk in self._chunks.items():
            if chunk.state is _ChunkState.MOVING:
                actions.append(SendMessage(self._accept_message(chunk)))
            elif chunk.state is _ChunkState.VALIDATING:
                actions.append(SendMessage(Validate(transfer_id=self.transfer_id, seq=seq, retry=chunk.retry)))
        return actions

    def _accept_message(self, chunk: _Chunk) -> Accept:
        return Accept(transfer_id=self.transfer_id, seq=chunk.offer.seq, retry=chunk.retry)

    def _grant_message(self) -> Grant:
        incoming = self._incoming
        return Grant(
            transfer_id=incoming.transfer_id,
            request_id=incoming.leg.request_id,
            attempt=incoming.leg.attempt,
            first_block=incoming.first_block,
            num_blocks=incoming.first_block + len(incoming.blocks),
            lease_s=self._timing.lease_s,
        )

    def _abort_message(self) -> SendMessage:
        outcome = self._outcome
        return SendMessage(Abort(transfer_id=self.transfer_id, reason=outcome.reason, cancelled=outcome.cancelled))

    def _stop(self, outcome: Ended) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        self.state = State.STOPPING
        self._outcome = outcome
        return [CancelIo()]
