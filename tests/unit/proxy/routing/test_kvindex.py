"""proxy.routing.kvindex against a model of plain sets, for any order of joins, events, deaths and sweeps."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.node.messages.base import Tier
from baton.node.messages.control import TierChange
from baton.proxy.routing.kvindex import Hit, KvIndex

WORKERS = ("a/1", "b/1", "c/1")
STORES = ("s/1", "t/1")
HASHES = [bytes([number]) * 32 for number in range(8)]
CHAIN = st.permutations(HASHES).map(lambda all_: all_[:6])
SOME = st.lists(st.sampled_from(HASHES), max_size=5, unique=True)


def _chain(*numbers: int) -> list[bytes]:
    return [HASHES[number] for number in numbers]


def _stored(tier: Tier, *numbers: int) -> list[TierChange]:
    return [TierChange(tier, tuple(_chain(*numbers)))]


class AgainstSets(RuleBasedStateMachine):
    """The index is large enough to keep all; see the tests below for its bound."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex(1000)
        self.held: dict[tuple[str, Tier], set[bytes]] = {}
        self.joined: set[str] = set()
        self.store_of: dict[str, str] = {}
        self.coming: list[tuple[str, list[bytes]]] = []

    @rule(holder=st.sampled_from(WORKERS + STORES))
    def reset(self, holder: str) -> None:
        self.index.reset(holder)
        self.joined.add(holder)
        for tier in ("gpu", "ram", "disk"):
            self.held.pop((holder, tier), None)  # type: ignore[call-overload]

    @rule(holder=st.sampled_from(WORKERS + STORES))
    def leave(self, holder: str) -> None:
        self.index.leave(holder)
        self.joined.discard(holder)
        self.store_of.pop(holder, None)
        for tier in ("gpu", "ram", "disk"):
            self.held.pop((holder, tier), None)  # type: ignore[call-overload]

    @rule(worker=st.sampled_from(WORKERS), store=st.sampled_from(("", *STORES)))
    def attach(self, worker: str, store: str) -> None:
        if worker in self.joined:
            self.index.attach(worker, store)
            self.store_of[worker] = store

    @rule(worker=st.sampled_from(WORKERS), stored=SOME, removed=SOME)
    def pool(self, worker: str, stored: list[bytes], removed: list[bytes]) -> None:
        self._apply(worker, "gpu", stored, removed)

    @rule(store=st.sampled_from(STORES), tier=st.sampled_from(("ram", "disk")), stored=SOME, removed=SOME)
    def store(self, store: str, tier: Tier, stored: list[bytes], removed: list[bytes]) -> None:
        self._apply(store, tier, stored, removed)

    def _apply(self, holder: str, tier: Tier, stored: list[bytes], removed: list[bytes]) -> None:
        if holder not in self.joined:
            return
        removed = [each for each in removed if each not in stored]
        self.index.apply(holder, [TierChange(tier, tuple(stored), tuple(removed))])
        held = self.held.setdefault((holder, tier), set())
        held |= set(stored)
        held -= set(removed)

    @rule(worker=st.sampled_from(WORKERS), hashes=SOME)
    def expect(self, worker: str, hashes: list[bytes]) -> None:
        self.index.expect(worker, hashes)
        self.coming.append((worker, hashes))

    @rule(data=st.data())
    def unexpect(self, data: st.DataObject) -> None:
        if self.coming:
            worker, hashes = self.coming.pop(data.draw(st.integers(0, len(self.coming) - 1)))
            self.index.unexpect(worker, hashes)

    @rule(count=st.integers(1, 5))
    def sweep(self, count: int) -> None:
        self.index.sweep(count)

    @rule(chain=CHAIN)
    def match(self, chain: list[bytes]) -> None:
        expected = {worker: hit for worker in WORKERS if (hit := self._hit(worker, chain)).blocks}
        assert self.index.match(chain) == expected

    def _hit(self, worker: str, chain: list[bytes]) -> Hit:
        if worker not in self.joined:
            return Hit()
        store = self.store_of.get(worker, "")
        gpu = self.held.get((worker, "gpu"), set())
        coming = gpu | {each for of, hashes in self.coming if of == worker for each in hashes}
        ram = coming | self.held.get((store, "ram"), set())
        disk = ram | self.held.get((store, "disk"), set())
        ends = [
            next((i for i, each in enumerate(chain) if each not in s), len(chain)) for s in (gpu, coming, ram, disk)
        ]
        return Hit(ends[0], ends[1] - ends[0], ends[2] - ends[1], ends[3] - ends[2])

    @invariant()
    def nothing_is_kept_for_ever(self) -> None:
        """A block without a holder goes with its last holder's event or with a sweep."""
        for _ in range(2):
            if not self.joined:
                self.index.sweep(1000)
        if not self.joined:
            assert len(self.index) == 0


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_blocks_of_a_dead_worker_are_no_hit_before_any_sweep() -> None:
    """Guards against routing to what is gone, and a swept bit from meaning the dead one's blocks to its heir."""
    index = KvIndex(100)
    index.reset("a/1")
    index.apply("a/1", _stored("gpu", 0, 1, 2))
    index.leave("a/1")
    assert index.match(_chain(0, 1, 2)) == {}
    for _ in range(9):
        index.sweep(1)
        index.reset("b/1")
        index.reset("c/1")
        assert index.match(_chain(0, 1, 2)) == {}


