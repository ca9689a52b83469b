"""The data plane within one process, and the double of every other plane in tests: what happens is written in a script.

A `LoopbackFabric` joins several ends. For each movement (a chunk that is sent once) the script says whether it is
delivered, after how many polls of the receiver, whether a byte is wrong, whether it is lost, or whether both ends are
told that it failed. There is no clock and no chance: the same calls give the same results.
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
    """The sender believes that it was sent."""
    FAIL = auto()
    """Both ends are told."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one movement, at the receiver's poll number `after_polls` from now (at least 1)."""

    outcome: Outcome = Outcome.DELIVER
    after_polls: int = 1
    corrupt_at: int = 0
    """Which byte of the chunk is damaged, modulo its size."""


class Movement(NamedTuple):
    """What a script decides about."""

    sender: str
    receiver: str
    key: ChunkKey


Script = Callable[[Movement], Fate]


def deliver(movement: Movement) -> Fate:
    """The script in which nothing goes wrong."""
    return Fate()


@dataclass(slots=True)
class _Flight:
    movement: Movement
    blocks: tuple[int, ...]  # of the sender
    fate: Fate
    polls_left: int


class LoopbackFabric:
    """Joins the ends that are made of it. `polls_to_stop`: for so many polls a cancelled receive stays busy."""

    def __init__(self, script: Script = deliver, polls_to_stop: int = 0) -> None:
        self.script = script
        self.polls_to_stop = polls_to_stop
        self._ends: dict[str, LoopbackPlane] = {}
        self._flights: list[_Flight] = []

    def plane(self, identity: str, memory: BlockMemory) -> LoopbackPlane:
        """A new end, called `identity` as its worker is."""
        if identity in self._ends:
            raise InvariantBroken(f"two ends are called {identity}")
        self._ends[identity] = LoopbackPlane(self, identity, memory)
        return self._ends[identity]

    # -- for its ends

    def end(self, identity: str) -> LoopbackPlane | None:
        """The end of that name, unless it was closed."""
        return self._ends.get(identity)

    def launch(self, movement: Movement, blocks: Sequence[int]) -> None:
        """Start a movement of the sender's `blocks`."""
        fate = self.script(movement)
        self._flights.append(_Flight(movement, tuple(blocks), fate, max(1, fate.after_polls)))

    def land(self, receiver: str) -> list[_Flight]:
        """One poll of `receiver`: the flights that arrive with it."""
        mine = [flight for flight in self._flights if flight.movement.receiver == receiver]
        for flight in mine:
            flight.polls_left -= 1
        landed = [flight for flight in mine if flight.polls_left == 0]
        self._flights = [flight for flight in self._flights if flight.polls_left > 0]
        return landed

    def in_flight(self, sender: str, transfer_id: bytes) -> bool:
        return any(f.movement.sender == sender and f.movement.key.transfer_id == transfer_id for f in self._flights)

    def drop(self, which: Callable[[Movement], bool]) -> list[Movement]:
        """Take movements out of the air."""
        dropped = [flight.movement for flight in self._flights if which(flight.movement)]
        self._flights = [flight for flight in self._flights if not which(flight.movement)]
        return dropped

    def leave(self, identity: str) -> None:
        """An end closes: what it sent and what was sent to it is lost."""
        self._ends.pop(identity, None)
        self.drop(lambda movement: identity in (movement.sender, movement.receiver))


class LoopbackPlane:
    """One end; made by `LoopbackFabric.plane`."""

    name = "loopback"
    pulls = False

    def __init__(self, fabric: LoopbackFabric, identity: str, memory: BlockMemory) -> None:
        self.dropped: Counter[str] = Counter()
        """Movements that arrived and were not taken, by reason: unknown, stranger, size."""
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
        for flight in self._fabric.land(self._identity):
            self._land(flight)
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
        """The fabric's word to a sender: this send is over."""
        self._ledger.end_send(key, reason)

    # -- inside

    def _land(self, flight: _Flight) -> None:
        movement, fate = flight.movement, flight.fate
        sender, receive = self._fabric.end(movement.sender), self._ledger.receive(movement.key)
        assert sender is not None, "a closed end took its flights with it"
        failed = "as the script says" if fate.outcome is Outcome.FAIL else ""
        sender.sent(movement.key, failed)
        if fate.outcome is Outcome.LOSE:
            return
        if receive is None:
            self.dropped["unknown"] += 1
        elif receive.peer != movement.sender:
            self.dropped["stranger"] += 1
        elif failed:
            self._ledger.end_receive(movement.key, failed)
        elif len(receive.blocks) != len(flight.blocks) or self.memory.block_bytes != sender.memory.block_bytes:
            self.dropped["size"] += 1
        else:
            self._copy(sender.memory, flight, receive.blocks)
            self._ledger.end_receive(movement.key)

    def _copy(self, source: BlockMemory, flight: _Flight, blocks: Sequence[int]) -> None:
        for theirs, ours in zip(flight.blocks, blocks, strict=True):
            self.memory.block(ours)[:] = source.block(theirs)
        if flight.fate.outcome is Outcome.CORRUPT:
            index, offset = divmod(flight.fate.corrupt_at % (len(blocks) * source.block_bytes), source.block_bytes)
            self.memory.block(blocks[index])[offset] ^= 1
