"""worker.in_flight: steps are read in order, and blocks are freed when no step can write into them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.manager import BlockManager
from baton.tests.unit.worker.bench import ManualRunner, sequence_of
from baton.worker.in_flight import InFlightSteps
from baton.worker.sequence import Sequence


class Bench:
    """Two sequences with two blocks each, in a pool of eight."""

    def __init__(self) -> None:
        self.runner = ManualRunner(run_ahead=2)
        self.manager = BlockManager(8)
        self.steps = InFlightSteps(self.runner, self.manager, lambda: 5.0)
        self.a, self.b = (self.sequence(name) for name in "ab")

    def sequence(self, name: str) -> Sequence:
        sequence = sequence_of(self.manager, name)
        sequence.table.grow(sequence.num_tokens)
        return sequence


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_launch_advances_the_launched_and_pending_counts(bench: Bench) -> None:
    """Guards against a next plan that computes the same tokens again."""
    step = bench.steps.launch([(bench.a, 4), (bench.b, 6)])
    assert (bench.a.num_launched, bench.a.num_pending) == (4, 0)
    assert (bench.b.num_launched, bench.b.num_pending) == (6, 1)
    assert [(part.sequence, part.length, part.epoch) for part in step.parts] == [(bench.a, 4, 0), (bench.b, 6, 0)]
    assert (step.began_at, step.behind, bench.a.num_computed) == (5.0, False, 0)
    assert [row.start for row in bench.runner.rows[0]] == [0, 0]


def test_steps_are_read_in_the_order_of_their_launch(bench: Bench) -> None:
    """Guards the order of tokens: those of the second step follow those of the first."""
    first = bench.steps.launch([(bench.a, 4)])
    second = bench.steps.launch([(bench.a, 2)])
    assert len(bench.steps) == 2 and second.behind
    assert bench.steps.read() == (first, [None])
    step, drawn = bench.steps.read()
    assert step is second and drawn[0] is not None and not bench.steps
    assert bench.runner.log == ["launch 1", "launch 2", "read 1", "read 2"]


def test_blocks_of_an_idle_sequence_are_freed_at_once(bench: Bench) -> None:
    """Guards the pool: a cancelled prompt in the queue must not hold blocks."""
    bench.steps.launch([(bench.a, 4)])
    bench.steps.release(bench.b)
    assert bench.manager.num_available == 6 and not bench.b.table.blocks


def test_blocks_are_held_until_their_last_step_is_read(bench: Bench) -> None:
    """Guards against a step that writes into blocks that a transfer fills for another sequence."""
    for _ in range(2):
        bench.steps.launch([(bench.a, 2)])
    bench.steps.launch([(bench.b, 2)])
    bench.steps.release(bench.a)
    bench.steps.read()
    assert bench.manager.num_available == 4, "the second step writes too"
    bench.steps.read()
    assert bench.manager.num_available == 6
    bench.steps.read()
    bench.manager.check()


def test_checksums_belong_to_the_step_that_was_read(bench: Bench) -> None:
    """Guards against a digest of blocks that another step completed."""
    step = bench.steps.launch([(bench.a, 4)])
    assert step.read_checksums() == {}
    step.read_checksums = lambda: {0: b"zero"}
    assert bench.steps.read()[0].read_checksums() == {0: b"zero"}


@given(st.lists(st.sampled_from(["launch", "read", "leave", "come"]), max_size=40), st.integers(0, 3))
def test_no_order_of_launches_and_departures_loses_a_block(actions: list[str], run_ahead: int) -> None:
    """Guards block accounting: for any departures during steps, each block is freed exactly once and not too early."""
    bench = Bench()
    here, written = [bench.a, bench.b], []
    for number, action in enumerate(actions):
        if action == "come" and bench.manager.num_available >= 2:
            here.append(bench.sequence(f"s{number}"))
        elif action == "leave" and here:
            bench.steps.release(here.pop(0))
        elif action == "launch" and here and len(bench.steps) <= run_ahead:
            bench.steps.launch([(sequence, 0) for sequence in here])
            written.append({block for sequence in here for block in sequence.table.blocks})
        elif action == "read" and bench.steps:
            bench.steps.read()
            del written[0]
        bench.manager.check()
        free = set(bench.manager._free)
        assert not any(free & blocks for blocks in written), "a free block is still written to"
    while bench.steps:
        bench.steps.read()
    for sequence in here:
        bench.steps.release(sequence)
    bench.manager.check()
    assert bench.manager.num_available == 8