def test_it_forgets_the_least_recently_used_and_tails_before_heads() -> None:
    """Guards the bound on memory, and that what is left of a chain is its useful end, the beginning."""
    index = KvIndex(4)
    index.reset("a/1")
    index.apply("a/1", _stored("gpu", 0, 1, 2))
    index.apply("a/1", _stored("gpu", 3))
    index.match(_chain(0, 1, 2))
    index.apply("a/1", _stored("gpu", 4, 5))
    assert len(index) == 4 and index.evicted == 2
    assert index.match(_chain(0, 1, 2)) == {"a/1": Hit(gpu=2)}
    assert index.match(_chain(3)) == {}


def test_tiers_go_on_where_the_pool_ends() -> None:
    """Guards the order of sources: a pool's blocks first, then the host's store, for its own workers only."""
    index = KvIndex(100)
    for holder in ("a/1", "b/1", "s/1"):
        index.reset(holder)
    index.attach("a/1", "s/1")
    index.apply("a/1", _stored("gpu", 0, 1))
    index.apply("b/1", _stored("gpu", 0))
    index.apply("s/1", [*_stored("ram", 0, 1, 2), *_stored("disk", 1, 3, 4)])
    assert index.match(_chain(0, 1, 2, 3, 4, 5)) == {"a/1": Hit(gpu=2, ram=1, disk=2), "b/1": Hit(gpu=1)}
    index.leave("s/1")
    assert index.match(_chain(0, 1, 2)) == {"a/1": Hit(gpu=2), "b/1": Hit(gpu=1)}


def test_many_workers_get_the_lengths_that_they_hold() -> None:
    """Guards the walk at sizes where masks are wide: every worker has another length, some bits are reused."""
    index, chain = KvIndex(1000), [bytes([n]) * 32 for n in range(64)]
    for number in range(300):
        index.reset(f"x{number}/1")
        index.leave(f"x{number}/1")
        if number % 50 == 0:
            index.sweep(1000)
    lengths = {f"w{number}/1": number % 65 for number in range(200)}
    for worker, length in lengths.items():
        index.reset(worker)
        index.apply(worker, [TierChange("gpu", tuple(chain[:length]))])
    hits = index.match(chain)
    assert {worker: hit.gpu for worker, hit in hits.items()} == {w: n for w, n in lengths.items() if n}
    assert Counter(hit.blocks for hit in hits.values())[64] == 3
