"""A simulated cluster around the real transfer protocol: a seed determines the run.

Real: TransferExchange, Sender, Receiver, BlockManager, BlockTable. Simulated: the clock, the network (delay, loss,
duplication, reordering), the data planes (two-sided and pulling, with delay, loss, corruption), the pools (one integer
a block), and both workers' loops, which compute, cancel, crash and restart at random times.

`Broken` is raised as soon as an invariant fails: a write into a block that the transfer does not hold, a sequence
activated on wrong KV, a second end of one transfer, a leak.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, product

from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager, OutOfBlocks
from baton.kvtransfer.blocks.table import BlockTable
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.protocol.exchange import ChunkLimits, TransferExchange
from baton.kvtransfer.protocol.pairs import PeerTransport
from baton.kvtransfer.protocol.receiver import Incoming
from baton.kvtransfer.protocol.transfer import Timing
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.transfer import PlaneAddress

BLOCK_TOKENS = 4
NUM_BLOCKS = 24
GARBAGE = -1
TIMING = Timing(lease_s=3.0, resend_s=0.05, resend_max_s=1.0, chunk_s=4.0, forget_s=20.0)
DEADLINE_S = 30.0


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, slots=True)
class Odds:
    """Probabilities of faults, for each message or movement."""

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    io_loss: float = 0.0
    io_fail: float = 0.0
    cancel: float = 0.0
    crash: float = 0.0
    late_prefill: float = 0.0
    late_s: tuple[float, float] = (0.5, 40.0)
    """By how much a late prompt comes after its reservation."""
    stall: float = 0.0
    """Of each direction of a link, and of the bytes from each prefill to each decode worker."""
    stall_s: float = 0.0
    """How long such a link holds back what is sent over it; then all of it arrives."""
    block_s: float = 0.05
    """Mean time to compute a block."""


@dataclass(slots=True)
class Pool:
    """One integer stands for a block's content."""

    content: list[int] = field(default_factory=lambda: [GARBAGE] * NUM_BLOCKS)

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        return [hashlib.md5(repr([self.content[b] for b in blocks]).encode()).digest() for blocks in chunks]


