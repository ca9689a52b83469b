"""Random schedules of the transfer protocol. A failure names its seed: `World(seed, odds, n).run()` repeats it."""

from __future__ import annotations

import pytest

from baton.tests.simulation.world import DEADLINE_S, TIMING, Broken, Odds, World

CALM = Odds()
ROUGH = {
    "loss": Odds(loss=0.15),
    "duplicates": Odds(duplicate=0.4),
    "corruption": Odds(corrupt=0.05, io_fail=0.05),
    "lost_bytes": Odds(io_loss=0.2),
    "cancels": Odds(cancel=0.5, late_prefill=0.1),
    "crashes": Odds(crash=0.5),
    "stalls": Odds(stall=0.3, stall_s=6.0),
    "everything": Odds(0.05, 0.1, 0.02, 0.03, 0.02, 0.2, 0.3, 0.1),
}
RUNS, PARTS = 800, 5
"""Schedules of each kind: with nine kinds 7,200 in all; and the tests that each kind is divided into."""


STALL_NOTICED_S = 8.0
"""Of these the stall begins within 2 s; bytes of a pair that moved none before have `chunk_s`, which is 4 s here."""


def seeds(part: int) -> range:
    """The seeds of one part of `RUNS`."""
    return range(part * RUNS // PARTS, (part + 1) * RUNS // PARTS)


def _run(seed: int, odds: Odds, num_requests: int = 5) -> World:
    world = World(seed, odds, num_requests)
    try:
        world.run()
    except Exception as error:
        raise Broken(f"seed {seed}, {odds}: {error!r}") from error
    return world


@pytest.mark.parametrize("part", range(PARTS))
def test_without_faults_every_admitted_request_is_handed_over(part: int) -> None:
    """Guards against lost wake-ups: without faults nothing may depend on a timeout."""
    arrived = 0
    for seed in seeds(part):
        world = _run(seed, CALM)
        for request in world.requests:
            if request.computed and request.transfer_id:
                assert request.leg in world.arrived, f"seed {seed}: {request.leg} never arrived"
        assert max(world.arrived.values(), default=0.0) < TIMING.lease_s * 2, f"seed {seed} waited for a time-out"
        arrived += len(world.arrived)
    assert arrived > len(seeds(part)) * 3


@pytest.mark.parametrize("part", range(PARTS))
def test_a_prompt_that_is_taken_up_late_is_handed_over(part: int) -> None:
    """Guards against an abort of transfers whose prompt waits behind a long step: decode renews them meanwhile."""
    for seed in seeds(part)[::4]:
        world = _run(seed, Odds(late_prefill=0.7, late_s=(0.5, 8.0)))
        for request in world.requests:
            if request.computed and request.transfer_id:
                assert request.leg in world.arrived, f"seed {seed}: {request.leg} never arrived"


@pytest.mark.parametrize("part", range(PARTS))
def test_a_link_that_stands_still_ends_its_transfers_in_seconds(part: int) -> None:
    """Guards against a client that waits for its deadline because one direction of a link, or the bytes alone, stand
    still while everything else works."""
    failed = 0
    for seed in seeds(part)[::4]:
        world = _run(seed, Odds(stall=0.3, stall_s=100.0))
        for request in world.requests:
            if request.computed and request.transfer_id:
                failed += request.leg not in world.arrived
                assert world.failed_after_s(request) < STALL_NOTICED_S, f"seed {seed}: {request.leg} hangs"
    assert failed > len(seeds(part)[::4])


@pytest.mark.parametrize("part", range(PARTS))
def test_a_pause_of_all_links_ends_no_transfer(part: int) -> None:
    """Guards against retries on a busy machine, where processes are late by a second or two."""
    for seed in seeds(part)[::4]:
        world = _run(seed, Odds(stall=1.0, stall_s=1.0))
        for request in world.requests:
            if request.computed and request.transfer_id:
                assert request.leg in world.arrived, f"seed {seed}: {request.leg} never arrived"


def test_a_prompt_that_computes_for_long_is_not_abandoned() -> None:
    """Guards against taking a prefill worker that has nothing to offer yet for one that cannot be reached."""
    for seed in range(50):
        world = _run(seed, Odds(block_s=3.0))
        for request in world.requests:
            if request.computed and request.transfer_id and request.computed_at - request.reserved_at < DEADLINE_S:
                assert request.leg in world.arrived, f"seed {seed}: {request.leg} never arrived"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", ROUGH)
def test_no_schedule_breaks_an_invariant(kind: str, part: int) -> None:
    """Guards against writes into foreign blocks, activation on wrong KV, double ends and leaked blocks."""
    arrived = sum(len(_run(seed, ROUGH[kind]).arrived) for seed in seeds(part))
    assert arrived > len(seeds(part))  # the faults do not stop all transfers


def test_a_seed_reproduces_its_run() -> None:
    """Guards against hidden clocks and hash seeds: a failure must be repeatable."""
    first, second = (_run(7, ROUGH["everything"]) for _ in range(2))
    assert (first.now, first.arrived, [n.ends for n in first.nodes.values()]) == (
        second.now,
        second.arrived,
        [n.ends for n in second.nodes.values()],
    )


class _EarlyFreeWorld(World):
    """A world with a deliberate bug: decode workers free blocks without waiting for the plane."""

    def _start_node(self, name: str):  # type: ignore[no-untyped-def]
        node = super()._start_node(name)
        node._stop_writing = lambda transfer_id: None  # type: ignore[method-assign]
        cancel = node.cancel_decode

        def careless(request):  # type: ignore[no-untyped-def]
            blocks = list(node.tables[request.leg].blocks) if request.leg in node.tables else []
            cancel(request)
            for block in blocks:
                node.writable.pop(block, None)

        node.cancel_decode = careless  # type: ignore[method-assign]
        return node


def test_the_simulation_detects_a_write_after_free() -> None:
    """Guards the check itself: a worker that frees blocks during a transfer must be detected."""
    with pytest.raises(Broken):
        for seed in range(500):
            world = _EarlyFreeWorld(seed, Odds(cancel=0.9), 5)
            world.run()
