"""One request's KV in motion: the two halves of the transfer protocol, as state machines without IO.

A machine is told what happened (`on_message`, `on_io_done`, `on_timer`, ...) and returns what is to be done: a list of
actions for whoever owns the sockets and the plane. It reads no clock, holds no socket and touches no block.

    Sender (prefill)                                   Receiver (decode)
      opened, computing        <── Grant ──────────      blocks held, receive-side lease begins
      blocks computed          ─── Offer(seq) ─────►     (held back while `window` chunks are in flight)
      PostSend                 <── Accept(seq) ────      PostReceive first, then the credit
      bytes                    ═════════════════════►    copied, digest compared; on a mismatch one Accept(seq, retry)
                               <── Validate(seq) ──      only on planes that pull: the copy is over
                               ─── Valid(seq) ─────►     ... and the lease held, so the chunk has landed
      last block, first token  ─── Finish ─────────►
                               <── Ack ────────────      all landed: Arrived, decoding may begin
      CancelIo .. Ended

Rules that make it hold:
- The receiver writes its own memory, so it alone decides when its blocks are free: after CancelIo and `on_idle`.
- Whoever waits repeats its last message; every handler is idempotent; a transfer ends at its deadline at the latest.
- The sender's lease ends when nothing was heard of the receiver for `lease_s`; it never says Valid after that.
- Abort may come from either side at any time and is answered with Aborted, also by one who never knew the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from kvtransfer.planes.base import ChunkKey
from node.messages import (
    Abort,
    Aborted,
    Accept,
    Ack,
    Finish,
    Grant,
    Logprob,
    Message,
    Offer,
    Renew,
    Valid,
    Validate,
)


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations of the protocol, in seconds."""

    lease_s: float = 10.0
    resend_s: float = 0.05
    """First repetition of an unanswered message; doubles up to `resend_max_s`."""
    resend_max_s: float = 1.0
    chunk_s: float = 10.0
    """An accepted chunk must have landed by then."""
    forget_s: float = 60.0
    """How long an ended transfer is remembered, to answer late messages."""


@dataclass(frozen=True, slots=True)
class Tell:
    message: Message


