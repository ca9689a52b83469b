"""decode.role without processes, over a recording I/O and a counting runner: every path frees its blocks."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from baton.decode.role import DecodeRole
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded
from baton.kvtransfer.store.client import NO_STORE
from baton.models.batch import Done, Drawn, Row
from baton.node.membership import ProxyLost
from baton.node.messages.control import (
    Bundle,
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Failed,
    Reserve,
    Reserved,
    SamplingSpec,
    Stages,
)
from baton.tests.unit.kvtransfer.store.bench import InlineStore, World
from baton.tests.unit.worker.bench import BLOCK, ROOT, STEP_S, RecordingIo, parts_of
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop


class CountingRunner:
    """A runner whose next token is the number of known tokens."""

    config = SimpleNamespace(vocab_size=1000)

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self.steps: list[list[tuple[int, int]]] = []
        """Start and length of each row."""

    run_ahead = 0

    def launch(self, rows: Rows[Row]) -> Done:
        self._on_step()
        self.steps.append([(row.start, row.num_new) for row in rows])
        for row in rows:
            assert len(row.blocks) * BLOCK >= row.start + len(row.token_ids), "computed without blocks"
        return Done([Drawn((row.start + len(row.token_ids),)) if row.draw else None for row in rows])


def reserve(name: str, num_tokens: int, prefill: str, max_tokens: int, *, at: float, priority: int = 0) -> FromProxy:
    tokens = tuple(range(num_tokens))
    message = Reserve(
        request_id=name,
        attempt=0,
        prefill=prefill,
        body=DispatchBody(
            token_ids=tokens,
            prompt_len=num_tokens,
            root=ROOT,
            block_hashes=block_hashes(ROOT, tokens, BLOCK),
            sampling=SamplingSpec(max_tokens=max_tokens),
            deadline_s=100.0,
            priority=priority,
        ),
    )
    return FromProxy("proxy", message, at)


class Bench:
    """A decode worker without processes."""

    def __init__(self, num_blocks: int = 16, world: World | None = None, **settings: Any) -> None:
        self.io = RecordingIo()
        self.now_s = 1000.0
        self.manager = BlockManager(num_blocks)
        self.store: Any = NO_STORE
        if world is not None:
            self.store = InlineStore(world, f"d{len(world.workers)}", num_blocks, self.io.inbox.put)
        options = DecodeSettings(spare_blocks=0, **settings)
        self.runner = CountingRunner(self._pass)
        self.parts = parts_of(
            self.runner,
            self.io,
            self.manager,
            lambda: self.now_s,
            max_model_len=48,
            store=self.store,
            always_load=options.store_loads == "always",
        )
        self.role = DecodeRole(self.parts, options.sizes("cpu"), options.spare_blocks, options.role)
        self.loop = Loop(self.parts, self.role, max_waiting=options.max_waiting, drain_s=options.drain_s)

    def _pass(self) -> None:
        self.now_s += STEP_S

    def reserve(self, name: str, num_tokens: int, prefill: str = "p/1", max_tokens: int = 5) -> bytes:
        """Send a Reserve; returns the transfer id, b"" for local prefill or a refusal."""
        before = set(self.role._reservations.by_transfer)
        self.deliver(reserve(name, num_tokens, prefill, max_tokens, at=self.now_s))
        return next(iter(set(self.role._reservations.by_transfer) - before), b"")

    def deliver(self, *events: Any) -> None:
        for event in events:
            self.io.inbox.put(event)
        self.loop.turn(0.0)

    def run(self) -> None:
        for _ in range(200):
            if not self.loop.turn(0.0):
                break
        self.loop.check()

    def tokens(self, name: str) -> list[int]:
        bundles = [message for message in self.io.sent if isinstance(message, Bundle)]
        sent = [tokens for bundle in bundles for tokens in bundle.tokens if tokens.request_id == name]
        assert [t.index for t in sent] == [sum(len(u.ids) for u in sent[:i]) for i in range(len(sent))]
        return [token for tokens in sent for token in tokens.ids]

    def stages(self) -> list[Stages | None]:
        bundles = [message for message in self.io.sent if isinstance(message, Bundle)]
        return [tokens.stages for bundle in bundles for tokens in bundle.tokens]


def test_a_transferred_sequence_streams_from_its_first_token() -> None:
    """Guards the hand-over: prefill's token is sent first, nothing is computed twice, blocks end up cached or free."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    assert bench.manager.usage().owned == 3
    bench.deliver(KvArrived(transfer, 777, None, 0.0, 0.0, 0.0))
    bench.run()
    assert bench.tokens("a") == [777, 11, 12, 13, 14]
    assert bench.manager.num_available == 16


def test_local_prefill_in_chunks() -> None:
    """Guards the colocated path: chunks, then tokens, within one token budget."""
    bench = Bench(max_chunk_tokens=3)
    bench.reserve("a", 10, prefill="")
    bench.run()
    assert bench.tokens("a") == [10, 11, 12, 13, 14]


