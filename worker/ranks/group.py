"""Rank 0's side of a group: starts the other ranks, gives them the pool, notices that one is gone, and ends them.

A rank's death closes its links, and a rank that is frozen sends no beats: both are noticed within LOST_S, also in the
middle of a step, and are the death of the worker. The other ranks end when rank 0 does. They belong to its process
group, and leave signals to it.
"""

from __future__ import annotations

import logging
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

import torch

from baton.kvtransfer.blocks.memory import HostMemory, SharedFile
from baton.kvtransfer.blocks.pool import BlockPool
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken, PeerLost, SettingsError
from baton.node.telemetry import log_event
from baton.worker.io_thread import RankLost
from baton.worker.ranks.exchange import ProcessPeers, memory_bytes
from baton.worker.ranks.links import RankLink, pair
from baton.worker.ranks.messages import (
    BEAT_S,
    PoolMade,
    RankMessage,
    RankReady,
    RankStart,
    SharedBytes,
    decode,
    encode,
)

logger = logging.getLogger("ranks")

LOST_S = 2.5
"""Without a beat."""
LOAD_S = 3600.0
"""A rank loads its part at the same time as rank 0."""
STOP_S = 2.0

Deliver = Callable[[RankLost], None]
T = TypeVar("T")


def _nothing() -> None: ...


class RankGroup:
    """The other ranks of a worker. Made in the main thread, which outlives them."""

    def __init__(self, count: int, start: Callable[[int, dict[int, int], SharedBytes], RankStart]) -> None:
        """start(index, fds of its links by rank, shared memory) describes a rank. They begin to load at once."""
        self._memory = HostMemory(1, memory_bytes(count))
        memory = shared_bytes(self._memory.shared)
        self._controls: list[RankLink] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = threading.Event()
        self.on_lost: Callable[[], None] = _nothing
        """Called when a rank is lost, before anything else: ends waits that are not at a link."""
        self._watcher: threading.Thread | None = None
        ends: dict[int, dict[int, RankLink]] = {index: {} for index in range(count)}
        for one, other in combinations(range(count), 2):
            ends[one][other], ends[other][one] = pair(one, other)
        self.links = list(ends[0].values())
        for index in range(1, count):
            own, theirs = pair(0, index)
            self._controls.append(own)
            self._processes.append(_started(theirs, list(ends[index].values())))
            fds = {other: link.fileno() for other, link in ends[index].items()}
            own.send(encode(start(index, fds, memory)))
            for link in (theirs, *ends[index].values()):
                link.close()

    def peers(self, vocab_size: int) -> ProcessPeers:
        """Of rank 0."""
        memory = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        return ProcessPeers(Rank(0, len(self.links) + 1), vocab_size, memory, self.links)

    def share_pool(self, pool: BlockPool) -> None:
        """Give the pool to all ranks, and wait until they can join steps. SettingsError if one cannot."""
        self.tell(
            PoolMade(
                memory=shared_bytes(pool.shared), num_blocks=pool.num_blocks, block_tokens=pool.layout.block_tokens
            )
        )
        self.answers(RankReady)

    def tell(self, message: RankMessage) -> None:
        """Something to all other ranks, which start. SettingsError if one has ended."""
        try:
            for control in self._controls:
                control.send(encode(message))
        except PeerLost as error:
            self.close()
            raise SettingsError(f"{error} while it started") from None

    def answers(self, kind: type[T]) -> list[T]:
        """A message of this kind from each other rank, in order. SettingsError if one cannot start."""
        found: list[T] = []
        try:
            for control in self._controls:
                message = decode(control.receive(LOAD_S))
                if not isinstance(message, kind):
                    raise InvariantBroken(f"{type(message).__name__} from rank {control.other}, not {kind.__name__}")
                found.append(message)
            return found
        except PeerLost as error:
            self.close()
            raise SettingsError(f"{error} while it started") from None

    def watch(self, deliver: Deliver) -> None:
        """From now on a thread calls `deliver` when a rank is lost, and what waits for that rank ends with PeerLost."""
        self._watcher = threading.Thread(target=self._watch, args=(deliver,), name="ranks", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """End the other ranks. May be repeated."""
        self._ended.set()
        for link in (*self._controls, *self.links):
            link.shut()
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher is not None:
            self._watcher.join(STOP_S)

    def _watch(self, deliver: Deliver) -> None:
        with selectors.DefaultSelector() as selector:
            for control in self._controls:
                selector.register(control, selectors.EVENT_READ, control)
            beats = Beats([control.other for control in self._controls], time.monotonic())
            reason = ""
            while not reason and not self._ended.is_set():
                ready = selector.select(BEAT_S)
                for key, _ in ready:
                    try:
                        key.data.receive(0.0)
                    except PeerLost as error:
                        reason = str(error)
                    else:
                        beats.heard(key.data.other, time.monotonic())
                reason = reason or beats.missing(time.monotonic())
        if not self._ended.is_set():
            log_event(logger, "rank_lost", level=logging.ERROR, reason=reason)
            self.on_lost()
            for link in self.links:
                link.shut()
            deliver(RankLost(reason))


class Beats:
    """When each rank was heard last. A process that stood still itself blames no other for that."""

    def __init__(self, ranks: Sequence[int], now: float) -> None:
        self._heard_at = dict.fromkeys(ranks, now)
        self._looked_at = now

    def heard(self, rank: int, now: float) -> None:
        self._heard_at[rank] = now

    def missing(self, now: float) -> str:
        """What is wrong, or ""; to be asked every BEAT_S."""
        pause_s, self._looked_at = now - self._looked_at, now
        if pause_s > 2 * BEAT_S:
            self._heard_at = {rank: heard_at + pause_s for rank, heard_at in self._heard_at.items()}
        rank, heard_at = min(self._heard_at.items(), key=lambda item: item[1])
        return f"rank {rank} does not answer" if now - heard_at > LOST_S else ""


class NoRanks:
    """A worker of one rank."""

    def share_pool(self, pool: BlockPool) -> None: ...

    def watch(self, deliver: Deliver) -> None: ...

    def close(self) -> None: ...


NO_RANKS = NoRanks()
Ranks = RankGroup | NoRanks


def shared_bytes(shared: SharedFile | None) -> SharedBytes:
    """SettingsError where processes cannot share memory."""
    if shared is None:
        raise SettingsError("--tp: this system has no memfd_create, by which ranks share memory")
    return SharedBytes(shared.fd, shared.size_bytes, shared.nonce)


def _started(control: RankLink, links: Sequence[RankLink]) -> subprocess.Popen[bytes]:
    """A rank's process, which inherits its ends of the links."""
    return subprocess.Popen(
        (sys.executable, "-P", "-m", "baton.worker.ranks", str(control.fileno())),
        stdin=subprocess.DEVNULL,
        pass_fds=[control.fileno(), *(link.fileno() for link in links)],
    )
