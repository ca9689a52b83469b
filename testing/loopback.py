"""A scripted data plane within one process: the fake of every other plane in tests.

A `LoopbackFabric` connects several ends. For each movement (one send of a chunk) the script decides whether it is
delivered, after how many polls of the receiver, with a corrupt byte, lost, or reported as failed to both ends. There is
no clock and no randomness: the same calls give the same results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from baton.kvtransfer.blocks.memory import BlockMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.node.errors import InvariantBroken
from baton.node.messages.transfer import PlaneAddress


class Outcome(Enum):
    DELIVER = auto()
    CORRUPT = auto()
    """Delivered with one bit of one byte flipped."""
    LOSE = auto()
    """Reported as sent to the sender, and never delivered."""
    FAIL = auto()
    """Reported as failed to both ends."""


@dataclass(frozen=True, slots=True)
class Fate:
    """The outcome of one movement, at the receiver's poll number `after_polls` from now (at least 1)."""

    outcome: Outcome = Outcome.DELIVER
    after_polls: int = 1
    corrupt_at: int = 0
    """Index of the corrupted byte of the chunk, modulo its size."""


class Movement(NamedTuple):
    """One send of a chunk: the argument of a script."""

    sender: str
    receiver: str
    key: ChunkKey


Script = Callable[[Movement], Fate]


def deliver(movement: Movement) -> Fate:
    """The script without faults."""
    return Fate()


@dataclass(slots=True)
class _InFlightMovement:
    movement: Movement
    blocks: tuple[int, ...]  # of the sender
    fate: Fate
    polls_left: int


class LoopbackFabric:
    """Connects the ends that it creates. `polls_to_stop`: number of polls for which a cancelled receive stays busy."""

    def __init__(self, script: Script = deliver, polls_to_stop: int = 0) -> None:
        self.script = script
        self.polls_to_stop = polls_to_stop
        self._ends: dict[str, LoopbackPlane] = {}
        self._in_flight: list[_InFlightMovement] = []

    def plane(self, identity: str, memory: BlockMemory) -> LoopbackPlane:
        """A new end with the identity of its worker."""
        if identity in self._ends:
            raise InvariantBroken(f"two ends have the identity {identity}")
        self._ends[identity] = LoopbackPlane(self, identity, memory)
        return self._ends[identity]

    # -- called by the ends

    def end(self, identity: str) -> LoopbackPlane | None:
        """The end with this identity; None if it is closed."""
        return self._ends.get(identity)

    def launch(self, movement: Movement, blocks: Sequence[int]) -> None:
        """Start a movement of the sender's `blocks`."""
        fate = self.script(movement)
        self._in_flight.append(_InFlightMovement(movement, tuple(blocks), fate, max(1, fate.after_polls)))

    def land(self, receiver: str) -> list[_InFlightMovement]:
        """Advance `receiver` by one poll, and take the movements that arrive with it."""
        mine = [entry for entry in self._in_flight if entry.movement.receiver == receiver]
        for entry in mine:
            entry.polls_left -= 1
        landed = [entry for entry in mine if entry.polls_left == 0]
        self._in_flight = [entry for entry in self._in_flight if entry.polls_left > 0]
        return landed

    def in_flight(self, sender: str, transfer_id: bytes) -> bool:
        return any(f.movement.sender == sender and f.movement.key.transfer_id == transfer_id for f in self._in_flight)

    def drop(self, matches: Callable[[Movement], bool]) -> list[Movement]:
        """Discard the movements in flight that match."""
        dropped = [entry.movement for entry in self._in_flight if matches(entry.movement)]
        self._in_flight = [entry for entry in self._in_flight if not matches(entry.movement)]
        return dropped

    def leave(self, identity: str) -> None:
        """Close an end: movements to and from it are lost."""
        self._ends.pop(identity, None)
        self.drop(lambda movement: identity in (movement.sender, movement.receiver))


