"""What a rank's steps on a GPU ask of the others: sums inside norms, the best tokens of all, all logits, and to meet.

A rank has one piece of memory that all ranks of its group map (`RankMemory` says what lies where in it). Before they
know each other a rank sends to itself in the place of the others: so it compiles, captures and times its steps alone.
`connect` brings the addresses of the others; captured steps read them where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from baton.kernels.triton.rank_vocabulary import gather_logits, meet, pieces_of
from baton.kernels.triton.rank_words import TWO_STEPS, RankInbox, word_type
from baton.models.config import ModelConfig
from baton.models.partition import Rank
from baton.node.errors import PeerLost

SUMS_BYTES = 256 << 20
"""Of the inbox of sums at most. Steps of more rows than it takes exchange them part by part."""
SUMS_ROWS = 4096
GATHERED_ROWS = 16
"""Rows of logits that are exchanged at a time."""
DRAWN_ROWS = 1024
ALIGNED = 512


@dataclass(frozen=True, slots=True)
class InboxShape:
    """An inbox in a rank's memory."""

    rows: int
    width: int
    words: torch.dtype
    pieces: int = 1
    sums: bool = False

    def two_steps(self, count: int) -> bool:
        """Of sums of so many ranks."""
        return self.sums and count >= TWO_STEPS and self.width % count == 0

    def places(self, count: int) -> int:
        return 2 if self.two_steps(count) else count

    def words_bytes(self, count: int) -> int:
        return self.places(count) * self.place_bytes

    @property
    def place_bytes(self) -> int:
        return 2 * self.rows * self.width * self.words.itemsize

    def offset(self, sender: int, count: int) -> int:
        """Of what a rank sends, behind the begin of another's words. A piece's kernel knows the place in a row."""
        return 0 if self.two_steps(count) else sender * self.place_bytes

    def offset_alone(self, rank: int, other: int, count: int) -> int:
        """Where a rank that sends to itself finds what the other would send, as if that were sent by itself."""
        if self.two_steps(count):
            return (other - rank) * (self.width // count) * self.words.itemsize
        return other * self.place_bytes


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What lies in the memory that a rank shares with the others: inboxes of sums, of drawn tokens and of logits."""

    rank: Rank
    inboxes: tuple[InboxShape, ...]

    @classmethod
    def of(cls, config: ModelConfig, rank: Rank, dtype: torch.dtype, max_tokens: int) -> RankMemory:
        """For steps of up to max_tokens tokens."""
        words = word_type(dtype)
        row_bytes = InboxShape(1, config.hidden_size, words, sums=True).words_bytes(rank.count)
        rows = max(1, min(SUMS_ROWS, SUMS_BYTES // row_bytes, max_tokens))
        share = -(-config.vocab_size // rank.count)
        return cls(
            rank,
            (
                InboxShape(rows, config.hidden_size, words, sums=True),
                InboxShape(DRAWN_ROWS, 1, torch.int64),
                InboxShape(GATHERED_ROWS, -(-share // 4) * 4, words, pieces_of(share)),
            ),
        )

    @property
    def offsets(self) -> list[int]:
        """Of the inboxes, and of the end."""
        offsets = [0]
        for inbox in self.inboxes:
            end = offsets[-1] + inbox.words_bytes(self.rank.count)
            offsets.append(-(-end // ALIGNED) * ALIGNED)
        return offsets

    @property
    def size_bytes(self) -> int:
        return self.offsets[-1]


class DevicePeers:
    """One rank's end of its group; `memory`: uint8 [layout.size_bytes], zeroed."""

    def __init__(
        self, layout: RankMemory, memory: torch.Tensor, vocab_size: int, meet: Callable[[], None] | None = None
    ) -> None:
        """meet: see RankInbox."""
        self.rank = layout.rank
        self._layout, self._memory, self._vocab_size = layout, memory, vocab_size
        device = memory.device
        self._lost = torch.zeros(1, dtype=torch.int32, device=device)
        self._inboxes = []
        for inbox, offset in zip(layout.inboxes, layout.offsets, strict=False):
            words = memory[offset : offset + inbox.words_bytes(self.rank.count)].view(inbox.words)
            self._inboxes.append(
                RankInbox(
                    self.rank.index,
                    self.rank.count,
                    words.view(-1, 2, inbox.rows, inbox.width),
                    torch.zeros(self.rank.count, dtype=torch.int64, device=device),
                    torch.zeros(inbox.rows * inbox.pieces, dtype=torch.int32, device=device),
                    self._lost,
                    inbox.two_steps(self.rank.count),
                    meet,
                )
            )
        self.sums, self.drawn, self._gathered = self._inboxes
        self._pinned = torch.zeros(1, dtype=torch.int32, pin_memory=memory.is_cuda)
        # For `give_up`, made now: to allocate pinned memory, or to make a stream, may wait for the kernels that wait.
        # The stream has another priority than steps, and so no queue of the hardware with them.
        self._given_up = torch.ones(1, dtype=torch.int32, pin_memory=memory.is_cuda)
        self._aside = torch.cuda.Stream(device, priority=-1) if memory.is_cuda else None
        self._whole: torch.Tensor | None = None
        self._loop_back()

    @property
    def first_token(self) -> int:
        return self.rank.vocabulary(self._vocab_size).start

    def reserve(self, num_rows: int, dtype: torch.dtype) -> None:
        """Memory for the whole logits of so many rows."""
        self._whole = torch.zeros(num_rows, self._vocab_size, dtype=dtype, device=self._memory.device)

    def connect(self, addresses: Sequence[int]) -> None:
        """From now on exchange with the others; addresses: of the memory of each rank, as this process maps it. All
        ranks have to have called this, and no step of theirs may run, before the first step."""
        self._memory.zero_()
        for inbox, shape, offset in zip(self._inboxes, self._layout.inboxes, self._layout.offsets, strict=False):
            sent = offset + shape.offset(self.rank.index, self.rank.count)
            inbox.targets.copy_(torch.tensor([address + sent for address in addresses]))
            inbox.counters.zero_()
        self._lost.zero_()
        self._pinned.zero_()
        self._settle()

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """All logits of the rows, [M, vocab], of this rank's part; valid until the next call has run."""
        assert self._whole is not None, "memory was reserved"
        out = self._whole[: len(logits)]
        gather_logits(logits, self._gathered, out)
        return out

    def meet(self) -> None:
        """Nothing behind it runs before all ranks have come here."""
        meet(self.drawn)

    def bring(self) -> None:
        """Enqueued behind a step: `check` says afterwards whether the others have come."""
        self._pinned.copy_(self._lost, non_blocking=True)

    def give_up(self) -> None:
        """End all waiting for other ranks, which then counts as in vain. From any thread, while steps run."""
        if self._aside is None:
            self._lost.copy_(self._given_up)
            return
        # a thread begins with GPU 0, on which no context is to be made
        with torch.cuda.device(self._aside.device), torch.cuda.stream(self._aside):
            self._lost.copy_(self._given_up, non_blocking=True)
        self._aside.synchronize()

    def check(self) -> None:
        """PeerLost if waiting for another rank was given up."""
        if int(self._pinned[0]):
            raise PeerLost("another rank does not take part in a step")

    def _loop_back(self) -> None:
        """Send to oneself, in the place of the others."""
        rank, count = self.rank.index, self.rank.count
        for inbox, shape in zip(self._inboxes, self._layout.inboxes, strict=True):
            begin = inbox.words.data_ptr()
            inbox.targets.copy_(torch.tensor([begin + shape.offset_alone(rank, each, count) for each in range(count)]))
        self._settle()

    def _settle(self) -> None:
        """Steps run on streams of their own."""
        if self._memory.is_cuda:
            torch.cuda.synchronize(self._memory.device)
