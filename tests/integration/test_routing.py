"""Prefix-aware routing over real processes: conversations return to their holder, through either of two proxies."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from baton.node.membership import DEAD_AFTER_S
from baton.tests.integration.cluster import Cluster

BLOCK = 16
QUIET_S = DEAD_AFTER_S + 0.5
"""A live worker has sent a heartbeat in this time, behind all its events."""
ARGS = ("--local-prefill", "never", "--log-level", "debug")
ROUTED = re.compile(r"routed request=\S+ .*prefill=(prefill-\d)/\d+ prefill_reason=(\w+) .* hit_tokens=(\d+)")


@dataclass
class Conversation:
    """A growing prompt of token ids. A turn's answer never completes a block, so both workers hold equally many."""

    rng: random.Random
    ids: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return len(self.ids) // BLOCK

    def next_turn(self) -> int:
        """Grow to some full blocks and five tokens; returns the tokens that a holder of the last turn has."""
        held = self.blocks * BLOCK
        size = (self.blocks + self.rng.randrange(2, 5)) * BLOCK + 5
        self.ids += [self.rng.randrange(300, 2000) for _ in range(size - len(self.ids))]
        return held


@dataclass
class Pair:
    """Two proxies over the same workers."""

    first: Cluster
    second: Cluster

    def ask(self, cluster: Cluster, ids: list[int]) -> int:
        """Send a request; returns its cached tokens."""
        usage = cluster.complete(ids, max_tokens=2, ignore_eos=True)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def indexed(self) -> dict[str, float]:
        """Blocks that each proxy's index has received, counted once a holder; nothing is evicted in these tests."""
        return {cluster.url: cluster.counter("kv_event_blocks") for cluster in (self.first, self.second)}

    def wait_indexed(self, before: dict[str, float], more: int) -> None:
        """Wait until both proxies have received `more` further blocks."""
        self.first.wait_until(
            lambda: self.indexed() == {url: count + more for url, count in before.items()}, f"{more} more than {before}"
        )

    def settle(self) -> dict[str, float]:
        """Wait until no KV events are pending: of the probes of a start, which compute as many blocks as their routes
        lead to workers, and of a replay. The tests' own are waited for by their number."""
        quiet_since, seen = time.monotonic(), self.indexed()

        def is_quiet() -> bool:
            nonlocal quiet_since, seen
            now, indexed = time.monotonic(), self.indexed()
            if indexed != seen or len(set(indexed.values())) > 1:
                quiet_since, seen = now, indexed
            return now - quiet_since > QUIET_S

        self.first.wait_until(is_quiet, "equal indexes of both proxies")
        return seen

    def routed(self, cluster: Cluster) -> tuple[str, str, int]:
        """The prefill worker of the last request, the routing reason, and its expected prefix tokens."""
        name, why, hit_tokens = ROUTED.findall(cluster.nodes.log("proxy"))[-1]
        return name, why, int(hit_tokens)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    second = Cluster(0, 0, proxy_args=ARGS, log_folder=tmp_path_factory.mktemp("second"))
    both = ("--proxy", f"tcp://127.0.0.1:{second.nodes.ports.control}", *second.secret_args)
    first = Cluster(
        2, 1, proxy_args=(*ARGS, *second.secret_args), worker_args=both, log_folder=tmp_path_factory.mktemp("first")
    )
    with first, second:
        second.wait_workers("prefill-0", "prefill-1", "decode-0")
        pair = Pair(first, second)
        pair.settle()
        yield pair


def test_conversations_return_to_their_holders_through_either_proxy(pair: Pair) -> None:
    """Guards KV events and routing: every turn hits the whole previous one, as the router predicted."""
    rng = random.Random(1)
    conversations = [Conversation(rng) for _ in range(4)]
    homes: dict[int, str] = {}
    for turn in range(3):
        for number, conversation in enumerate(conversations):
            before, held = pair.indexed(), conversation.next_turn()
            cluster = (pair.first, pair.second)[(turn + number) % 2]
            assert pair.ask(cluster, conversation.ids) == held
            name, why, foreseen = pair.routed(cluster)
            assert (why, foreseen) == ("holder" if turn else "no_holder", held)
            assert homes.setdefault(number, name) == name
            pair.wait_indexed(before, 2 * (conversation.blocks - held // BLOCK))
    for cluster in (pair.first, pair.second):
        assert cluster.counter("kv_hit_predicted_tokens") > 0 == cluster.counter("kv_hit_missed_tokens")


def test_a_restarted_proxy_rebuilds_its_index(pair: Pair) -> None:
    """Guards replay: the index is rebuilt from the workers' journals and routes as before."""
    before, conversation = pair.indexed(), Conversation(random.Random(2))
    conversation.next_turn()
    pair.ask(pair.first, conversation.ids)
    pair.wait_indexed(before, 2 * conversation.blocks)
    home, _, _ = pair.routed(pair.first)
    pair.second.nodes.kill("proxy")
    pair.second.nodes.start_node("proxy")
    pair.second.nodes.wait_ready(3)
    before = pair.settle()
    assert pair.second.counter("kv_event_replays") >= 1
    assert pair.second.gauge("kv_index_blocks") == pair.first.gauge("kv_index_blocks") > 0
    held = conversation.next_turn()
    assert pair.ask(pair.second, conversation.ids) == held
    assert pair.routed(pair.second) == (home, "holder", held)
    pair.wait_indexed(before, 2 * (conversation.blocks - held // BLOCK))


def test_blocks_of_a_killed_worker_leave_the_index_at_once(pair: Pair) -> None:
    """Guards against routing to a dead worker, or to its blocks under a new incarnation of the same name."""
    before, conversation = pair.indexed(), Conversation(random.Random(3))
    conversation.next_turn()
    pair.ask(pair.first, conversation.ids)
    pair.wait_indexed(before, 2 * conversation.blocks)
    home, _, _ = pair.routed(pair.first)
    other = {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}[home]
    pair.first.nodes.kill(home)
    pair.first.wait_workers(other, "decode-0")
    before, held = pair.indexed(), conversation.next_turn()
    missed = pair.first.counter("kv_hit_missed_tokens")
    assert pair.ask(pair.first, conversation.ids) == 0
    assert pair.routed(pair.first) == (other, "no_holder", 0)
    pair.wait_indexed(before, 2 * conversation.blocks - held // BLOCK)  # decode held the prefix
    pair.first.nodes.start_node(home)
    pair.first.wait_workers("prefill-0", "prefill-1", "decode-0")
    held = conversation.next_turn()
    assert pair.ask(pair.first, conversation.ids) == held
    assert pair.routed(pair.first) == (other, "holder", held)
    assert pair.first.counter("kv_hit_missed_tokens") == missed