class LoopbackPlane:
    """One end of a `LoopbackFabric`, created by its `plane`."""

    name = "loopback"
    pulls = False

    def __init__(self, fabric: LoopbackFabric, identity: str, memory: BlockMemory) -> None:
        self.dropped: Counter[str] = Counter()
        """Arrived movements that were rejected, by reason: unknown, wrong_peer, size."""
        self.memory = memory
        self._fabric = fabric
        self._identity = identity
        self._ledger = IoLedger()
        self._peers: set[str] = set()
        self._stopping: dict[bytes, int] = {}  # polls until a cancelled transfer is idle

    def describe(self) -> PlaneAddress:
        return PlaneAddress(plane=self.name, host="loopback", address=self._identity)

    def reaches(self, peer: PlaneAddress) -> bool:
        return peer.plane == self.name and self._fabric.end(peer.address) is not None

    def connect(self, peer: str, address: PlaneAddress) -> None:
        self._peers.add(peer)

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self.memory.num_blocks, blocks)
        if peer in self._peers and self._fabric.end(peer) is not None:
            self._fabric.launch(Movement(self._identity, peer, key), blocks)
        else:
            self._ledger.end_send(key, "the peer is not connected")

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self.memory.num_blocks, blocks, source)
        self._ledger.post_receive(peer, key, blocks)

    def poll(self) -> list[IoDone]:
        self._stopping = {transfer_id: left - 1 for transfer_id, left in self._stopping.items() if left > 1}
        for entry in self._fabric.land(self._identity):
            self._land(entry)
        return self._ledger.report()

    def cancel(self, transfer_id: bytes) -> None:
        if self._ledger.receiving(transfer_id) and self._fabric.polls_to_stop:
            self._stopping[transfer_id] = self._fabric.polls_to_stop
        self._ledger.cancel(transfer_id)
        self._fabric.drop(lambda m: m.sender == self._identity and m.key.transfer_id == transfer_id)

    def idle(self, transfer_id: bytes) -> bool:
        sending = self._fabric.in_flight(self._identity, transfer_id)
        return not (sending or transfer_id in self._stopping or self._ledger.receiving(transfer_id))

    def forget(self, peer: str) -> None:
        self._peers.discard(peer)
        self._ledger.forget(peer)
        for movement in self._fabric.drop(lambda m: (m.sender, m.receiver) == (self._identity, peer)):
            self._ledger.end_send(movement.key, "the peer is gone")

    @property
    def pending(self) -> bool:
        """Always: movements advance with each poll."""
        return True

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        self._fabric.leave(self._identity)
        self._ledger.clear()

    def sent(self, key: ChunkKey, reason: str) -> None:
        """Called by the fabric when a send of this end has ended; `reason` is empty for success."""
        self._ledger.end_send(key, reason)

    # -- internals

    def _land(self, entry: _InFlightMovement) -> None:
        movement, fate = entry.movement, entry.fate
        sender, receive = self._fabric.end(movement.sender), self._ledger.receive(movement.key)
        assert sender is not None, "closing an end discards its movements"
        failed = "failed by the script" if fate.outcome is Outcome.FAIL else ""
        sender.sent(movement.key, failed)
        if fate.outcome is Outcome.LOSE:
            return
        if receive is None:
            self.dropped["unknown"] += 1
        elif receive.peer != movement.sender:
            self.dropped["wrong_peer"] += 1
        elif failed:
            self._ledger.end_receive(movement.key, failed)
        elif len(receive.blocks) != len(entry.blocks) or self.memory.block_bytes != sender.memory.block_bytes:
            self.dropped["size"] += 1
        else:
            self._copy(sender.memory, entry, receive.blocks)
            self._ledger.end_receive(movement.key)

    def _copy(self, source: BlockMemory, entry: _InFlightMovement, blocks: Sequence[int]) -> None:
        for theirs, ours in zip(entry.blocks, blocks, strict=True):
            self.memory.block(ours)[:] = source.block(theirs)
        if entry.fate.outcome is Outcome.CORRUPT:
            index, offset = divmod(entry.fate.corrupt_at % (len(blocks) * source.block_bytes), source.block_bytes)
            self.memory.block(blocks[index])[offset] ^= 1