def test_the_load_reports_the_speed_of_prompts() -> None:
    """Guards the router's comparison with prefill workers: speed is measured in steps full of prompts."""
    bench = Bench(max_chunk_tokens=8, max_num_batched_tokens=8)
    assert bench.io.load.prefill_tokens_s == 0.0
    bench.reserve("a", 10, prefill="")
    bench.run()
    assert bench.io.load.prefill_tokens_s == 8 / STEP_S


def test_a_transferred_sequence_reports_its_stages_once() -> None:
    """Guards the timeline: transfer, admission and first step are reported once, later tokens report nothing."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    bench.now_s += 3.0
    bench.deliver(KvArrived(transfer, 777, None, bench.now_s - 0.5, 0.25, 1.0))
    bench.run()
    first = Stages(transfer_wait_s=0.25, transfer_s=1.0, admission_s=0.5, step_s=STEP_S)
    assert bench.stages() == [first, None, None, None]


def test_first_tokens_are_sent_before_other_tokens() -> None:
    """Guards TTFT: a proxy processes a bundle in order, and a first token has waited longer than the others."""
    bench = Bench()
    older, newer = bench.reserve("a", 10, max_tokens=9), bench.reserve("b", 10)
    bench.deliver(KvArrived(older, 777, None, 0.0, 0.0, 0.0))
    bench.loop.turn(0.0)
    bench.deliver(KvArrived(newer, 888, None, 0.0, 0.0, 0.0))
    bench.run()
    bundles = [[t.request_id for t in each.tokens] for each in bench.io.sent if isinstance(each, Bundle)]
    both = [names for names in bundles if len(names) == 2]
    assert both[0] == ["b", "a"]
    assert all(names == ["a", "b"] for names in both[1:]) and len(both) > 1


def test_local_prefill_reports_its_stages_with_each_of_the_first_two_tokens() -> None:
    """Guards the timeline of a colocated request: it has a queue, chunks, and a step, but no transfer."""
    bench = Bench(max_chunk_tokens=3)
    bench.now_s += 2.0
    bench.deliver(reserve("a", 10, "", 5, at=bench.now_s - 1.5))
    bench.run()
    first, second, *rest = bench.stages()
    assert first == Stages(queue_s=1.5, prefill_s=4 * STEP_S)
    assert second == Stages(step_s=STEP_S)
    assert rest == [None, None, None]


def test_preemption_changes_no_token() -> None:
    """Guards recompute: four sequences in a pool for one and a half get the same tokens."""
    bench = Bench(num_blocks=6)
    for name in "abcd":
        bench.reserve(name, 10, prefill="", max_tokens=8)
    bench.run()
    for name in "abcd":
        assert bench.tokens(name) == list(range(10, 18))
    assert bench.role.counters.preemptions > 0


def test_cancel_during_a_transfer_quarantines_its_blocks() -> None:
    """Guards against reuse of blocks that a transfer may still write to."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    bench.deliver(FromProxy("proxy", Cancel(request_id="a", attempt=0), 0.0))
    assert bench.manager.usage().quarantined == 3
    assert isinstance(bench.io.sent[-1], Cancelled)
    bench.deliver(ReceiverEnded(transfer, "cancelled"))
    bench.run()
    assert bench.manager.num_available == 16


def test_a_proxy_cancels_only_its_own_requests() -> None:
    """Guards the requests of one proxy against a Cancel of another that uses the same id."""
    bench = Bench()
    transfer = bench.reserve("a", 6)
    bench.deliver(FromProxy("proxy 2", Cancel(request_id="a", attempt=0), bench.now_s))
    assert set(bench.role._reservations.by_transfer) == {transfer} and bench.role.sequences


def test_cancel_that_races_with_the_arrival() -> None:
    """Guards the race of Cancel and KvArrived: blocks leave the quarantine, no token is sent."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    bench.deliver(
        FromProxy("proxy", Cancel(request_id="a", attempt=0), 0.0), KvArrived(transfer, 7, None, 0.0, 0.0, 0.0)
    )
    bench.run()
    assert bench.manager.num_available == 16 and bench.tokens("a") == []


@pytest.mark.parametrize("event", ["failed", "bad token", "proxy lost"])
def test_failures_end_in_one_terminal_message(event: str) -> None:
    """Guards against a missing or second terminal message, or leaked blocks, on a failed transfer or lost proxy."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    if event == "failed":
        bench.deliver(ReceiverEnded(transfer, "deadline"))
    elif event == "bad token":
        bench.deliver(KvArrived(transfer, 1000, None, 0.0, 0.0, 0.0))
    else:
        bench.deliver(ProxyLost("proxy"), ReceiverEnded(transfer, "cancelled"))
    bench.run()
    ends = [message for message in bench.io.sent if isinstance(message, Failed)]
    assert len(ends) == 1 and ends[0].retryable
    assert bench.manager.num_available == 16


def test_a_transfer_that_prefill_aborted_is_not_a_failure() -> None:
    """Guards against recomputing a prompt that finished at its first token, whichever message arrives first."""
    bench = Bench()
    transfer = bench.reserve("a", 10)
    bench.deliver(ReceiverEnded(transfer, "finished at its first token", cancelled=True))
    bench.run()
    assert isinstance(bench.io.sent[-1], Cancelled) and bench.manager.num_available == 16
    assert not [message for message in bench.io.sent if isinstance(message, Failed)]


