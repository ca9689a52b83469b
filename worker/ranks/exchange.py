"""Sums and gathers between ranks that are processes of one host: models.cpu.peers.RankPeers over shared memory.

Each rank writes its part to a slot of its own, and all meet: a byte goes to every other rank and one comes from each.
Then every rank reads all slots. A rank has two slots, used in turn: who writes the second one has met all others since
they began to read the first, and writes the first again only after they have written their second.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from baton.kvtransfer.blocks.memory import HostMemory, SharedFile, SharedReader
from baton.models.adapters.flat import Directory
from baton.models.batch import Row
from baton.models.cpu.peers import FilledSlot, MappableMemory, sum_in_order
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken, PeerLost
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.members import shared_bytes
from baton.worker.ranks.messages import SharedBytes
from baton.worker.ranks.records import FillRecord, RecordDecoder, encode_fill, encode_rows

SLOT_BYTES = 4 << 20
"""Larger parts are exchanged piece by piece. Memory that is not used takes none."""
MEET_S = 30.0
"""A rank waits so long for the others in the middle of a step. That one is frozen is noticed earlier (ranks.group)."""
HEADER_BYTES = 8


def memory_bytes(count: int) -> int:
    """Of what the ranks of a group share."""
    return 2 * count * SLOT_BYTES


@dataclass(frozen=True, eq=False)
class AdapterMemory:
    """MappableMemory of an adapter, in the process `pid`, as it lies in this one."""

    tensor: torch.Tensor
    shared: SharedBytes
    pid: int

    @classmethod
    def made(cls, size_bytes: int) -> AdapterMemory:
        """In this process."""
        memory = HostMemory(1, size_bytes)
        found = cls(torch.frombuffer(memory.view, dtype=torch.uint8), shared_bytes(memory.shared), os.getpid())
        weakref.finalize(found, memory.close)
        return found

    @classmethod
    def of(cls, record: FillRecord) -> AdapterMemory | None:
        """Mapped. None if it is gone: what is in a slot is kept, so this slot was filled again since, and no step of
        this fill is to come. If its process is gone, that is noticed at the link to it."""
        shared = record.memory
        try:
            reader = SharedReader(record.pid, SharedFile(shared.fd, shared.size_bytes, shared.nonce), writable=True)
        except PeerLost:
            return None
        return cls(torch.frombuffer(reader.view, dtype=torch.uint8), shared, record.pid)


class ProcessPeers:
    """One rank's end. `memory`: uint8 [memory_bytes], shared; `links`: to all other ranks."""

    def __init__(
        self, rank: Rank, vocab_size: int, memory: torch.Tensor, links: Sequence[RankLink], meet_s: float = MEET_S
    ) -> None:
        self.rank = rank
        self._vocab_size = vocab_size
        self._slots = memory.view(2, rank.count, SLOT_BYTES)
        self._links = links
        self._meet_s = meet_s
        self._phase = 0
        self._records = RecordDecoder()

    def begin(self, rows: Sequence[Row]) -> None:
        self.tell(encode_rows(rows, self._vocab_size))

    def begun(self) -> list[Row] | FilledSlot:
        """Wait for rank 0 to begin a step, or to fill a slot, as long as it lives."""
        while isinstance(found := self._records.decode(self.hear()), FillRecord):
            if (memory := AdapterMemory.of(found)) is not None:
                return FilledSlot(found.slot, memory.tensor, found.directory)
        return found

    def allocate(self, size_bytes: int) -> MappableMemory:
        return AdapterMemory.made(size_bytes)

    def fill(self, slot: int, memory: MappableMemory, directory: Directory) -> None:
        if not isinstance(memory, AdapterMemory):
            raise InvariantBroken("an adapter in memory that no other rank can map")
        self.tell(encode_fill(FillRecord(slot, memory.pid, memory.shared, directory)))

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return self._exchanged(part, [part.shape[1]] * self.rank.count, sum_in_order)

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return self._exchanged(part, widths, lambda parts: torch.cat(list(parts), -1))

    def _exchanged(
        self, part: torch.Tensor, widths: Sequence[int], joined: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        """`joined` of the parts [N, widths[rank]] of all ranks, for as many rows at a time as a slot has room for."""
        most_rows = SLOT_BYTES // (max(widths) * part.itemsize)
        if not most_rows:
            raise InvariantBroken(f"rows of {max(widths) * part.itemsize} bytes, a slot has {SLOT_BYTES}")
        pieces = []
        for rows in part.split(most_rows):
            self._place(self.rank.index, rows.dtype, *rows.shape).copy_(rows)
            self._meet(self._meet_s)
            parts = [self._place(rank, rows.dtype, len(rows), width) for rank, width in enumerate(widths)]
            pieces.append(joined(parts))
            self._phase += 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def tell(self, message: bytes) -> None:
        """Rank 0: give the others a message of any length, which begins with that."""
        sent = len(message).to_bytes(HEADER_BYTES, "little") + message
        for first in range(0, len(sent), SLOT_BYTES):
            piece = torch.frombuffer(bytearray(sent[first : first + SLOT_BYTES]), dtype=torch.uint8)
            self._place(0, torch.uint8, len(piece)).copy_(piece)
            self._meet(self._meet_s)
            self._phase += 1

    def hear(self) -> bytes:
        """Wait for rank 0 to tell something, as long as it lives."""
        received, total = bytearray(), HEADER_BYTES
        while len(received) < total:
            self._meet(self._meet_s if received else None)
            if not received:
                total += int.from_bytes(self._place(0, torch.uint8, HEADER_BYTES).numpy().tobytes(), "little")
            size = min(total - len(received), SLOT_BYTES)
            received += self._place(0, torch.uint8, size).numpy().tobytes()
            self._phase += 1
        return bytes(received[HEADER_BYTES:])

    def _place(self, rank: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Of this shape, at the begin of a rank's slot of this phase."""
        size_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._slots[self._phase % 2, rank, :size_bytes].view(dtype).view(shape)

    def _meet(self, wait_s: float | None) -> None:
        """Wait until all ranks have written; PeerLost if one has ended or does not come in time."""
        mark = bytes((self._phase % 256,))
        for link in self._links:
            link.send(mark)
        for link in self._links:
            if (theirs := link.receive(wait_s)) != mark:
                raise InvariantBroken(
                    f"rank {link.other} is at exchange {theirs[0]}, rank {self.rank.index} at {mark[0]}"
                )
