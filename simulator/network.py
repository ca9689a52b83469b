"""The simulated network between processes: lines that carry messages, and a data plane with delay bytes / bandwidth.

A message arrives `message_s` after it was sent, in order, unless its receiver is dead by then. Heartbeats, most of the
events of a thousand workers, arrive at once if they overtake no message in flight. A movement of KV waits until the
sender's link and the receiver's link are both free, and then occupies both. No bytes are copied: every block has the
same digest, and the protocol's own checks verify that every block was moved.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.node.messages.base import Message
from baton.node.messages.control import Heartbeat, Ping
from baton.node.messages.transfer import PlaneAddress
from baton.simulator.world import World

Ready = Callable[[], object]


def digests_of(chunks: Sequence[Sequence[int]]) -> list[bytes]:
    """Content is not simulated."""
    return [b"\0" * 8] * len(chunks)


class Network:
    """All lines and planes, by the identity of their process."""

    def __init__(self, world: World, message_s: float, chunk_s: float, link_bytes_s: float) -> None:
        self.world = world
        self.messages = 0
        self.moved_bytes = 0
        self.lines: dict[str, SimLine] = {}
        self.planes: dict[str, SimPlane] = {}
        self._message_s = message_s
        self._chunk_s = chunk_s
        self._link_bytes_s = link_bytes_s
        self._out_free_at: defaultdict[str, float] = defaultdict(float)
        self._in_free_at: defaultdict[str, float] = defaultdict(float)
        self._late: defaultdict[str, deque[tuple[float, int, list[float]]]] = defaultdict(deque)

    def remove(self, identity: str) -> None:
        """Mark a process as dead: messages to it are lost, and so is the KV that it was sending."""
        self.lines.pop(identity, None)
        for name in [name for name in self.planes if name == identity or name.startswith(f"{identity}/")]:
            del self.planes[name]

    def post(self, sender: str, target: str, message: Message) -> float:
        """Send a message; returns its arrival time."""
        self.messages += 1
        arrives_at = self.world.now + self._message_s
        self.world.at(arrives_at, self._deliver, sender, target, message)
        return arrives_at

    def move(self, sender: str, receiver: str, size_bytes: int) -> float:
        """Start a movement as soon as both links are free; returns its arrival time."""
        start = max(self.world.now, self._out_free_at[sender], self._in_free_at[receiver])
        end = start + self._chunk_s + size_bytes / self._link_bytes_s
        self._out_free_at[sender] = self._in_free_at[receiver] = end
        self.moved_bytes += size_bytes
        return end

    def note_late(self, request_id: str, index: int, stamps: Sequence[float]) -> None:
        """Record that a message sent now carries tokens from number `index` on that were sampled at `stamps`."""
        times = [stamp + self._message_s for stamp in stamps]
        self._late[request_id].append((self.world.now + self._message_s, index, times))

    def times_of(self, request_id: str, index: int, count: int) -> list[float]:
        """The times at which tokens [index, index + count) reached the proxy."""
        late = self._late[request_id]
        while late and late[0][0] < self.world.now:
            late.popleft()
        if not late or late[0][0] > self.world.now:
            return [self.world.now] * count
        _, first, times = late.popleft()
        return times[index - first : index - first + count]

    def forget(self, request_id: str) -> None:
        self._late.pop(request_id, None)

    def _deliver(self, sender: str, target: str, message: Message) -> None:
        line = self.lines.get(target)
        if line is not None:
            line.arrive(sender, message)


class SimLine:
    """The endpoint of one process: replaces node.endpoint.Endpoint in the proxy and in a worker's I/O thread."""

    def __init__(self, network: Network, identity: str, on_ready: Ready) -> None:
        self._identity = identity
        self._network = network
        self._on_ready = on_ready
        self._inbox: list[tuple[str, Message]] = []
        self._links: set[str] = set()
        self._quiet_at = 0.0  # arrival time of the last message sent
        network.lines[identity] = self

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def address(self) -> str:
        return f"sim://{self._identity}"

    def fileno(self) -> int:
        return id(self)

    def arrive(self, sender: str, message: Message) -> None:
        self._inbox.append((sender, message))
        self._on_ready()

    def hear(self, sender: str, message: Message) -> None:
        """Store a message that only proves liveness; it is read at the next turn, and the last one is enough."""
        if not self._inbox or self._inbox[-1] != (sender, message):
            self._inbox.append((sender, message))

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def send(self, peer: str, message: Message) -> bool:
        """A send to a dead peer fails on a ROUTER; a DEALER queues it."""
        line = self._network.lines.get(peer)
        if line is None:
            return peer in self._links
        if isinstance(message, Ping):
            line.hear(self._identity, replace(message, sent=0))  # it overtakes others, so its count says nothing
        elif isinstance(message, Heartbeat) and self._network.world.now >= self._quiet_at:
            line.arrive(self._identity, message)
        else:
            self._quiet_at = self._network.post(self._identity, peer, message)
        return True

    def connect(self, peer: str, address: str) -> None:
        self._links.add(peer)

    def disconnect(self, peer: str) -> None:
        self._links.discard(peer)

    def wake(self) -> None:
        self._on_ready()

    def linger(self) -> None: ...

    def close(self) -> None:
        self._network.remove(self._identity)


