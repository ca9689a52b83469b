"""Prefill's half of the transfer protocol (see transfer.py): offer what is computed, send what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.protocol.transfer import (
    Action,
    CancelIo,
    DigestsOf,
    Ended,
    PostSend,
    Repeater,
    SendMessage,
    State,
    Timing,
)
from baton.node.messages.base import MAX_OFFER_BLOCKS, Message
from baton.node.messages.control import Logprob
from baton.node.messages.transfer import (
    Abort,
    Aborted,
    Accept,
    Ack,
    Finish,
    Grant,
    Offer,
    Renew,
    Renewed,
    Valid,
    Validate,
)


@dataclass(slots=True)
class _Offered:
    first_block: int
    blocks: tuple[int, ...]
    digest: bytes
    posted: set[int] = field(default_factory=set)  # retries for which a send was posted


@dataclass(slots=True)
class _FirstToken:
    token_id: int
    logprob: Logprob | None
    drawn_at: float
    waited_s: float = 0.0  # from then to the first Finish


@dataclass(slots=True)
class _Lease:
    """The sender holds its blocks while messages of the receiver renew this."""

    duration_s: float
    renewed_at: float

    def expired(self, now: float) -> bool:
        return now - self.renewed_at > self.duration_s

    @property
    def ends_at(self) -> float:
        return self.renewed_at + self.duration_s


class Sender:
    """Prefill's half. `digests_of` reads the pool; it is called for chunks that are offered, once each, unless the
    checksums of their blocks are known. `chunk_blocks`: how many blocks one offer may have now."""

    def __init__(
        self,
        digests_of: DigestsOf,
        *,
        chunk_blocks: Callable[[], int],
        timing: Timing,
        now: float,
        deadline: float,
    ) -> None:
        self.state = State.OPEN
        self.transfer_id: bytes | None = None
        self.started_at = 0.0
        self._digests_of = digests_of
        self._chunk_blocks = chunk_blocks
        self._lease = _Lease(timing.lease_s, now)
        self._deadline = deadline
        self._blocks: tuple[int, ...] = ()
        self._sums: dict[int, bytes] = {}  # checksums of blocks, as far as they are known
        self._next_block = 0  # first block not offered yet
        self._chunks: list[_Offered] = []
        self._token: _FirstToken | None = None
        self._repeat = Repeater(timing)
        self._outcome = Ended(False, "never started")

    @property
    def offered_blocks(self) -> int:
        return sum(len(chunk.blocks) for chunk in self._chunks)

    # -- called by the worker

    def on_blocks(self, blocks: Sequence[int], sums: Mapping[int, bytes], now: float) -> list[Action]:
        """The sequence's first len(blocks) blocks are final: from the first block of the prompt on, in order. `sums`:
        checksums of some of them."""
        if self.state is not State.OPEN:
            return []
        self._blocks = tuple(blocks)
        self._sums.update(sums)
        return self._offer(now)

    def on_token(self, token_id: int, logprob: Logprob | None, now: float) -> list[Action]:
        """All blocks are final; this is the first token."""
        if self.state is not State.OPEN:
            return []
        self._token = _FirstToken(token_id, logprob, now)
        return self._offer(now)

    def abort(self, reason: str, now: float, *, cancelled: bool = False) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        return [*self._stop(Ended(False, reason, cancelled)), *self._abort_messages()]

    # -- called for messages

    def on_message(self, message: Message, now: float) -> list[Action]:
        self._lease.renewed_at = now
        match message:
            case Grant():
                return self._on_grant(message, now)
            case Abort():
                return [
                    *self._stop(Ended(False, message.reason, message.cancelled)),
                    SendMessage(Aborted(transfer_id=message.transfer_id)),
                ]
            case Aborted():
                return self._stop(Ended(False, "aborted by the peer"))
            case Ack():
                return self._stop(Ended(True))
        if self.state is not State.OPEN:
            return [] if self._outcome.ok else self._abort_messages()
        match message:
            case Accept():
                return self._on_accept(message)
            case Validate():
                return [SendMessage(Valid(transfer_id=message.transfer_id, seq=message.seq, retry=message.retry))]
            case Renew():
                return self._renewed()
        return []

    def on_timer(self, now: float) -> list[Action]:
        """Call at `wake_at` at the latest."""
        if self.state is State.OPEN and now >= self._deadline:
            return self.abort("deadline", now)
        if self.state is State.OPEN and self.transfer_id is not None and self._lease.expired(now):
            return self.abort("lease expired", now)
        if self.state is not State.OPEN or not self._repeat.due(now):
            return []
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
            return float("inf")
        lease_end = self._lease.ends_at if self.transfer_id is not None else float("inf")
        return min(self._deadline, lease_end, self._repeat.at)

    # -- inside

    def _on_grant(self, grant: Grant, now: float) -> list[Action]:
        if self.transfer_id is not None:
            return self._renewed()
        self.transfer_id = grant.transfer_id
        self._lease.duration_s = min(self._lease.duration_s, grant.lease_s)
        self.started_at = now
        self._next_block = grant.first_block
        return (self._offer(now) or self._renewed()) if self.state is State.OPEN else self._abort_messages()

    def _renewed(self) -> list[Action]:
        if self.transfer_id is None or self.state is not State.OPEN:
            return []
        return [SendMessage(Renewed(transfer_id=self.transfer_id))]

    def _on_accept(self, accept: Accept) -> list[Action]:
        if accept.seq >= len(self._chunks):
            return []
        chunk = self._chunks[accept.seq]
        if accept.retry in chunk.posted:
            return []
        chunk.posted.add(accept.retry)
        assert self.transfer_id is not None
        return [PostSend(ChunkKey(self.transfer_id, accept.seq, accept.retry), chunk.blocks)]

    def _offer(self, now: float) -> list[Action]:
        """Offer all final blocks that the receiver lacks, in chunks; with the token goes the Finish."""
        if self.transfer_id is None:
            return []
        actions: list[Action] = []
        chunks = self._cut()
        for blocks, digest in zip(chunks, self._digests(chunks), strict=True):
            self._chunks.append(_Offered(self._next_block, blocks, digest))
            self._next_block += len(blocks)
            actions.append(SendMessage(self._offer_message(len(self._chunks) - 1)))
        if self._token is not None:
            self._token.waited_s = max(0.0, now - self._token.drawn_at)
            actions.append(SendMessage(self._finish_message()))
        if actions:
            self._repeat.start(now)
        return actions

    def _cut(self) -> list[tuple[int, ...]]:
        """What is final and was not offered, in chunks; of each, all checksums are known or none."""
        chunks: list[tuple[int, ...]] = []
        most = min(self._chunk_blocks(), MAX_OFFER_BLOCKS)  # of small blocks a chunk would have more
        for _, group in groupby(self._blocks[self._next_block :], self._sums.__contains__):
            blocks = tuple(group)
            chunks += [blocks[start : start + most] for start in range(0, len(blocks), most)]
        return chunks

    def _digests(self, chunks: Sequence[tuple[int, ...]]) -> list[bytes]:
        """Of these chunks; those that need the pool are read together."""
        sums = self._sums
        known = {chunk: digest_of_sums([sums[block] for block in chunk]) for chunk in chunks if chunk[0] in sums}
        others = [chunk for chunk in chunks if chunk not in known]
        known.update(zip(others, self._digests_of(others) if others else (), strict=True))
        return [known[chunk] for chunk in chunks]

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
        return Finish(
            transfer_id=self.transfer_id,
            num_chunks=len(self._chunks),
            token_id=self._token.token_id,
            logprob=self._token.logprob,
            waited_s=self._token.waited_s,
        )

    def _unanswered(self) -> list[Action]:
        """Offers that were never accepted, and the Finish, once more."""
        actions: list[Action] = [
            SendMessage(self._offer_message(seq)) for seq, chunk in enumerate(self._chunks) if not chunk.posted
        ]
        if self._token is not None:
            actions.append(SendMessage(self._finish_message()))
        return actions

    def _abort_messages(self) -> list[Action]:
        if self.transfer_id is None:
            return []
        outcome = self._outcome
        return [SendMessage(Abort(transfer_id=self.transfer_id, reason=outcome.reason, cancelled=outcome.cancelled))]

    def _stop(self, outcome: Ended) -> list[Action]:
        if self.state is not State.OPEN:
            return []
        self.state = State.STOPPING
        self._outcome = outcome
        return [CancelIo()]
