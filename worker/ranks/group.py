"""Rank 0's side of a group: starts the other ranks of a worker, or of one of its stages, and gives them the pool."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import TypeVar

import torch

from baton.kvtransfer.blocks.memory import HostMemory
from baton.models.cpu.peers import NO_PEERS, RankPeers
from baton.models.partition import Rank
from baton.node.errors import SettingsError
from baton.worker.ranks.exchange import ProcessPeers, memory_bytes
from baton.worker.ranks.links import RankLink, pair
from baton.worker.ranks.members import (
    NO_RANKS,
    Deliver,
    MemberWatch,
    NoRanks,
    answers,
    beat,
    reap,
    shared_bytes,
    start_process,
    tell,
)
from baton.worker.ranks.messages import ModelPart, PoolMade, RankMessage, RankReady, RankStart, SharedBytes, encode

T = TypeVar("T")


class RankGroup:
    """The other ranks. Made in the main thread, which outlives them."""

    def __init__(self, count: int, start: Callable[[int, dict[int, int], SharedBytes], RankStart]) -> None:
        """start(index, fds of its links by rank, shared memory) describes a rank. They begin to load at once."""
        self._memory = HostMemory(1, memory_bytes(count))
        memory = shared_bytes(self._memory.shared)
        self._controls: list[RankLink] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        ends: dict[int, dict[int, RankLink]] = {index: {} for index in range(count)}
        for one, other in combinations(range(count), 2):
            ends[one][other], ends[other][one] = pair(one, other)
        self.links = list(ends[0].values())
        for index in range(1, count):
            own, theirs = pair(0, index)
            fds = {other: link.fileno() for other, link in ends[index].items()}
            self._controls.append(own)
            self._processes.append(start_process("baton.worker.ranks", theirs, list(fds.values())))
            own.send(encode(start(index, fds, memory)))
            for link in (theirs, *ends[index].values()):
                link.close()
        self.give_up: Callable[[], None] | None = None
        """Of ranks on GPUs: ends waits of rank 0's kernels for others. Such ranks follow rank 0's beats."""
        self._watch = MemberWatch(self._controls, self.links, self._end_waits)

    def peers(self, vocab_size: int) -> ProcessPeers:
        """Of rank 0."""
        memory = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        return ProcessPeers(Rank(0, len(self.links) + 1), vocab_size, memory, self.links)

    def share_pool(self, made: PoolMade) -> None:
        """Give the pool to all ranks, and wait until they can join steps. SettingsError if one cannot."""
        self.tell(made)
        self.answers(RankReady)

    def tell(self, message: RankMessage) -> None:
        """Something to all other ranks, which start. SettingsError if one has ended."""
        with self._closing():
            tell(self._controls, [message] * len(self._controls))

    def answers(self, kind: type[T]) -> list[T]:
        """A message of this kind from each other rank, in order. SettingsError if one cannot start."""
        with self._closing():
            return answers(self._controls, kind)

    def watch(self, deliver: Deliver) -> None:
        self._watch.begin(deliver)
        if self.give_up is not None:
            threading.Thread(target=beat, args=(self._controls,), name="beat", daemon=True).start()

    def _end_waits(self) -> None:
        if self.give_up is not None:
            self.give_up()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Closes the group where it cannot start."""
        try:
            yield
        except SettingsError:
            self.close()
            raise

    def close(self) -> None:
        self._watch.end()
        for link in (*self._controls, *self.links):
            link.shut()
        try:
            self._end_waits()  # else memory that is freed next would wait for kernels of a step that others do not join
        finally:
            reap(self._processes)
            self._watch.join()


def start_ranks(
    model: ModelPart, count: int, name: str, log_level: str, threads: int
) -> tuple[RankGroup | NoRanks, RankPeers]:
    """The ranks from 1 on, which load their parts while this process loads that of rank 0; and rank 0's end."""
    if count == 1:
        return NO_RANKS, NO_PEERS
    group = RankGroup(count, partial(rank_start, model, count, name, log_level, threads))
    return group, group.peers(model.vocab_size)


def rank_start(
    model: ModelPart,
    count: int,
    name: str,
    log_level: str,
    threads: int,
    index: int,
    fds: dict[int, int],
    memory: SharedBytes,
) -> RankStart:
    """Describes a rank of `count` to its process; name: of the worker or the stage."""
    return RankStart(
        index=index,
        count=count,
        starter_pid=os.getpid(),
        name=f"{name}/{index}",
        log_level=log_level,
        peer_fds=fds,
        memory=memory,
        model=model,
        threads=threads,
    )
