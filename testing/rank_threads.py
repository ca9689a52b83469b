"""The ranks of a group as threads of one process: what a worker's group of processes does, without processes.

    group = RankThreads(lambda peers: ModelRunner.load(folder, peers=peers), count=4)
    group.bind_pool(pool)
    drawn = group.step(rows)

Every step runs a thread for each further rank, so that a rank that ends with an error fails the step for all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from baton.models.adapters.adapter import Adapter
from baton.models.adapters.flat import Directory
from baton.models.batch import Drawn, Launched, Row
from baton.models.cpu.peers import FilledSlot, MappableMemory, OwnMemory, RankPeers, sum_in_order
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import Rank
from baton.node.errors import PeerLost

T = TypeVar("T")
X = TypeVar("X")

BARRIER_S = 30.0


class _Board:
    """Where the ranks put their parts."""

    def __init__(self, count: int) -> None:
        self.parts: list[torch.Tensor] = [torch.empty(0)] * count
        self.barrier = threading.Barrier(count, timeout=BARRIER_S)
        self.begun: Sequence[Row] | FilledSlot = ()
        """The rows of the step that rank 0 has begun, or the slot that it has filled."""

    def exchange(self, index: int, part: torch.Tensor) -> list[torch.Tensor]:
        """The parts of all ranks; none is changed after it was given."""
        self.parts[index] = part
        self.wait()
        parts = list(self.parts)
        self.wait()
        return parts

    def wait(self) -> None:
        """For all ranks to come here."""
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerLost("another rank has ended, or does not answer") from None


class ThreadPeers:
    """models.cpu.peers.RankPeers between threads."""

    def __init__(self, rank: Rank, board: _Board) -> None:
        self.rank = rank
        self._board = board
        self.num_sums = self.num_gathered_bytes = 0
        """What this rank has exchanged."""

    def begin(self, rows: Sequence[Row]) -> None:
        self._board.begun = rows
        self._board.wait()

    def begun(self) -> Sequence[Row] | FilledSlot:
        """What rank 0 does next, once it has begun."""
        self._board.wait()
        return self._board.begun

    def allocate(self, size_bytes: int) -> MappableMemory:
        return OwnMemory.of(size_bytes)

    def fill(self, slot: int, memory: MappableMemory, directory: Directory) -> None:
        self._board.begun = FilledSlot(slot, memory.tensor, directory)
        self._board.wait()

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return sum_in_order(self._board.exchange(self.rank.index, part))

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        assert part.dtype == torch.float32 and part.shape[1] == widths[self.rank.index]
        self.num_gathered_bytes += part.nbytes
        return torch.cat(self._board.exchange(self.rank.index, part), -1)


class RankThreads:
    """A group over one pool, with the calls of a ModelRunner."""

    def __init__(self, load: Callable[[RankPeers], ModelRunner], count: int) -> None:
        self._board = _Board(count)
        self.peers = [ThreadPeers(Rank(index, count), self._board) for index in range(count)]
        self.runners = [load(peers) for peers in self.peers]
        first = self.runners[0]
        self.config, self.dtype, self.kv_format, self.run_ahead = first.config, first.dtype, first.kv_format, 0

    def bind_pool(self, pool: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        for runner in self.runners:
            runner.bind_pool(pool, scales)

    def launch(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> Launched:
        return self._together(lambda rows: self.runners[0].launch(rows, entering), rows)

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> torch.Tensor:
        return self._together(lambda rows: self.runners[0].advance(rows, entering), rows)

    def fill(self, slot: int, adapter: Adapter) -> None:
        """Fill a slot of all ranks."""
        slots = self.runners[0].adapters
        self._together(lambda prepared: slots.fill(slot, prepared), slots.prepare(adapter))

    def _together(self, call: Callable[[X], T], argument: X) -> T:
        """Rank 0 makes the call, and the others join the step."""
        with ThreadPoolExecutor(len(self.runners)) as threads:
            joined = [threads.submit(self._guarded, self._join, index) for index in range(1, len(self.runners))]
            made = self._guarded(call, argument)
        for each in joined:
            each.result()
        return made

    def step(self, rows: Sequence[Row]) -> list[Drawn | None]:
        return self.launch(rows).read()

    def _join(self, index: int) -> None:
        self.runners[index].join(self.peers[index].begun())

    def _guarded(self, call: Callable[[X], T], argument: X) -> T:
        try:
            return call(argument)
        except BaseException:
            self._board.barrier.abort()
            raise