@dataclass(frozen=True, slots=True)
class PostSend:
    key: ChunkKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PostReceive:
    key: ChunkKey
    source: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelIo:
    """Stop the plane's operations of this transfer, and call `on_idle` as soon as none can touch a block."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Receiver: every block is there and verified. The blocks belong to the sequence from now on."""

    token_id: int
    logprob: Logprob | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The last action of a machine, once: its blocks are touched no more. `ok`: the KV was handed over whole."""

    ok: bool
    reason: str = ""


Action = Tell | PostSend | PostReceive | CancelIo | Arrived | Ended
DigestOf = Callable[[Sequence[int]], bytes]


class State(Enum):
    OPEN = auto()
    DONE = auto()
    """Handed over; late messages are still answered."""
    STOPPING = auto()
    """CancelIo was asked for; blocks may still be touched."""
    CLOSED = auto()


@dataclass(slots=True)
class _Repeater:
    """When to say something again: first after `resend_s`, then doubling."""

    timing: Timing
    at: float = float("inf")
    pause_s: float = 0.0

    def start(self, now: float) -> None:
        self.pause_s = self.timing.resend_s
        self.at = now + self.pause_s

    def due(self, now: float) -> bool:
        if now < self.at:
            return False
        self.pause_s = min(self.pause_s * 2, self.timing.resend_max_s)
        self.at = now + self.pause_s
        return True

    def stop(self) -> None:
        self.at = float("inf")


# ---- sender -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Offered:
    first_block: int
    blocks: tuple[int, ...]
    digest: bytes
    posted: set[int] = field(default_factory=set)  # retries for which a send was posted


class Sender:
    """Prefill's half. `digest_of(blocks)` reads the pool; it is called once a chunk, when the chunk is offered."""

    def __init__(
        self,
        digest_of: DigestOf,
        *,
        chunk_blocks: int,
        timing: Timing,
        now: float,
        deadline: float,
    ) -> None:
        self.state = State.OPEN
        self.transfer_id: bytes | None = None
        self.started_at = 0.0
        self._digest_of = digest_of
        self._chunk_blocks = chunk_blocks
        self._timing = timing
        self._deadline = deadline
        self._heard_at = now
        self._blocks: tuple[int, ...] = ()
        self._next_block = 0  # first block not offered yet
        self._chunks: list[_Offered] = []
        self._token: tuple[int, Logprob | None] | None = None
        self._repeat = _Repeater(timing)
        self._outcome = Ended(False, "never started")

    # -- told by the worker

    def on_blocks(self, blocks: Sequence[int], now: float) -> list[Action]:
        """The sequence's first len(blocks) blocks are final: from the first block of the prompt on, in order."""
        if self.state is not State.OPEN:
            return []
        self._blocks = tuple(blocks)
        return self._offer(now)

    def on_token(self, token_id: int, logprob: Logprob | None, now: float) -> list[Action]:
        """All blocks were told; this is the first token."""
        if self.state is not State.OPEN:
            return []
        self._token = (token_id, logprob)
        return self._offer(now)

    def abort(self, reason: str, now: float) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        actions: list[Action] = []
        if self.transfer_id is not None:
            self._repeat.start(now)
            actions.append(Tell(Abort(transfer_id=self.transfer_id, reason=reason)))
        return actions + self._stop(False, reason)

    def peer_lost(self, now: float) -> list[Action]:
        self._repeat.stop()
        return self._stop(False, "decode worker lost")

    # -- told by the wire

    def on_message(self, message: Message, now: float) -> list[Action]:
        self._heard_at = now
        match message:
            case Grant():
                return self._on_grant(message, now)
            case Accept():
                return self._on_accept(message)
            case Validate():
                return self._on_validate(message)
            case Ack():
                self._repeat.stop()
                return self._stop(True, "")
            case Abort():
                assert self.transfer_id is not None
                self._repeat.stop()
                return [Tell(Aborted(transfer_id=self.transfer_id)), *self._stop(False, message.reason)]
            case Aborted():
                self._repeat.stop()
                return self._stop(False, "aborted by the peer")
        return []

    def on_timer(self, now: float) -> list[Action]:
        """Call at `wake_at` at the latest."""
        if self.state is State.OPEN and now >= self._deadline:
            return self.abort("deadline", now)
        if self.state is State.OPEN and self.transfer_id is not None and now - self._heard_at > self._timing.lease_s:
            return self.abort("lease expired", now)
        if self.transfer_id is None or not self._repeat.due(now):
            return []
        if self.state is not State.OPEN:
            return [Tell(Abort(transfer_id=self.transfer_id, reason=self._outcome.reason))]
        return self._unanswered()

    def on_io_done(self, key: ChunkKey, ok: bool, now: float) -> list[Action]:
        """A send that failed is not repeated on its own: the receiver asks again or gives up."""
        return []

    def on_idle(self, now: float) -> list[Action]:
        if self.state is not State.STOPPING:
            return []
        self.state = State.CLOSED
        return [self._outcome]

    @property
    def wake_at(self) -> float:
        if self.state is not State.OPEN:
            return self._repeat.at
        lease_end = self._heard_at + self._timing.lease_s if self.transfer_id is not None else float("inf")
        return min(self._deadline, lease_end, self._repeat.at)

    # -- inside

    def _on_grant(self, grant: Grant, now: float) -> list[Action]:
        if self.transfer_id is not None:
            return []
        self.transfer_id = grant.transfer_id
        self.started_at = now
        self._next_block = grant.first_block
        return self._offer(now) if self.state is State.OPEN else [*self._late_grant(now)]

    def _late_grant(self, now: float) -> list[Action]:
        assert self.transfer_id is not None
        self._repeat.start(now)
        return [Tell(Abort(transfer_id=self.transfer_id, reason=self._outcome.reason))]

    def _on_accept(self, accept: Accept) -> list[Action]:
        if self.state is not State.OPEN or accept.seq >= len(self._chunks):
            return []
        chunk = self._chunks[accept.seq]
        if accept.retry in chunk.posted:
            return []
        chunk.posted.add(accept.retry)
        assert self.transfer_id is not None
        return [PostSend(ChunkKey(self.transfer_id, accept.seq, accept.retry), chunk.blocks)]

    def _on_validate(self, validate: Validate) -> list[Action]:
        assert self.transfer_id is not None
        if self.state is not State.OPEN:
            return [Tell(Abort(transfer_id=self.transfer_id, reason="lease is over"))]
        return [Tell(Valid(transfer_id=self.transfer_id, seq=validate.seq, retry=validate.retry))]

    def _offer(self, now: float) -> list[Action]:
        """Offer all final blocks that the receiver lacks, in chunks; with the token goes the Finish."""
        if self.transfer_id is None:
            return []
        actions: list[Action] = []
        while self._next_block < len(self._blocks):
            blocks = self._blocks[self._next_block : self._next_block + self._chunk_blocks]
            self._chunks.append(_Offered(self._next_block, blocks, self._digest_of(blocks)))
            self._next_block += len(blocks)
            actions.append(Tell(self._offer_message(len(self._chunks) - 1)))
        if self._token is not None:
            actions.append(Tell(self._finish_message()))
        if actions:
            self._repeat.start(now)
        return actions

    def _offer_message(self, seq: int) -> Offer:
        chunk = self._chunks[seq]
        assert self.transfer_id is not None
        return Offer(
            transfer_id=self.transfer_id,
            seq=seq,
            first_block=chunk.first_block,
            source=chunk.blocks,
            digest=chunk.digest,
        )

    def _finish_message(self) -> Finish:
        assert self.transfer_id is not None and self._token is not None
        token_id, logprob = self._token
        return Finish(
            transfer_id=self.transfer_id, num_chunks=len(self._chunks), token_id=token_id, logprob=logprob
        )

    def _unanswered(self) -> list[Action]:
        """Offers that were never accepted, and the Finish, once more."""
        actions: list[Action] = [
            Tell(self._offer_message(seq)) for seq, chunk in enumerate(self._chunks) if not chunk.posted
        ]
        if self._token is not None:
            actions.append(Tell(self._finish_message()))
        return actions

    def _stop(self, ok: bool, reason: str) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        self.state = State.STOPPING
        self._outcome = Ended(ok, reason)
        return [CancelIo()]


