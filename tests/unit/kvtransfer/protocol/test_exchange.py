"""kvtransfer.protocol.exchange over the real planes: KV arrives bit for bit, incompatible peers are refused."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.kvtransfer.protocol.events import Event, KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.protocol.exchange import ChunkLimits, TransferExchange
from baton.kvtransfer.protocol.pairs import PeerTransport
from baton.kvtransfer.protocol.receiver import Incoming
from baton.node.credentials import Credentials
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.control import Refused
from baton.node.messages.transfer import Grant
from baton.node.sockets import Context
from baton.testing.loopback import Fate, LoopbackFabric

LAYOUT = KVLayout.of_model(num_layers=2, kv_heads=2, head_dim=16, block_tokens=4, dtype="float32")
NUM_BLOCKS = 24
LEG = LegKey("r", 0)
MakePlane = Callable[[str, BlockPool], Plane]


class _Pair:
    """Two exchanges in one thread; the test passes messages between them."""

    def __init__(
        self,
        make: MakePlane,
        namespaces: tuple[bytes, bytes] = (b"n" * 32, b"n" * 32),
        pulled_chunk_blocks: int = 0,
    ) -> None:
        self.now = 0.0
        self.pools = {name: BlockPool(LAYOUT, NUM_BLOCKS) for name in ("p/1", "d/1")}
        self.delivered: list[Message] = []
        self._mail: deque[tuple[str, str, Message]] = deque()
        self.planes = {name: make(name, pool) for name, pool in self.pools.items()}
        self.ends = {
            name: TransferExchange(
                name,
                namespace,
                [self.planes[name]],
                pool.digests,
                PeerTransport(self._sender(name), lambda peer, address: None, lambda peer: None),
                ChunkLimits(3, pulled_chunk_blocks, window=2),
            )
            for (name, pool), namespace in zip(self.pools.items(), namespaces, strict=True)
        }

    def _sender(self, name: str) -> Callable[[str, Message], bool]:
        def send(peer: str, message: Message) -> bool:
            self._mail.append((name, peer, message))
            return True

        return send

    def run_until(self, done: Callable[[list[Event]], bool], turns: int = 5000) -> list[Event]:
        events: list[Event] = []
        for _ in range(turns):
            while self._mail:
                sender, peer, message = self._mail.popleft()
                self.ends[peer].on_message(sender, message, self.now)
                self.delivered.append(message)
            for end in self.ends.values():
                end.tick(self.now)
                events += end.events
                end.events.clear()
            if done(events):
                return events
            self.now += 0.001
        raise AssertionError(f"nothing more happens: {events}")

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
        for pool in self.pools.values():
            pool.close()


@pytest.fixture(params=["loopback", "zmq", "shm"])
def make(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    context = Context(Credentials("decode"))
    fabric = LoopbackFabric()
    makers: dict[str, MakePlane] = {
        "loopback": lambda name, pool: fabric.plane(name, pool),
        "zmq": lambda name, pool: ZmqPlane(context, pool, name),
        "shm": lambda name, pool: ShmPlane(pool),
    }
    yield makers[request.param]
    context.close()


def _fill(pool: BlockPool, seed: int) -> None:
    noise = random.Random(seed)
    for block in range(pool.num_blocks):
        pool.write(block, noise.randbytes(pool.block_bytes))


def test_moved_kv_is_equal_bit_for_bit(make: MakePlane) -> None:
    """Guards the bytes: offers in chunks, a cached prefix that is not transferred, different block ids at each end."""
    pair = _Pair(make)
    _fill(pair.pools["p/1"], 1)
    _fill(pair.pools["d/1"], 2)
    before = [bytes(pair.pools["d/1"].block(b)) for b in range(NUM_BLOCKS)]
    source = random.Random(3).sample(range(NUM_BLOCKS), 11)
    target = tuple(random.Random(4).sample(range(NUM_BLOCKS), 9))
    prefill, decode = pair.ends["p/1"], pair.ends["d/1"]
    decode.open_receiver(Incoming(b"t" * 16, LEG, "p/1", 2, target, deadline=60.0), pair.now)
    prefill.open_sender(LEG, "d/1", "here", 60.0, pair.now)
    for computed in (4, 5, 11):
        prefill.blocks_computed(LEG, source[:computed], {}, pair.now)
    prefill.token_drawn(LEG, 42, None, pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    (arrived,) = [event for event in events if isinstance(event, KvArrived)]
    assert (arrived.transfer_id, arrived.token_id, arrived.logprob) == (b"t" * 16, 42, None)
    assert 0.0 <= arrived.wait_s + arrived.transfer_s <= arrived.at <= pair.now
    assert any(isinstance(e, SenderEnded) and e.ok and e.sent_blocks == 9 for e in events)
    for index, block in enumerate(target):
        assert pair.pools["d/1"].block(block) == pair.pools["p/1"].block(source[2 + index])
    for block in set(range(NUM_BLOCKS)) - set(target):
        assert bytes(pair.pools["d/1"].block(block)) == before[block]
    pair.close()


def test_a_fully_cached_prompt_is_handed_over(make: MakePlane) -> None:
    """Guards the full prefix hit: no chunk is transferred, but the first token is."""
    pair = _Pair(make)
    pair.ends["d/1"].open_receiver(Incoming(b"t" * 16, LEG, "p/1", 2, (), deadline=60.0), pair.now)
    pair.ends["p/1"].open_sender(LEG, "d/1", "here", 60.0, pair.now)
    pair.ends["p/1"].blocks_computed(LEG, [0, 1], {}, pair.now)
    pair.ends["p/1"].token_drawn(LEG, 7, None, pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    (arrived,) = [event for event in events if isinstance(event, KvArrived)]
    assert (arrived.transfer_id, arrived.token_id, arrived.logprob) == (b"t" * 16, 7, None)
    assert arrived.transfer_s == 0.0
    pair.close()


class _Digesting:
    """A plane that computes digests during a transfer, the first ones wrong; it records the blocks of each movement."""

    def __init__(self, pool: BlockPool, sizes: list[int]) -> None:
        self._plane, self._sizes = ShmPlane(pool), sizes

    def __getattr__(self, name: str) -> object:
        return getattr(self._plane, name)

    def post_receive(self, peer: str, key: ChunkKey, source: list[int], blocks: list[int]) -> None:
        self._sizes.append(len(blocks))
        self._plane.post_receive(peer, key, source, blocks)

    def poll(self) -> list[IoDone]:
        done = self._plane.poll()
        return [each if each.sending or each.key.retry else replace(each, digest=b"wrong") for each in done]


def test_digests_of_a_plane_are_compared_and_pulled_chunks_are_larger() -> None:
    """Guards against skipping the comparison when the plane has computed the digest."""
    sizes: list[int] = []
    pair = _Pair(lambda name, pool: _Digesting(pool, sizes), pulled_chunk_blocks=6)  # type: ignore[arg-type]
    _fill(pair.pools["p/1"], 1)
    prefill, decode = pair.ends["p/1"], pair.ends["d/1"]
    decode.open_receiver(Incoming(b"t" * 16, LEG, "p/1", 0, tuple(range(10)), deadline=60.0), pair.now)
    prefill.open_sender(LEG, "d/1", "here", 60.0, pair.now)
    pair.run_until(lambda _: any(isinstance(message, Grant) for message in pair.delivered))
    prefill.blocks_computed(LEG, range(10), {}, pair.now)
    prefill.token_drawn(LEG, 42, None, pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    assert any(isinstance(event, KvArrived) for event in events)
    assert sizes == [6, 4, 6, 4] and decode.counters.digest_retries == 2
    for block in range(10):
        assert pair.pools["d/1"].block(block) == pair.pools["p/1"].block(block)
    pair.close()


@pytest.mark.parametrize("granted_first", [True, False])
def test_an_abort_without_fault_is_distinguished_from_a_failure(make: MakePlane, granted_first: bool) -> None:
    """Guards against a retry without a failure: a prompt that ends at its first token needs no transfer."""
    pair = _Pair(make)
    incoming = Incoming(b"t" * 16, LEG, "p/1", 0, (0, 1), deadline=60.0)
    pair.ends["p/1"].open_sender(LEG, "d/1", "here", 60.0, pair.now)
    if granted_first:
        pair.ends["d/1"].open_receiver(incoming, pair.now)
    pair.ends["p/1"].cancel_sender(LEG, "finished", pair.now)
    if not granted_first:
        pair.ends["d/1"].open_receiver(incoming, pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    (ended,) = [event for event in events if isinstance(event, ReceiverEnded)]
    assert ended == ReceiverEnded(b"t" * 16, "finished", cancelled=True)
    pair.close()


def test_the_wait_for_a_reservation_is_not_transfer_time() -> None:
    """Guards the timeline when prefill is ready long before decode grants the transfer."""
    fabric = LoopbackFabric(lambda movement: Fate(after_polls=20))
    pair = _Pair(lambda name, pool: fabric.plane(name, pool))
    pair.ends["p/1"].open_sender(LEG, "d/1", "here", 60.0, pair.now)
    pair.ends["p/1"].blocks_computed(LEG, [3], {}, pair.now)
    pair.ends["p/1"].token_drawn(LEG, 42, None, pair.now)
    pair.now = 2.0
    pair.ends["d/1"].open_receiver(Incoming(b"t" * 16, LEG, "p/1", 0, (5,), deadline=60.0), pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    (arrived,) = [event for event in events if isinstance(event, KvArrived)]
    assert 2.0 <= arrived.wait_s < 2.015 <= 2.0 + arrived.transfer_s
    assert arrived.wait_s + arrived.transfer_s == pytest.approx(arrived.at)
    pair.close()


def test_a_namespace_mismatch_is_refused_at_hello(make: MakePlane) -> None:
    """Guards against KV of another model: no byte is moved, and both sides get the reason."""
    pair = _Pair(make, (b"n" * 32, b"m" * 32))
    pair.ends["d/1"].open_receiver(Incoming(b"t" * 16, LEG, "p/1", 0, (0, 1), deadline=3.0), pair.now)
    pair.ends["p/1"].open_sender(LEG, "d/1", "here", 60.0, pair.now)
    events = pair.run_until(lambda events: len(events) == 2)
    (sender,) = [e for e in events if isinstance(e, SenderEnded)]
    assert not sender.ok and "namespace" in sender.reason
    assert any(isinstance(e, ReceiverEnded) for e in events)
    assert pair.ends["d/1"].counters.pairs_refused == 1
    assert pair.ends["p/1"].in_motion == pair.ends["d/1"].in_motion == 0
    pair.close()


@pytest.mark.parametrize("receiving", [True, False])
def test_blocks_of_a_lost_peer_are_held_until_its_plane_is_idle(receiving: bool) -> None:
    """Guards the quarantine: the pair is removed at once, but posted operations may use blocks until NCCL aborts."""
    fabric = LoopbackFabric(lambda movement: Fate(after_polls=1_000_000))
    pair = _Pair(lambda name, pool: _Stubborn(fabric, name, pool))
    name, peer, ended = ("d/1", "p/1", ReceiverEnded) if receiving else ("p/1", "d/1", SenderEnded)
    pair.ends["d/1"].open_receiver(Incoming(b"t" * 16, LEG, "p/1", 0, (0,), deadline=60.0), pair.now)
    pair.ends["p/1"].open_sender(LEG, "d/1", "here", 60.0, pair.now)
    pair.ends["p/1"].blocks_computed(LEG, [3], {}, pair.now)
    pair.run_until(lambda _: all(_Stubborn.of(pair, each).posted for each in pair.ends))
    end, plane = pair.ends[name], _Stubborn.of(pair, name)
    plane.busy = True
    end.on_message(peer, Refused(reason="it is gone"), pair.now)
    for _ in range(5):
        end.tick(pair.now)
    assert end.events == [] and end.in_motion == 1
    plane.busy = False
    end.tick(pair.now)
    assert [type(event) for event in end.events] == [ended]
    pair.close()


class _Stubborn:
    """The loopback plane, kept busy by the test."""

    def __init__(self, fabric: LoopbackFabric, name: str, pool: BlockPool) -> None:
        self._plane = fabric.plane(name, pool)
        self.busy = False
        self.posted = 0

    @staticmethod
    def of(pair: _Pair, name: str) -> _Stubborn:
        plane = pair.planes[name]
        assert isinstance(plane, _Stubborn)
        return plane

    def __getattr__(self, name: str) -> object:
        return getattr(self._plane, name)

    def post_send(self, *arguments: object) -> None:
        self.posted += 1
        self._plane.post_send(*arguments)  # type: ignore[arg-type]

    def post_receive(self, *arguments: object) -> None:
        self.posted += 1
        self._plane.post_receive(*arguments)  # type: ignore[arg-type]

    def idle(self, transfer_id: bytes) -> bool:
        return not self.busy and self._plane.idle(transfer_id)
