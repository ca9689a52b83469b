"""proxy.routing.kvfeed with kvtransfer.blocks.events: the index converges to the holders' contents under any faults."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kvtransfer.blocks.events import EventLog
from baton.node.messages.base import Message
from baton.node.messages.control import Heartbeat, KvEvents, KvReplay, KvSnapshot, Load, TierChange
from baton.proxy.routing.kvfeed import ASK_AGAIN_S, MADE_GRACE_S, KvFeed
from baton.proxy.routing.kvindex import Hit, KvIndex

NAME = "p/1"
HASHES = [bytes([number]) * 32 for number in range(12)]


class Link:
    """Both ways between one holder and one proxy; loses, doubles and reorders by its generator."""

    def __init__(self, rng: random.Random, fault: float, keep_blocks: int, batch_blocks: int) -> None:
        self.log = EventLog(keep_blocks, batch_blocks)
        self.journal = self.log.journal("gpu")
        self.index = KvIndex(1000)
        self.feed = KvFeed(self.index)
        self.feed.join(NAME)
        self.now = 0.0
        self.flying: list[Message] = []
        self._rng = rng
        self._fault = fault

    def send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            chance = self._rng.random() / self._fault if self._fault else 1.0
            copies = 0 if chance < 0.4 else 2 if chance < 0.7 else 1
            for _ in range(copies):
                place = self._rng.randrange(len(self.flying) + 1) if 0.7 <= chance < 1.0 else len(self.flying)
                self.flying.insert(place, message)

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.flying))):
            message = self.flying.pop(0)
            if isinstance(message, KvEvents):
                self.answer(self.feed.on_events(NAME, message, self.now))
            elif isinstance(message, KvSnapshot):
                self.answer(self.feed.on_snapshot(NAME, message, self.now))
            elif isinstance(message, Heartbeat):
                self.answer(self.feed.on_beat(NAME, message.kv_seq, message.store, self.now))

    def answer(self, ask: KvReplay | None) -> None:
        if ask is not None and self._rng.random() >= self._fault / 2:
            self.send(self.log.replay(ask.seq))

    def beat(self) -> None:
        self.now += ASK_AGAIN_S
        self.send([Heartbeat(worker="p", incarnation=1, load=Load(), kv_seq=self.log.seq)])

    def heal(self) -> None:
        """Stop all losses; the heartbeats of some seconds must complete the index."""
        self._fault = 0.0
        for _ in range(4):
            self.send(self.log.flush())
            self.beat()
            self.deliver(1000)

    def holds(self) -> set[bytes]:
        return {each for each in HASHES if self.index.match([each])}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    fault=st.sampled_from([0.0, 0.2, 0.8]),
    keep_blocks=st.sampled_from([0, 3, 1000]),
    batch_blocks=st.sampled_from([1, 2, 100]),
)
def test_it_converges_after_loss_doubling_and_reordering(
    seed: int, fault: float, keep_blocks: int, batch_blocks: int
) -> None:
    """Guards against an index that stays wrong: a lost batch, one taken in twice, an old one after a newer one."""
    rng = random.Random(seed)
    link = Link(rng, fault, keep_blocks, batch_blocks)
    held: set[bytes] = set()
    for _ in range(rng.randrange(1, 60)):
        block_hash = rng.choice(HASHES)
        if block_hash in held:
            held.discard(block_hash)
            link.journal.removed(block_hash)
        else:
            held.add(block_hash)
            link.journal.stored(block_hash)
        if rng.random() < 0.5:
            link.send(link.log.flush())
        if rng.random() < 0.5:
            link.deliver(rng.randrange(4))
        if rng.random() < 0.1:
            link.beat()
    link.heal()
    assert link.holds() == held
    if not fault:
        assert link.feed.counts.gaps == 0


def test_what_comes_in_order_needs_no_replay() -> None:
    """Guards against asking for what is on its way: the whole pool would travel with every heartbeat."""
    log = EventLog()
    feed = KvFeed(KvIndex(10))
    feed.join(NAME)
    for block_hash in HASHES[:3]:
        log.journal("gpu").stored(block_hash)
        (batch,) = log.flush()
        assert feed.on_events(NAME, batch, 0.0) is None
        assert feed.on_beat(NAME, log.seq, "", 0.0) is None
    assert log.flush() == [] and log.seq == 3
    assert (feed.counts.batches, feed.counts.gaps, feed.counts.replays) == (3, 0, 0)


def test_a_proxy_that_comes_late_gets_a_snapshot() -> None:
    """Guards a restarted proxy, and a worker's part of the state: it need not know what each proxy has received."""
    log = EventLog(keep_blocks=2, batch_blocks=2)
    for block_hash in HASHES[:5]:
        log.journal("gpu").stored(block_hash)
    log.journal("ram").stored(HASHES[9])
    log.flush()
    feed = KvFeed(index := KvIndex(100))
    feed.join(NAME)
    ask = feed.on_beat(NAME, log.seq, "", 0.0)
    assert ask == KvReplay(seq=1)
    parts = log.replay(ask.seq)
    assert [type(part) for part in parts] == [KvSnapshot] * 4
    for part in parts:
        assert isinstance(part, KvSnapshot) and feed.on_snapshot(NAME, part, 0.0) is None
    assert index.match(HASHES[:6]) == {NAME: Hit(gpu=5)}
    assert feed.on_beat(NAME, log.seq, "", 9.0) is None and feed.counts.snapshots == 1


