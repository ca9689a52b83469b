"""simulator.store and simulator.store_client: the contents of a host's tiers, and the time of loading from them."""

from __future__ import annotations

import random

import msgspec
import pytest

from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.node.leg import LegKey
from baton.node.messages.store import DISK, RAM
from baton.proxy.settings import ProxySettings
from baton.simulator.latency import Cost, StoreCosts, load_profile
from baton.simulator.network import Network
from baton.simulator.simulation import Loss, Scenario, SimOutcome, simulate
from baton.simulator.store import Capacity, HostStore
from baton.simulator.store_client import SimStore
from baton.simulator.workload import SimRequest
from baton.simulator.world import World

H200 = load_profile("h200-llama-8b")
BLOCK = H200.kv_layout().block_bytes
ANSWER_S = 0.25
COSTS = StoreCosts(
    host_workers=8,
    answer_s=ANSWER_S,
    gpu_bytes_s=BLOCK * 8,  # powers of two, so that the sums below are exact
    disk_read_bytes_s=BLOCK * 2,
    disk_write_bytes_s=BLOCK * 1,
)
COPY_S, READ_S, WRITE_S = 1 / 8, 1 / 2, 1.0


class _Host:
    """A store with some workers; `events` has each worker's events with their times."""

    def __init__(self, ram_blocks: int, disk_blocks: int = 0, workers: int = 2) -> None:
        self.world = World()
        network = Network(self.world, 0.0, 0.0, 1.0)
        profile = msgspec.structs.replace(H200, store=COSTS)
        self.store = HostStore(network, "s0", "proxy", profile, Capacity(ram_blocks * BLOCK, disk_blocks * BLOCK, 0.0))
        self.events: list[list[tuple[float, StoreEvent]]] = [[] for _ in range(workers)]
        self.clients = [self._client(number) for number in range(workers)]

    def _client(self, number: int) -> SimStore:
        def deliver(event: StoreEvent) -> None:
            self.events[number].append((self.world.now, event))

        return SimStore(self.store, f"w{number}/1", self.world.clock, deliver)

    def run(self, until: float) -> None:
        self.world.run(until, ())

    def put(self, worker: int, names: str) -> None:
        """Put these blocks and run until nothing is pending."""
        self.clients[worker].put(names.encode(), _hashes(names), range(len(names)))
        self.run(self.world.now + 32.0)


def _hashes(names: str) -> list[bytes]:
    return [name.encode() * 32 for name in names]


def _leg(number: int) -> LegKey:
    return LegKey(f"r{number}", 0)


def test_loads_from_ram_share_one_link_in_order() -> None:
    """Guards the arithmetic: two workers load 4 and 2 blocks at the same time over one link to the GPUs."""
    host = _Host(ram_blocks=8)
    host.clients[0].put(b"put", _hashes("abcd"), range(4))
    host.run(32.0)
    assert host.events[0] == [(ANSWER_S + 4 * COPY_S, StoreWritten(b"put", 4))]
    for number, (client, names) in enumerate(zip(host.clients, ("abcd", "abx"), strict=True)):
        client.lookup(_leg(number), _hashes(names), 0)
    host.run(33.0)
    for number, count in enumerate((4, 2)):
        assert host.events[number][-1] == (32.0 + ANSWER_S, StoreFound(_leg(number), (RAM,) * count))
        host.clients[number].load(_leg(number), 0, range(count))
    host.run(64.0)
    assert host.events[0][-1] == (33.0 + 4 * COPY_S, StoreLoaded(_leg(0), 4, (RAM,) * 4, 4 * COPY_S, 4 * COPY_S))
    assert host.events[1][-1] == (33.0 + 6 * COPY_S, StoreLoaded(_leg(1), 2, (RAM,) * 2, 6 * COPY_S, 6 * COPY_S))
    assert not host.store.ram.num_holders


def _on_disk() -> _Host:
    """A host with blocks a and b on disk only, c and d on disk and in RAM, e and f in RAM only."""
    host = _Host(ram_blocks=8, disk_blocks=8)
    for names in ("ab", "ab", "ijklmnop", "cd", "cd", "ef"):  # blocks are written to disk on their second use
        host.put(0, names)
    assert host.store.ram.occupancy.blocks == 8
    return host