class SimPlane:
    """A `Plane` on the world's clock. A posted receive holds its blocks until done or cancelled."""

    def __init__(self, world: World, node: SimNode, name: str, pulls: bool) -> None:
        self.name, self.pulls = name, pulls
        self._world, self._node = world, node
        self._done: list[IoDone] = []
        self._receives: dict[ChunkKey, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def describe(self) -> PlaneAddress:
        return PlaneAddress(plane=self.name, host="sim")

    def reaches(self, peer: PlaneAddress) -> bool:
        return peer.plane == self.name

    def connect(self, peer: str, address: PlaneAddress) -> None:
        pass

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        if key in self._receives:
            raise Broken(f"{key} is posted twice")
        self._receives[key] = (peer, tuple(source), tuple(blocks))
        if self.pulls:
            self._world.later(self._world.io_delay(), self._pull, key, 0)

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        if self.pulls or self._world.chance(self._world.odds.io_loss):
            return
        target = self._world.nodes.get(peer)
        if target is not None:
            # the bytes leave the sender's memory somewhere between now and their arrival
            sent = [self._node.pool.content[b] for b in blocks]
            delay_s = self._world.io_delay() + self._world.held_back_s("bytes", self._node.identity, peer)
            self._world.later(delay_s, target.plane(self.name).deliver, self._node.identity, key, sent)

    def deliver(self, sender: str, key: ChunkKey, values: list[int]) -> None:
        if not self._node.alive or key not in self._receives or self._receives[key][0] != sender:
            return
        _, _, blocks = self._receives.pop(key)
        ok = not self._world.chance(self._world.odds.io_fail)
        for block, value in zip(blocks, values, strict=True):
            self._write(key, block, value)
        self._finish(key, ok)

    def _pull(self, key: ChunkKey, position: int) -> None:
        """Copy one block, and the next one later: the source may change between the two."""
        if not self._node.alive or key not in self._receives:
            return
        peer, source, blocks = self._receives[key]
        if held_back_s := self._world.held_back_s("bytes", peer, self._node.identity):
            self._world.later(held_back_s, self._pull, key, position)
            return
        owner = self._world.pools[peer]  # an exporter's memory outlives it, as with CUDA IPC
        self._write(key, blocks[position], owner.content[source[position]])
        if position + 1 < len(blocks):
            self._world.later(self._world.io_delay(), self._pull, key, position + 1)
        else:
            del self._receives[key]
            self._finish(key, True)

    def _write(self, key: ChunkKey, block: int, value: int) -> None:
        if self._node.writable.get(block) != key.transfer_id:
            raise Broken(f"transfer {key.transfer_id.hex()[:8]} writes to block {block} that it does not hold")
        if self._world.chance(self._world.odds.corrupt):
            value += 1_000_000
        self._node.pool.content[block] = value

    def _finish(self, key: ChunkKey, ok: bool) -> None:
        self._done.append(IoDone(key, sending=False, ok=ok))
        self._node.tick_soon()

    def poll(self) -> list[IoDone]:
        done, self._done = self._done, []
        return done

    def cancel(self, transfer_id: bytes) -> None:
        for key in [k for k in self._receives if k.transfer_id == transfer_id]:
            if self._world.chance(0.5):
                del self._receives[key]
            else:  # it does not stop at once, and becomes idle later
                self._world.later(self._world.io_delay() * 3, self._receives.pop, key, None)

    def idle(self, transfer_id: bytes) -> bool:
        return not any(key.transfer_id == transfer_id for key in self._receives)

    def forget(self, peer: str) -> None:
        for key in [k for k, (owner, _, _) in self._receives.items() if owner == peer]:
            del self._receives[key]
            self._done.append(IoDone(key, sending=False, ok=False, reason="peer is gone"))

    pending = False

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        self._receives.clear()


class SimNode:
    """One incarnation of a worker: its exchange, its blocks, and a simplified prefill or decode loop."""

    def __init__(self, world: World, name: str, life: int) -> None:
        self.identity = f"{name}/{life}"
        self.name = name
        self.alive = True
        self.world = world
        self.pool = world.pools.setdefault(self.identity, Pool())
        self.manager = BlockManager(NUM_BLOCKS)
        self.writable: dict[int, bytes] = {}
        self.tables: dict[LegKey, BlockTable] = {}
        self.ends: dict[LegKey | bytes, str] = {}
        self.ended_at: dict[LegKey | bytes, float] = {}
        self._wake_at = float("inf")
        self._planes = [SimPlane(world, self, "pull", True), SimPlane(world, self, "push", False)]
        world.random.shuffle(self._planes)
        self.exchange = TransferExchange(
            self.identity,
            b"n" * 32,
            self._planes,
            self.pool.digests,
            PeerTransport(self._send, lambda peer, address: None, lambda peer: None),
            ChunkLimits(world.random.randint(1, 3), window=world.random.randint(1, 3)),
            TIMING,
        )

    def plane(self, name: str) -> SimPlane:
        return next(p for p in self._planes if p.name == name)

    def _send(self, peer: str, message: Message) -> bool:
        return self.world.send(self.identity, peer, message)

    def receive(self, sender: str, message: Message) -> None:
        if self.alive:
            self.exchange.on_message(sender, message, self.world.now)
            self.settle()

    def tick_soon(self) -> None:
        self.world.later(0.0, self.tick)

    def tick(self) -> None:
        if self.alive:
            self.exchange.tick(self.world.now)
            self.settle()

    def _wake(self, at: float) -> None:
        if at == self._wake_at:  # else an earlier one was scheduled since
            self._wake_at = float("inf")
            self.tick()

    def settle(self) -> None:
        """Handle the exchange's events, and schedule the next tick at its next timer, unless one comes before."""
        events, self.exchange.events = self.exchange.events, []
        for event in events:
            match event:
                case SenderEnded():
                    self._note_end(event.leg, "ok" if event.ok else event.reason)
                    self._sender_ended(event)
                case KvArrived():
                    self._note_end(event.transfer_id, "arrived")
                    self._arrived(event)
                case ReceiverEnded():
                    self._note_end(event.transfer_id, event.reason)
                    self._receiver_ended(event)
        wake_at = max(self.world.now + 0.001, self.exchange.wake_at(self.world.now))
        if wake_at < self._wake_at:
            self._wake_at = wake_at
            self.world.later(wake_at - self.world.now, self._wake, wake_at)

    def _note_end(self, key: LegKey | bytes, how: str) -> None:
        if key in self.ends:
            raise Broken(f"{key!r} ended twice: {self.ends[key]}, then {how}")
        self.ends[key] = how
        self.ended_at[key] = self.world.now

    # -- prefill's loop

    def prefill(self, request: Request) -> None:
        if not self.alive:
            return
        table = BlockTable(self.manager, b"r" * 32, BLOCK_TOKENS, request.hashes)
        cached = table.take_prefix(len(request.tokens) - 1)
        try:
            table.grow(len(request.tokens))
        except OutOfBlocks:
            table.release()
            return
        self.tables[request.leg] = table
        self.exchange.open_sender(request.leg, request.decode, "sim", self.world.now + DEADLINE_S, self.world.now)
        self._compute(request, cached // BLOCK_TOKENS)
        self.settle()

    def _compute(self, request: Request, num_blocks: int) -> None:
        """Blocks [0, num_blocks) are final; then one more, until all are there."""
        table = self.tables.get(request.leg)
        if not self.alive or table is None or request.leg in self.ends:
            return
        table.publish(request.tokens, num_blocks * BLOCK_TOKENS)
        self.exchange.blocks_computed(request.leg, table.blocks[:num_blocks], {}, self.world.now)
        if num_blocks == len(table.blocks):
            table.lease(request.leg.request_id.encode() + bytes([request.leg.attempt]))
            self.exchange.token_drawn(request.leg, request.tokens[-1], None, self.world.now)
            request.computed = True
            request.computed_at = min(request.computed_at, self.world.now)
        else:
            self.pool.content[table.blocks[num_blocks]] = request.values[num_blocks]
            self.world.later(
                self.world.random.expovariate(1.0 / self.world.odds.block_s), self._compute, request, num_blocks + 1
            )
        self.settle()

    def cancel_prefill(self, leg: LegKey) -> None:
        if self.alive and leg in self.tables:
            self.exchange.cancel_sender(leg, "cancelled", self.world.now)
            self.settle()

    def _sender_ended(self, event: SenderEnded) -> None:
        table = self.tables.pop(event.leg)
        if table.blocks:
            table.release()
        else:
            self.manager.end_lease(event.leg.request_id.encode() + bytes([event.leg.attempt]))
        self.reuse_blocks()

    def reuse_blocks(self) -> None:
        """Another sequence allocates freed blocks and overwrites them."""
        blocks = self.manager.allocate(self.world.random.randint(0, self.manager.num_available))
        for block in blocks:
            if block in self.writable:
                raise Broken(f"block {block} is allocated while a transfer may write to it")
            self.pool.content[block] = GARBAGE
        self.manager.release(blocks)

    # -- decode's loop

    def reserve(self, request: Request) -> None:
        if not self.alive:
            return
        table = BlockTable(self.manager, b"r" * 32, BLOCK_TOKENS, request.hashes)
        first = table.take_prefix(len(request.tokens)) // BLOCK_TOKENS
        try:
            table.grow(len(request.tokens))
        except OutOfBlocks:
            table.release()
            return
        transfer_id = self.world.random.randbytes(16)
        request.transfer_id = transfer_id
        request.reserved_at = self.world.now
        self.tables[request.leg] = table
        self.world.held[transfer_id] = (self, request, first)
        for block in table.blocks[first:]:
            self.writable[block] = transfer_id
        incoming = Incoming(
            transfer_id=transfer_id,
            leg=request.leg,
            peer=request.prefill,
            first_block=first,
            blocks=tuple(table.blocks[first:]),
            deadline=self.world.now + DEADLINE_S,
        )
        self.exchange.open_receiver(incoming, self.world.now)
        self.settle()

    def cancel_decode(self, request: Request) -> None:
        table = self.tables.get(request.leg)
        if not self.alive or table is None or request.transfer_id not in self.world.held:
            return
        if request.transfer_id in self.ends:
            return
        _, _, first = self.world.held.pop(request.transfer_id)
        del self.tables[request.leg]
        table.quarantine_from(first, request.transfer_id)
        self.exchange.cancel_receiver(request.transfer_id, "cancelled", self.world.now)
        self.settle()

    def _arrived(self, event: KvArrived) -> None:
        self._stop_writing(event.transfer_id)
        held = self.world.held.pop(event.transfer_id, None)
        if held is None:
            self.manager.end_quarantine(event.transfer_id)
            return
        _, request, _ = held
        told_s = self.world.now - request.computed_at
        if min(event.wait_s, event.transfer_s) < 0.0 or event.wait_s + event.transfer_s > told_s + 1e-9:
            raise Broken(f"{request.leg} waited {event.wait_s} s and moved {event.transfer_s} s of {told_s} s")
        table = self.tables.pop(request.leg)
        content = [self.pool.content[b] for b in table.blocks]
        if content != request.values:
            raise Broken(f"{request.leg} was activated on {content}, computed was {request.values}")
        self.world.arrived[request.leg] = self.world.now
        table.publish(request.tokens, len(request.tokens))
        self.world.later(self.world.random.expovariate(2.0), self._finish, table, request)

    def _finish(self, table: BlockTable, request: Request) -> None:
        if not self.alive:
            return
        content = [self.pool.content[b] for b in table.blocks]
        if content != request.values:
            raise Broken(f"{request.leg}: KV changed while it was decoded: {content}")
        table.release()

    def _receiver_ended(self, event: ReceiverEnded) -> None:
        self._stop_writing(event.transfer_id)
        self.manager.end_quarantine(event.transfer_id)
        held = self.world.held.pop(event.transfer_id, None)
        if held is not None:
            self.tables.pop(held[1].leg).release()
        self.reuse_blocks()

    def _stop_writing(self, transfer_id: bytes) -> None:
        for block in [b for b, owner in self.writable.items() if owner == transfer_id]:
            del self.writable[block]


@dataclass(slots=True)
class Request:
    leg: LegKey
    tokens: tuple[int, ...]
    hashes: tuple[bytes, ...]
    values: list[int]
    """What each block must hold: for full blocks a function of the tokens so far, so that prefixes are shared."""
    prefill: str
    decode: str
    transfer_id: bytes = b""
    reserved_at: float = 0.0
    computed: bool = False
    computed_at: float = float("inf")


class World:
    """The clock, the network, the nodes and the requests of one run."""

    def __init__(self, seed: int, odds: Odds, num_requests: int) -> None:
        self.random = random.Random(seed)
        self.odds = odds
        self.now = 0.0
        self.pools: dict[str, Pool] = {}
        self.nodes: dict[str, SimNode] = {}
        self.held: dict[bytes, tuple[SimNode, Request, int]] = {}
        self.arrived: dict[LegKey, float] = {}
        self.requests: list[Request] = []
        self._heap: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._order = count()
        self._lives = count(1)
        self._current = {name: self._start_node(name) for name in ("p0", "p1", "d0", "d1")}
        for number in range(num_requests):
            self.later(self.random.uniform(0.0, 2.0), self._arrive, number)
        for name in self._current:
            if self.chance(odds.crash):
                self.later(self.random.uniform(0.0, 3.0), self._crash, name)
        self._stalls: dict[tuple[str, str, str], float] = {}  # what is held back, from when on
        for prefill, decode in product(("p0", "p1"), ("d0", "d1")):
            for held in (("messages", prefill, decode), ("messages", decode, prefill), ("bytes", prefill, decode)):
                if self.chance(odds.stall):
                    self._stalls[held] = self.random.uniform(0.0, 2.0)

    def run(self) -> None:
        """Run all events; then no node may hold anything."""
        for _ in range(200_000):
            if not self._heap:
                break
            at, _, call, arguments = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            call(*arguments)
        else:
            raise Broken("the world does not come to rest")
        for node in self.nodes.values():
            self._check_at_rest(node)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def io_delay(self) -> float:
        return self.random.expovariate(100.0)

    def later(self, delay_s: float, call: Callable[..., object], *arguments: object) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), call, arguments))

    def send(self, sender: str, peer: str, message: Message) -> bool:
        target = self.nodes.get(peer)
        if target is None:
            return not peer.startswith("p")  # a ROUTER notices that a dead prefill worker's connection is gone
        copies = 0 if self.chance(self.odds.loss) else 2 if self.chance(self.odds.duplicate) else 1
        for _ in range(copies):
            held_back_s = self.held_back_s("messages", sender, peer)
            self.later(self.random.expovariate(200.0) + held_back_s, target.receive, sender, message)
        return True

    def held_back_s(self, what: str, sender: str, peer: str) -> float:
        """How much longer such a link stands still."""
        names = [identity.partition("/")[0] for identity in (sender, peer)]
        begin = self._stalls.get((what, *names), float("inf"))
        return max(0.0, begin + self.odds.stall_s - self.now) if self.now >= begin else 0.0

    def failed_after_s(self, request: Request) -> float:
        """From the reservation of a request until one of its workers knew that it failed; 0 where it arrived."""
        if request.leg in self.arrived:
            return 0.0
        ends = [at for node in self.nodes.values() for key in (request.leg, request.transfer_id)
                if (at := node.ended_at.get(key)) is not None]  # fmt: skip
        return min(ends, default=float("inf")) - request.reserved_at

    def _start_node(self, name: str) -> SimNode:
        node = SimNode(self, name, next(self._lives))
        self.nodes[node.identity] = node
        return node

    def _crash(self, name: str) -> None:
        node = self._current[name]
        node.alive = False
        del self.nodes[node.identity]
        for transfer_id in [t for t, (owner, _, _) in self.held.items() if owner is node]:
            del self.held[transfer_id]
        self._current[name] = self._start_node(name)

    def _arrive(self, number: int) -> None:
        length = self.random.randint(1, 6 * BLOCK_TOKENS)
        family = self.random.randint(0, 2)  # requests of one family share their first tokens
        tokens = tuple(family * 100 + i // 9 for i in range(length - 1)) + (1000 + number,)
        hashes = block_hashes(b"r" * 32, tokens, BLOCK_TOKENS)
        values = [hash(tokens[: (i + 1) * BLOCK_TOKENS]) for i in range(-(-length // BLOCK_TOKENS))]
        prefill = self._current[self.random.choice(("p0", "p1"))]
        decode = self._current[self.random.choice(("d0", "d1"))]
        request = Request(LegKey(f"r{number}", 0), tokens, hashes, values, prefill.identity, decode.identity)
        self.requests.append(request)
        self.later(self.random.expovariate(100.0), decode.reserve, request)
        late = self.chance(self.odds.late_prefill)
        self.later(
            self.random.uniform(*self.odds.late_s) if late else self.random.expovariate(100.0), prefill.prefill, request
        )
        if self.chance(self.odds.cancel):
            at = self.random.expovariate(5.0)
            self.later(at, prefill.cancel_prefill, request.leg)
            self.later(at + self.random.expovariate(50.0), decode.cancel_decode, request)

    def _check_at_rest(self, node: SimNode) -> None:
        node.manager.check()
        usage = node.manager.usage()
        if usage.free + usage.cached != usage.total or node.writable or node.tables or node.exchange.in_motion:
            raise Broken(f"{node.identity} holds on to something: {usage}, {node.tables}, {node.writable}")
