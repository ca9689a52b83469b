"""decode.role with a host's store: completed blocks are written behind; prompts and preempted sequences are loaded."""

from __future__ import annotations

from baton.kvtransfer.protocol.events import KvArrived
from baton.node.messages.control import Cancel
from baton.tests.unit.decode.test_role import Bench
from baton.tests.unit.kvtransfer.store.bench import World
from baton.worker.io_thread import FromProxy

SETTINGS = {"num_blocks": 64, "store_loads": "always"}


def _run(bench: Bench) -> None:
    while True:
        bench.run()
        if bench.io.inbox.empty():
            return


def _idle(bench: Bench) -> None:
    _run(bench)
    assert bench.loop.idle and bench.manager.num_available == bench.manager.num_blocks
    bench.store.world.host.server.index.check()
    assert bench.store.world.host.server.index.num_holders == 0


def _counter(bench: Bench, name: str) -> float:
    return bench.loop._load().counters[name]


def test_completed_blocks_are_written_behind() -> None:
    """Guards the next turn of a conversation: decode writes the blocks that it generated, and no others."""
    bench = Bench(world=World(), **SETTINGS)
    bench.deliver(KvArrived(bench.reserve("a", 10, max_tokens=8), 10, None, 0.0, 0.0, 0.0))
    _idle(bench)
    assert _counter(bench, "store_written_blocks") == 2  # of 17 tokens with KV; prefill writes the first 8


def test_a_locally_prefilled_prompt_is_loaded() -> None:
    """Guards colocated serving: another worker's blocks are loaded, and the rest is computed."""
    world = World()
    first, second = Bench(world=world, **SETTINGS), Bench(world=world, **SETTINGS)
    first.reserve("a", 14, prefill="")
    _idle(first)
    second.reserve("b", 14, prefill="")
    _idle(second)
    assert second.tokens("b") == first.tokens("a") == [14, 15, 16, 17, 18]
    assert _counter(second, "prompt_tokens_ram") == 12
    assert next(s for b in second.io.sent if hasattr(b, "tokens") for s in b.tokens).cached_tokens == 12


def test_a_preempted_sequence_is_loaded_again() -> None:
    """Guards preemption with a store: evicted blocks are loaded instead of recomputed."""
    bench = Bench(world=World(), **SETTINGS)
    bench.reserve("a", 10, prefill="", max_tokens=20)
    while len(bench.tokens("a")) < 8:
        bench.loop.turn(0.0)
    bench.role._preempt(bench.role._queues.running[0])
    bench.manager.release(bench.manager.allocate(bench.manager.num_available))
    assert bench.manager.evictions > 0
    _idle(bench)
    assert bench.tokens("a") == list(range(10, 30))
    assert _counter(bench, "prompt_tokens_ram") == 16  # of the 17 tokens with KV


def test_cancel_during_a_load() -> None:
    """Guards against reusing blocks that the store's thread may still write, and against leaking them."""
    world = World()
    first, second = Bench(world=world, **SETTINGS), Bench(world=world, **SETTINGS)
    first.reserve("a", 14, prefill="")
    _idle(first)
    second.store.held = True
    second.reserve("b", 14, prefill="")
    second.store.release()
    second.store.held = True
    second.loop.turn(0.0)
    assert second.manager.usage().owned == 4
    second.deliver(FromProxy("proxy", Cancel(request_id="b", attempt=0), second.now_s))
    assert second.manager.usage().leased == 3 and not second.loop.idle
    second.store.release()
    _idle(second)
    assert second.tokens("b") == []