def test_a_snapshot_without_its_middle_is_asked_for_again() -> None:
    """Guards against taking a torn snapshot for the whole."""
    log = EventLog(keep_blocks=0, batch_blocks=1)
    for block_hash in HASHES[:3]:
        log.journal("gpu").stored(block_hash)
    log.flush()
    feed = KvFeed(index := KvIndex(100))
    feed.join(NAME)
    first, _, last = log.replay(1)
    assert isinstance(first, KvSnapshot) and isinstance(last, KvSnapshot)
    assert feed.on_snapshot(NAME, first, 0.0) is None
    assert feed.on_snapshot(NAME, last, 0.0) == KvReplay(seq=1)
    assert feed.on_snapshot(NAME, last, 0.0) is None, "not twice at once"
    for part in log.replay(1):
        assert isinstance(part, KvSnapshot)
        feed.on_snapshot(NAME, part, 1.0)
    assert index.match(HASHES) == {NAME: Hit(gpu=3)}


def test_events_of_holders_that_are_not_members_are_ignored() -> None:
    """Guards the index against events of unknown holders and of dead ones."""
    feed = KvFeed(index := KvIndex(100))
    events = KvEvents(seq=1, changes=(TierChange("gpu", (HASHES[0],)),))
    snapshot = KvSnapshot(seq=1, part=0, parts=1, changes=events.changes)
    for _ in range(2):
        assert feed.on_events(NAME, events, 0.0) is None
        assert feed.on_snapshot(NAME, snapshot, 0.0) is None
        assert feed.on_beat(NAME, 5, "s/1", 0.0) is None
        assert index.match(HASHES) == {}
        feed.join(NAME)
        feed.leave(NAME)
    feed.join(NAME)
    assert feed.on_events(NAME, events, 0.0) is None
    assert index.match(HASHES) == {NAME: Hit(gpu=1)}


def test_blocks_on_their_way_count_until_their_leg_has_reported_them() -> None:
    """Guards the burst of siblings: from dispatch to a moment after the end, also where a worker dies meanwhile."""
    feed = KvFeed(index := KvIndex(100))
    feed.join(NAME)
    feed.expect(NAME, "r1", tuple(HASHES[:2]))
    feed.expect(NAME, "r2", tuple(HASHES[:3]))
    feed.expect(NAME, "r3", ())
    assert index.match(HASHES) == {NAME: Hit(coming=3)}
    feed.expect(NAME, "r4", tuple(HASHES[:5]))
    feed.settle(NAME, "r4", 0.0, computed=False)
    feed.settle(NAME, "r2", 0.0, computed=True)
    feed.settle(NAME, "r2", 0.0, computed=True)
    feed.settle(NAME, "r3", 0.0, computed=True)
    feed.tidy(MADE_GRACE_S / 2)
    assert index.match(HASHES) == {NAME: Hit(coming=3)}
    feed.tidy(MADE_GRACE_S)
    assert index.match(HASHES) == {NAME: Hit(coming=2)}
    feed.leave(NAME)
    assert index.match(HASHES) == {}
    feed.settle(NAME, "r1", 1.0, computed=True)
    feed.tidy(9.0)
    feed.join(NAME)
    assert index.match(HASHES) == {} and not index._coming