def test_loads_from_disk_read_and_copy_block_by_block() -> None:
    """Guards the disk: blocks are read in order, each is copied once it is read, and stays in RAM."""
    host = _on_disk()
    now = host.world.now
    host.clients[0].lookup(_leg(0), _hashes("abcd"), 0)
    host.run(now + 1.0)
    assert host.events[0][-1][1] == StoreFound(_leg(0), (DISK, DISK, RAM, RAM))
    host.clients[0].load(_leg(0), 0, range(4))
    host.run(now + 32.0)
    load_s = 2 * READ_S + COPY_S
    loaded = StoreLoaded(_leg(0), 4, (DISK, DISK, RAM, RAM), load_s, 4 * COPY_S)
    assert host.events[0][-1] == (now + 1.0 + load_s, loaded)
    host.clients[1].lookup(_leg(1), _hashes("ab"), 0)
    host.run(now + 64.0)
    assert host.events[1][-1][1] == StoreFound(_leg(1), (RAM, RAM))


def test_two_loads_of_a_block_read_it_from_disk_once() -> None:
    """Guards the disk's queue: a second load of a block waits for the first read instead of queuing another."""
    host = _on_disk()
    now = host.world.now
    for number, client in enumerate(host.clients):
        client.lookup(_leg(number), _hashes("ab"), 0)
    host.run(now + 1.0)
    for number, client in enumerate(host.clients):
        client.load(_leg(number), 0, range(2))
    host.run(now + 32.0)
    ends = [events[-1][0] - now - 1.0 for events in host.events]
    assert ends == [2 * READ_S + COPY_S, 2 * READ_S + 2 * COPY_S]


def test_write_behind_delays_a_read() -> None:
    """Guards a tier's single queue: a read waits for the writes before it."""
    host = _on_disk()
    now = host.world.now
    host.clients[0].lookup(_leg(0), _hashes("ab"), 0)
    host.run(now + 1.0)
    host.clients[1].put(b"again", _hashes("ef"), range(2))  # their second use
    host.run(now + 1.0 + ANSWER_S)
    host.clients[0].load(_leg(0), 0, range(2))
    host.run(now + 32.0)
    assert host.events[0][-1][0] == now + 1.0 + ANSWER_S + 2 * WRITE_S + 2 * READ_S + COPY_S


def test_a_stopped_load_reports_the_blocks_loaded_so_far() -> None:
    """Guards stopping a load: its event follows at once, with the blocks that are in the pool."""
    host = _Host(ram_blocks=8)
    host.put(0, "abcd")
    host.clients[0].lookup(_leg(0), _hashes("abcd"), 0)
    host.run(33.0)
    host.clients[0].load(_leg(0), 1, range(3))
    host.run(33.0 + 2 * COPY_S)
    host.clients[0].stop(_leg(0))
    host.run(64.0)
    at, event = host.events[0][-1]
    assert (at, event) == (33.0 + 2 * COPY_S, StoreLoaded(_leg(0), 2, (RAM,) * 2, 2 * COPY_S, 2 * COPY_S))
    assert not host.store.ram.num_holders


def test_a_dead_worker_loses_only_its_unfinished_puts() -> None:
    """Guards the store's contents, which must survive the death of a worker."""
    host = _Host(ram_blocks=8)
    host.put(0, "ab")
    host.clients[0].put(b"late", _hashes("cd"), range(2))
    host.run(32.0 + ANSWER_S)  # the copy is in progress
    host.clients[0].close()
    host.run(64.0)
    assert len(host.events[0]) == 1
    host.clients[1].lookup(_leg(1), _hashes("abcd"), 0)
    host.run(96.0)
    assert host.events[1][-1][1] == StoreFound(_leg(1), (RAM, RAM))
    host.store.check()


