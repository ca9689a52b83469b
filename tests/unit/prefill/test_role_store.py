"""prefill.role with a host's store: blocks of other workers are loaded, and no fault of the store harms a request."""

from __future__ import annotations

import pytest

from baton.kvtransfer.protocol.events import SenderEnded
from baton.node.messages.control import Cancel, HandedOver, Tokens
from baton.node.messages.store import RAM
from baton.tests.unit.kvtransfer.store.bench import World
from baton.tests.unit.prefill.test_role import LEG, Bench
from baton.worker.io_thread import FromProxy

SETTINGS = {"num_blocks": 64, "store_loads": "always"}


def _run(bench: Bench) -> None:
    """Run until idle: a turn without a step may still create an event for the next one."""
    while True:
        bench.run()
        if bench.io.inbox.empty():
            return


def _idle(bench: Bench) -> None:
    """Check that all requests have ended and that the worker holds nothing."""
    _run(bench)
    for name in list(bench.role._hand_overs._sending):
        bench.deliver(SenderEnded(name, True, "", 0, 0.0))
    _run(bench)
    assert bench.loop.idle and bench.manager.num_available == bench.manager.num_blocks
    bench.store.world.host.server.index.check()
    assert bench.store.world.host.server.index.num_holders == 0


def _two(**settings: object) -> tuple[Bench, Bench]:
    """Two workers of one host; the first has computed the prompt of 14 tokens, three full blocks."""
    world = World()
    first, second = (Bench(world=world, **(SETTINGS | settings)) for _ in range(2))
    first.prefill("a", 14)
    _idle(first)
    return first, second


def _steps(bench: Bench) -> list[tuple[int, int]]:
    return [chunk for step in bench.runner.steps for chunk in step]


def _counter(bench: Bench, name: str) -> float:
    return bench.loop._load().counters[name]


def test_blocks_of_another_worker_are_loaded() -> None:
    """Guards reuse: only tokens outside full blocks are computed, and the others are reported as cached."""
    first, second = _two()
    assert _counter(first, "store_written_blocks") == 3
    second.prefill("b", 14)
    _idle(second)
    assert _steps(second) == [(12, 2)]
    (tokens,) = second.sent(Tokens)
    assert tokens.ids == (14,) and tokens.cached_tokens == 12
    names = ("prompt_tokens_ram", "prompt_tokens_computed", "prompt_tokens_gpu")
    assert [_counter(second, name) for name in names] == [12, 2, 0]
    second.prefill("c", 14)
    _idle(second)
    assert _counter(second, "prompt_tokens_gpu") == 12  # its own pool is used first
    assert _counter(second, "store_lookups") == 1


def test_a_partial_hit_is_used_and_the_rest_written() -> None:
    """Guards a longer prompt: loading ends where the store's chain ends, and later blocks are written."""
    first, second = _two()
    second.prefill("b", 22)
    _idle(second)
    assert _steps(second) == [(12, 10)] and _counter(second, "store_written_blocks") == 2
    first.prefill("c", 22)
    _idle(first)
    assert _steps(first)[-1] == (20, 2)


def test_others_compute_while_a_job_waits_and_loads() -> None:
    """Guards overlap: a step never waits for the store, and a prompt that does not need it overtakes."""
    _, second = _two()
    second.store.held = True
    second.prefill("b", 14)
    second.prefill("short", 3)
    _run(second)
    assert _steps(second) == [(0, 3)]
    second.store.release()  # found; the load itself is held
    second.store.held = True
    second.loop.turn(0.0)
    second.prefill("shorter", 2)
    _run(second)
    assert _steps(second) == [(0, 3), (0, 2)]
    second.store.release()
    _idle(second)
    assert _steps(second)[-1] == (12, 2)


@pytest.mark.parametrize("when", ["asked", "loading"])
def test_a_cancelled_prompt_gives_its_blocks_back_when_the_load_has_ended(when: str) -> None:
    """Guards against reusing blocks that the store's thread may still write, and against leaking them."""
    _, second = _two()
    second.store.held = True
    second.prefill("b", 14)
    if when == "loading":
        second.store.release()
        second.store.held = True
        second.loop.turn(0.0)
    second.deliver(FromProxy("proxy", Cancel(request_id="b", attempt=0), second.now_s))
    second.deliver(SenderEnded(type(LEG)("b", 0), False, "cancelled", 0, 0.0))
    held = 3 if when == "loading" else 0
    assert second.manager.usage().leased == held
    second.store.release()
    _idle(second)
    assert _steps(second) == []


def test_a_late_lookup_is_not_waited_for() -> None:
    """Guards a prompt against a store that is slow or frozen."""
    _, second = _two()
    second.store.held = True
    second.prefill("b", 14)
    second.now_s += 6.0
    _run(second)
    assert _steps(second) == [(0, 14)] and _counter(second, "store_lookups_late") == 1
    second.store.release()
    _idle(second)


def test_a_slow_load_is_stopped_and_its_blocks_are_used() -> None:
    """Guards the deadline of a load: computing continues behind the loaded blocks."""
    _, second = _two()
    second.store.held = True
    second.prefill("b", 14)
    second.store.release()
    second.store.held = True
    second.loop.turn(0.0)
    second.now_s += 6.0
    _run(second)
    assert _steps(second) == []  # not before the store's thread has stopped writing
    assert _counter(second, "store_loads_stopped") == 1
    second.store.release()
    _idle(second)
    assert _steps(second) == [(0, 14)]


def test_a_lost_store_costs_only_hits() -> None:
    """Guards serving without the store: no lookups, and nothing is held."""
    _, second = _two()
    second.store.world.lost.add("host")
    second.store.world.run(5.0)
    second.prefill("b", 14)
    _run(second)
    assert _steps(second) == [(0, 14)] and second.parts.prefixes.idle


def test_blocks_that_load_slower_than_they_compute_are_computed() -> None:
    """Guards the gate: with a low measured RAM rate it computes."""
    _, second = _two(store_loads="measured")
    second.parts.prefixes.gate.loaded((RAM,), 1e9, 1e9, second.now_s, alone=True)
    second.prefill("warm", 1)
    second.prefill("b", 14)
    _idle(second)
    assert _steps(second) == [(0, 1), (0, 14)] and _counter(second, "store_gate_refused") == 1


def test_write_behind_holds_only_a_part_of_the_pool() -> None:
    """Guards prompts against a slow store: blocks are written in order, and those beyond the bound are dropped."""
    bench = Bench(world=World(), max_chunk_tokens=8, **(SETTINGS | {"num_blocks": 16}))
    bench.store.held = True
    bench.prefill("a", 40)
    bench.now_s += 6.0  # no answer
    bench.run()
    assert _counter(bench, "store_dropped_blocks") == 8  # 16 blocks in the pool: two may be held
    bench.store.release()
    _idle(bench)
    assert _counter(bench, "store_written_blocks") == 2 and bench.sent(HandedOver)