def test_too_few_blocks_is_busy_and_takes_none() -> None:
    """Guards against a partial reservation: one that does not fit holds nothing."""
    bench = Bench(num_blocks=4)
    assert bench.reserve("a", 12)
    assert not bench.reserve("b", 12)
    assert isinstance(bench.io.sent[-1], Busy)
    assert bench.manager.usage().owned == 3


def test_cached_blocks_are_not_transferred() -> None:
    """Guards decode-side prefix hits: a repeated prompt transfers only its last partial block."""
    bench = Bench()
    bench.deliver(KvArrived(bench.reserve("a", 10), 10, None, 0.0, 0.0, 0.0))
    bench.run()
    bench.reserve("b", 10)
    reserved = [message for message in bench.io.sent if isinstance(message, Reserved)]
    assert [message.cached_tokens for message in reserved] == [0, 8]
    assert bench.role.sequences and next(iter(bench.role._reservations.by_transfer.values())).incoming.first_block == 2


def _local(bench: Bench, *names: str, num_tokens: int = 30, priority: int = 0) -> None:
    """Requests for local prefill that arrive together; their prompts are the same."""
    bench.deliver(*(reserve(name, num_tokens, "", 5, at=bench.now_s, priority=priority) for name in names))


def _prompts(bench: Bench) -> list[list[tuple[int, int]]]:
    """Start and length of the parts of prompts in each step."""
    return [[row for row in step if row[1] > 1] for step in bench.runner.steps]


def test_requests_that_arrive_together_compute_their_prefix_once() -> None:
    """Guards bursts with a shared prefix on a decode worker that computes prompts itself."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    _local(bench, "a", "b", "c")
    bench.run()
    computed = [row for step in _prompts(bench) for row in step]
    assert computed == [(0, 8), (8, 8), (16, 8), (24, 6), (28, 2), (28, 2)]
    for name in "abc":
        assert bench.tokens(name) == [30, 31, 32, 33, 34]
    assert bench.role.counters.prefix_hits_tokens == 2 * 28


def test_a_request_waits_for_a_prefix_that_a_running_one_computes() -> None:
    """Guards against a wait that begins with the same turn only; a request that shares nothing does not wait."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    _local(bench, "a")
    bench.loop.turn(0.0)
    _local(bench, "b")
    _local(bench, "short", num_tokens=3)
    bench.run()
    computed = [row for step in _prompts(bench) for row in step]
    assert computed.index((0, 3)) < computed.index((28, 2))
    assert sum(length for _, length in computed) == 30 + 3 + 2


@pytest.mark.parametrize("event", ["cancel", "deadline", "proxy lost"])
def test_a_waiting_request_computes_the_prefix_where_the_other_ends(event: str) -> None:
    """Guards against a wait for blocks that will never be computed."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    first = reserve("a", 30, "", 5, at=bench.now_s)
    if event == "deadline":
        body = msgspec.structs.replace(first.message.body, deadline_s=2.5 * STEP_S)
        first = FromProxy("proxy", msgspec.structs.replace(first.message, body=body), bench.now_s)
    bench.deliver(FromProxy("other proxy", first.message, bench.now_s))
    _local(bench, "b")
    bench.loop.turn(0.0)
    if event == "cancel":
        bench.deliver(FromProxy("other proxy", Cancel(request_id="a", attempt=0), 0.0))
    elif event == "proxy lost":
        bench.deliver(ProxyLost("other proxy"))
    bench.run()
    assert bench.tokens("a") == [] and bench.tokens("b") == [30, 31, 32, 33, 34]
    starts = [start for step in _prompts(bench) for start, _ in step]
    assert starts == sorted(set(starts)), "it goes on from what the first has computed"
    assert bench.manager.num_available == 64


def test_an_urgent_request_does_not_wait_for_another() -> None:
    """Guards priorities: chunks of the first may come after those of all others."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    _local(bench, "a")
    _local(bench, "b", priority=5)
    bench.run()
    assert _prompts(bench)[:2] == [[(0, 8)], [(8, 8), (8, 8)]], "from what the first had computed so far"


def test_a_prompt_is_in_the_step_that_is_planned_next() -> None:
    """Guards TTFT: a prompt that waits for a step of decoding before its own."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    transfer = bench.reserve("a", 10, max_tokens=20)
    bench.deliver(KvArrived(transfer, 777, None, 0.0, 0.0, 0.0))
    _local(bench, "b", num_tokens=12)
    assert _prompts(bench)[-1] == [(8, 4)], "two of its blocks are in the pool"
    bench.run()
    assert bench.tokens("b") == [12, 13, 14, 15, 16]


def test_the_load_counts_a_prefix_that_several_wait_for_once() -> None:
    """Guards the router's view: it would send further siblings elsewhere, to compute the prefix there again."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    _local(bench, "a", "b", "c")
    assert bench.io.load.waiting_tokens == 30 - 8 + 2 + 2