def test_tiers_never_exceed_their_quota() -> None:
    """Guards the quota and LRU order under random puts, lookups, loads and stops."""
    host, chance = _Host(ram_blocks=6, disk_blocks=9, workers=3), random.Random(1)
    ram, disk = host.store.ram, host.store.disk
    assert disk is not None
    for number in range(600):
        client, start = chance.choice(host.clients), chance.randrange(20)
        names = "abcdefghijklmnopqrstuvwxyz"[start : start + chance.randint(1, 5)]
        if chance.random() < 0.4:
            client.put(b"%d" % number, _hashes(names), range(len(names)))
        else:
            client.lookup(_leg(number), _hashes(names), 0)
            in_time = chance.random() < 0.7
            host.run(host.world.now + ANSWER_S * (1.1 if in_time else 0.5))
            if in_time:
                client.load(_leg(number), 0, range(len(names)))
                host.run(host.world.now + chance.random())
            if not in_time or chance.random() < 0.3:
                client.stop(_leg(number))
        host.run(host.world.now + chance.random())
        for index in (ram, disk):
            index.check()
            assert index.occupancy.used_bytes <= index.occupancy.total_bytes
    host.run(host.world.now + 600.0)
    assert ram.num_holders == disk.num_holders == 0
    assert ram.evictions["room"] > 0 < disk.evictions["room"]
    host.put(0, "abcdef")
    host.put(0, "z")
    host.clients[0].lookup(_leg(-1), _hashes("z"), 0)
    host.run(host.world.now + 1.0)
    assert host.events[0][-1][1] == StoreFound(_leg(-1), (RAM,))


# -- in the whole simulation

SMALL = msgspec.structs.replace(
    H200, prefill=Cost(0.0, 2.5e-4, 0.0), num_blocks=260, prefill_budget_tokens=1024, prefill_chunk_tokens=1024
)
"""A pool holds one and a half of the prompts below; one takes 2.6 s to compute, and less to load, from disk too."""
PROMPTS = [SimRequest(n, 2.0 * n, 10_240, 20, tuple(range(n % 6 * 20, n % 6 * 20 + 20))) for n in range(24)]
"""Six prompts, each of them four times."""
# Six prompts have 960 blocks: the larger RAM holds all of them, the smaller one evicts a prompt before its next use.
RAM_ONLY, BOTH = Capacity(1200 * BLOCK), Capacity(300 * BLOCK, 1200 * BLOCK)


def _scenario(store: Capacity | None, policy: str = "least-loaded", losses: tuple[Loss, ...] = ()) -> Scenario:
    proxy = ProxySettings(local_prefill="never", policy=policy)
    return Scenario(profile=SMALL, prefill=2, decode=2, proxy=proxy, store=store, losses=losses)


def _times(outcome: SimOutcome) -> list[tuple[list[float], int, str]]:
    return [(record.token_s, record.cached_tokens, record.error) for record in outcome.records]


def _served(outcome: SimOutcome) -> None:
    assert [record.error for record in outcome.records] == [""] * len(PROMPTS)
    assert [len(record.token_s) for record in outcome.records] == [request.output_tokens for request in PROMPTS]


@pytest.mark.parametrize(("store", "source"), [(RAM_ONLY, "ram"), (BOTH, "disk")])
@pytest.mark.parametrize("policy", ["least-loaded", "kv-aware"])
def test_a_store_raises_the_hit_rate_and_loses_nothing(store: Capacity, source: str, policy: str) -> None:
    """Guards the whole: the gate loads what is faster to load, KV events reach the router, and runs are repeatable."""
    without, with_store = simulate(_scenario(None, policy), PROMPTS), simulate(_scenario(store, policy), PROMPTS)
    _served(without)
    _served(with_store)
    assert with_store.work[f"prompt_tokens_{source}"] > 0
    assert sum(record.cached_tokens for record in with_store.records) > 2 * sum(
        record.cached_tokens for record in without.records
    )
    assert with_store.work["prompt_tokens_computed"] < without.work["prompt_tokens_computed"]
    foreseen = "kv_hit_predicted_tokens_total"
    assert with_store.counters[foreseen] > without.counters[foreseen]
    later = slice(6, None)
    assert sum(r.ttft_s for r in with_store.records[later]) < sum(r.ttft_s for r in without.records[later])
    assert _times(with_store) == _times(simulate(_scenario(store, policy), PROMPTS))


def test_blocks_of_a_dead_worker_are_loaded_by_another() -> None:
    """Guards recovery: another prefill worker loads from the store what the dead one computed."""
    outcome = simulate(_scenario(RAM_ONLY, losses=(Loss(23.5, "p0"),)), PROMPTS)
    _served(outcome)
    assert all(record.cached_tokens > 10_000 for record in outcome.records[12:])