class SimPlane:
    """One end of the data plane: two-sided, as NCCL and ZeroMQ are. See kvtransfer.planes.base.Plane."""

    name = "sim"
    pulls = False
    pending = False  # each completion wakes the I/O thread

    def __init__(self, network: Network, identity: str, block_bytes: int, on_ready: Ready) -> None:
        self._network = network
        self._identity = identity
        self._block_bytes = block_bytes
        self._on_ready = on_ready
        self._receives: dict[ChunkKey, str] = {}
        self._sends: set[ChunkKey] = set()
        self._done: list[IoDone] = []
        network.planes[identity] = self

    def describe(self) -> PlaneAddress:
        return PlaneAddress(plane=self.name, host="sim", address=self._identity)

    def reaches(self, peer: PlaneAddress) -> bool:
        return peer.plane == self.name

    def connect(self, peer: str, address: PlaneAddress) -> None: ...

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        self._sends.add(key)
        arrives_at = self._network.move(self._identity, peer, len(blocks) * self._block_bytes)
        self._network.world.at(arrives_at, self._arrived, peer, key)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        assert len(source) == len(blocks), (source, blocks)
        self._receives[key] = peer

    def poll(self) -> list[IoDone]:
        done, self._done = self._done, []
        return done

    def cancel(self, transfer_id: bytes) -> None:
        for key in [key for key in self._receives if key.transfer_id == transfer_id]:
            del self._receives[key]
        self._sends = {key for key in self._sends if key.transfer_id != transfer_id}

    def idle(self, transfer_id: bytes) -> bool:
        return True  # cancel has stopped it

    def forget(self, peer: str) -> None:
        for key in [key for key, sender in self._receives.items() if sender == peer]:
            del self._receives[key]
            self._done.append(IoDone(key, sending=False, ok=False, reason="the peer is gone"))

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None: ...

    def take(self, key: ChunkKey) -> None:
        """The last byte of a movement has arrived."""
        if self._receives.pop(key, None) is not None:
            self._done.append(IoDone(key, sending=False, ok=True))
            self._on_ready()

    def _arrived(self, peer: str, key: ChunkKey) -> None:
        if key not in self._sends or self._network.planes.get(self._identity) is not self:
            return  # it was cancelled, or this end is dead
        self._sends.discard(key)
        self._done.append(IoDone(key, sending=True, ok=True))
        self._on_ready()
        if (receiver := self._network.planes.get(peer)) is not None:
            receiver.take(key)