# ---- receiver ---------------------------------------------------------------------------------------------------


class _Chunk(Enum):
    OFFERED = auto()
    MOVING = auto()
    VALIDATING = auto()
    LANDED = auto()


@dataclass(slots=True)
class _Incoming:
    offer: Offer
    state: _Chunk = _Chunk.OFFERED
    retry: int = 0
    give_up_at: float = float("inf")


class Receiver:
    """Decode's half. `blocks` are its own ids for blocks [first_block, first_block + len(blocks)) of the sequence."""

    MAX_RETRIES = 1

    def __init__(
        self,
        transfer_id: bytes,
        request_id: str,
        attempt: int,
        *,
        first_block: int,
        blocks: Sequence[int],
        digest_of: DigestOf,
        pulls: bool,
        window: int,
        timing: Timing,
        deadline: float,
    ) -> None:
        self.state = State.OPEN
        self.transfer_id = transfer_id
        self._grant = Grant(
            transfer_id=transfer_id,
            request_id=request_id,
            attempt=attempt,
            first_block=first_block,
            num_blocks=first_block + len(blocks),
            lease_s=timing.lease_s,
        )
        self._first_block = first_block
        self._blocks = tuple(blocks)
        self._digest_of = digest_of
        self._pulls = pulls
        self._window = window
        self._timing = timing
        self._deadline = deadline
        self._chunks: dict[int, _Incoming] = {}
        self._next_seq = 0  # chunks are accepted in order: NCCL matches by order alone
        self._covered = 0  # blocks that offers cover so far, also in order
        self._finish: Finish | None = None
        self._repeat = _Repeater(timing)
        self._renew_at = float("inf")
        self._outcome = Ended(False, "never started")

    def start(self, now: float) -> list[Action]:
        self._repeat.start(now)
        self._renew_at = now + self._timing.lease_s / 4
        return [Tell(self._grant)]

    def abort(self, reason: str, now: float) -> list[Action]:
        """Give up; also the way to end a transfer whose sequence was cancelled."""
        if self.state is not State.OPEN:
            return []
        self._repeat.start(now)
        return [Tell(Abort(transfer_id=self.transfer_id, reason=reason)), *self._stop(reason)]

    def peer_lost(self, now: float) -> list[Action]:
        self._repeat.stop()
        return self._stop("prefill worker lost")

    def on_message(self, message: Message, now: float) -> list[Action]:
        match message:
            case Abort():
                self._repeat.stop()
                return [Tell(Aborted(transfer_id=self.transfer_id)), *self._stop(message.reason)]
            case Aborted():
                self._repeat.stop()
                return self._stop("aborted by the peer")
        if self.state is State.DONE:
            return [Tell(Ack(transfer_id=self.transfer_id))]
        if self.state is not State.OPEN:
            return [Tell(Abort(transfer_id=self.transfer_id, reason=self._outcome.reason))]
        match message:
            case Offer():
                return self._on_offer(message, now)
            case Valid():
                return self._on_valid(message, now)
            case Finish():
                self._finish = message
                return self._arrive_if_whole(now)
        return []

    def on_io_done(self, key: ChunkKey, ok: bool, now: float) -> list[Action]:
        """A posted receive ended. What it wrote is checked here, before anyone may use it."""
        chunk = self._chunks.get(key.seq)
        if self.state is not State.OPEN or chunk is None or chunk.state is not _Chunk.MOVING or key.retry != chunk.retry:
            return []
        if not ok or self._digest_of(self._destination(chunk.offer)) != chunk.offer.digest:
            return self._ask_again(chunk, now)
        if self._pulls:
            chunk.state = _Chunk.VALIDATING
            self._repeat.start(now)
            return [Tell(Validate(transfer_id=self.transfer_id, seq=key.seq, retry=key.retry))]
        return self._land(chunk, now)

    def on_timer(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if self.state is State.OPEN:
            if now >= self._deadline:
                return self.abort("deadline", now)
            if any(now >= chunk.give_up_at for chunk in self._chunks.values() if chunk.state is not _Chunk.LANDED):
                return self.abort("chunk did not arrive in time", now)
            if now >= self._renew_at:
                self._renew_at = now + self._timing.lease_s / 4
                actions.append(Tell(Renew(transfer_ids=(self.transfer_id,))))
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
            return self._repeat.at
        chunks = (c.give_up_at for c in self._chunks.values() if c.state is not _Chunk.LANDED)
        return min(self._deadline, self._renew_at, self._repeat.at, min(chunks, default=float("inf")))

    # -- inside

    def _on_offer(self, offer: Offer, now: float) -> list[Action]:
        known = self._chunks.get(offer.seq)
        if known is not None:
            return [Tell(self._accept_message(known))] if known.state is _Chunk.MOVING else []
        if offer.seq != len(self._chunks):
            return []  # an earlier offer was lost: it will be repeated, and this one after it
        begin = offer.first_block - self._first_block
        if begin != self._covered or begin + len(offer.source) > len(self._blocks):
            return self.abort(f"offer {offer.seq} does not follow on block {self._first_block + self._covered}", now)
        self._covered += len(offer.source)
        self._chunks[offer.seq] = _Incoming(offer)
        return self._accept_more(now)

    def _accept_more(self, now: float) -> list[Action]:
        moving = sum(c.state in (_Chunk.MOVING, _Chunk.VALIDATING) for c in self._chunks.values())
        actions: list[Action] = []
        while moving < self._window and (chunk := self._chunks.get(self._next_seq)) is not None:
            self._next_seq += 1
            moving += 1
            actions += self._post(chunk, now)
        return actions

    def _post(self, chunk: _Incoming, now: float) -> list[Action]:
        chunk.state = _Chunk.MOVING
        chunk.give_up_at = now + self._timing.chunk_s
        self._repeat.start(now)
        key = ChunkKey(self.transfer_id, chunk.offer.seq, chunk.retry)
        receive = PostReceive(key, chunk.offer.source, self._destination(chunk.offer))
        return [receive, Tell(self._accept_message(chunk))]

    def _ask_again(self, chunk: _Incoming, now: float) -> list[Action]:
        if chunk.retry >= self.MAX_RETRIES:
            return self.abort(f"chunk {chunk.offer.seq} arrived damaged twice", now)
        chunk.retry += 1
        return self._post(chunk, now)

    def _on_valid(self, valid: Valid, now: float) -> list[Action]:
        chunk = self._chunks.get(valid.seq)
        if chunk is None or chunk.state is not _Chunk.VALIDATING or valid.retry != chunk.retry:
            return []
        return self._land(chunk, now)

    def _land(self, chunk: _Incoming, now: float) -> list[Action]:
        chunk.state = _Chunk.LANDED
        return [*self._accept_more(now), *self._arrive_if_whole(now)]

    def _arrive_if_whole(self, now: float) -> list[Action]:
        finish = self._finish
        if finish is None or finish.num_chunks != len(self._chunks):
            return []
        if self._covered != len(self._blocks):
            return self.abort(f"finished after {self._covered} of {len(self._blocks)} blocks", now)
        if any(chunk.state is not _Chunk.LANDED for chunk in self._chunks.values()):
            return []
        self.state = State.DONE
        self._repeat.stop()
        return [Arrived(finish.token_id, finish.logprob), Tell(Ack(transfer_id=self.transfer_id))]

    def _unanswered(self) -> list[Action]:
        if self.state is State.STOPPING or self.state is State.CLOSED:
            return [Tell(Abort(transfer_id=self.transfer_id, reason=self._outcome.reason))]
        if not self._chunks and self._finish is None:
            return [Tell(self._grant)]
        actions: list[Action] = []
        for seq, chunk in self._chunks.items():
            if chunk.state is _Chunk.MOVING:
                actions.append(Tell(self._accept_message(chunk)))
            elif chunk.state is _Chunk.VALIDATING:
                actions.append(Tell(Validate(transfer_id=self.transfer_id, seq=seq, retry=chunk.retry)))
        return actions

    def _accept_message(self, chunk: _Incoming) -> Accept:
        return Accept(transfer_id=self.transfer_id, seq=chunk.offer.seq, retry=chunk.retry)

    def _destination(self, offer: Offer) -> tuple[int, ...]:
        begin = offer.first_block - self._first_block
        return self._blocks[begin : begin + len(offer.source)]

    def _stop(self, reason: str) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        self.state = State.STOPPING
        self._outcome = Ended(False, reason)
        return [CancelIo()]
