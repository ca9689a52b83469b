"""kvtransfer.store.gate: load a prefix exactly if that is expected to be faster, up to the best length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.store.gate import ASSUMED_TURN_S, HALF_LIFE_S, SLACK_S, LoadGate, Rate
from baton.node.messages.store import DISK, PEER, RAM

BLOCK_BYTES, BLOCK_TOKENS = 1 << 20, 16
LONG_S = 1e6
"""A measurement of so many seconds leaves nothing of the assumption."""


def _gate(*, ram: float, tokens: float, disk: float = 1e9, always: bool = False) -> LoadGate:
    """A gate that has measured these rates, per second."""
    gate = LoadGate(BLOCK_BYTES, BLOCK_TOKENS, always=always)
    gate.computed(int(tokens * LONG_S), LONG_S, 0.0)
    blocks = max(1, round(ram * LONG_S / BLOCK_BYTES))
    gate._tiers[RAM].add(blocks * BLOCK_BYTES, LONG_S, 0.0)
    gate._tiers[DISK].add(disk * LONG_S, LONG_S, 0.0)
    return gate


GPU_LOAD_S, GPU_COMPUTE_S = (8 << 20) / 50e9, 64 / 44_000
"""A block of 64 tokens of an 8B model on an H200."""


def _gpu_gate() -> LoadGate:
    gate = LoadGate(8 << 20, 64, always=False)
    gate.computed(44_000_000, 1000.0, 0.0)
    return gate


def test_break_even_decides() -> None:
    """Guards the rule: with 16 tokens a MiB and 1600 tokens/s, loading is faster from 100 MiB/s on."""
    for rate, expected in ((90, 0), (110, 4)):
        decision = _gate(ram=rate * 2**20, tokens=1600).decide((RAM,) * 4, 0, 0.0)
        assert decision.num_blocks == expected
    assert decision.compute_s == pytest.approx(0.04) and decision.load_s == pytest.approx(4 / 110 + ASSUMED_TURN_S)
    assert decision.stop_after_s == pytest.approx(0.04 + SLACK_S)


def test_a_slow_tier_ends_the_load_unless_blocks_behind_it_pay() -> None:
    """Guards partial hits: RAM blocks are loaded and disk blocks computed, unless enough RAM blocks follow."""
    gate = _gate(ram=1e9, disk=1e7, tokens=1600)
    assert gate.decide((RAM, RAM, DISK, DISK, RAM), 0, 0.0).num_blocks == 2
    assert gate.decide((RAM, DISK, *(RAM,) * 20), 0, 0.0).num_blocks == 22
    assert gate.decide((DISK, DISK), 0, 0.0).num_blocks == 0


def test_queued_loads_count() -> None:
    """Guards against ignoring the queue: a load behind a thousand blocks is slow."""
    gate = _gate(ram=1e9, tokens=1600)
    assert gate.decide((RAM,), 0, 0.0).num_blocks == 1
    assert gate.decide((RAM,), 1000, 0.0).num_blocks == 0


def test_always_loads_everything_and_waits() -> None:
    """Guards the option `always`."""
    gate = _gate(ram=1.0, tokens=1e9, always=True)
    decision = gate.decide((DISK, RAM, PEER), 1000, 0.0)
    assert decision.num_blocks == 3 and decision.stop_after_s > 5 and gate.patience_s(1, 0.0) == 5.0
    assert gate.decide((), 0, 0.0).num_blocks == 0


def test_a_low_rate_decays_to_the_default() -> None:
    """Guards against never trying a tier again: without measurements, a rate returns to the default."""
    rate = Rate(1000.0)
    rate.add(1.0, 10.0, 0.0)
    assert rate.at(0.0) < 2
    assert rate.at(25 * HALF_LIFE_S) > 990


def test_load_times_are_attributed_to_tiers() -> None:
    """Guards the rates: copy time counts for RAM, the rest of a load for the tier that it waited for."""
    gate = LoadGate(BLOCK_BYTES, BLOCK_TOKENS, always=False)
    for _ in range(100):
        gate.loaded((RAM, DISK), load_s=10.0, copy_s=1.0, now=0.0, alone=True)
    assert gate._tiers[RAM].at(0.0) == pytest.approx(2 * BLOCK_BYTES, rel=0.25)
    assert gate._tiers[DISK].at(0.0) == pytest.approx(BLOCK_BYTES / 9, rel=0.1)


@given(
    st.lists(st.sampled_from((RAM, DISK, PEER)), max_size=12),
    st.floats(1e5, 1e10),
    st.floats(1e5, 1e10),
    st.floats(1, 1e6),
    st.integers(0, 50),
)
def test_no_other_length_is_better(tiers: list[int], ram: float, disk: float, tokens: float, queued: int) -> None:
    """Guards the chosen length: no other one has a lower sum of loading it and computing the rest."""
    gate = _gate(ram=ram, disk=disk, tokens=tokens)
    decision = gate.decide(tiers, queued, 0.0)
    block_s = BLOCK_TOKENS / gate._computing.at(0.0)
    cost_s = {tier: BLOCK_BYTES / rate.at(0.0) for tier, rate in gate._tiers.items()}

    def total_s(count: int) -> float:
        slow = sum(cost_s[tier] for tier in tiers[:count] if tier != RAM)
        load_s = ASSUMED_TURN_S + (queued + count) * cost_s[RAM] + slow if count else 0.0
        return load_s + (len(tiers) - count) * block_s

    best = min(total_s(count) for count in range(len(tiers) + 1))
    assert total_s(decision.num_blocks) <= best * (1 + 1e-9) + 1e-9


def test_the_overhead_of_a_load_is_measured() -> None:
    """Guards short prefixes near break-even: a block that computes faster than the overhead is computed."""
    gate = _gpu_gate()
    assert gate.decide((RAM,), 0, 0.0).num_blocks == 1
    for _ in range(20):
        gate.loaded((RAM,) * 10, load_s=0.0057, copy_s=0.0017, now=0.0, alone=True)
        gate.loaded((RAM,) * 10, load_s=0.5, copy_s=0.0017, now=0.0, alone=False)  # it waited for other loads
        gate.loaded((RAM, DISK), load_s=0.5, copy_s=0.0003, now=0.0, alone=True)  # and this one for the disk
    decision = gate.decide((RAM,) * 10, 0, 0.0)
    assert decision.num_blocks == 10 and decision.load_s == pytest.approx(0.0057, rel=0.1)
    assert gate.decide((RAM,) * 2, 0, 0.0).num_blocks == 0 and gate.decide((RAM,) * 4, 0, 0.0).num_blocks == 4


@pytest.mark.parametrize("turn_s", [0.0003, 0.002, 0.01])
def test_it_decides_correctly_on_both_sides_of_break_even(turn_s: float) -> None:
    """Guards the decision at GPU speeds: for any overhead, exactly the prefixes that pay are loaded."""
    gate = _gpu_gate()
    for count in range(1, 40):
        gate.loaded((RAM,) * count, load_s=turn_s + count * GPU_LOAD_S, copy_s=count * GPU_LOAD_S, now=0.0, alone=True)
    for count in range(1, 40):
        pays = turn_s + count * GPU_LOAD_S < count * GPU_COMPUTE_S
        margin = abs(turn_s + count * (GPU_LOAD_S - GPU_COMPUTE_S)) / (count * GPU_COMPUTE_S)
        assert bool(gate.decide((RAM,) * count, 0, 0.0).num_blocks) is pays or margin < 0.03


def test_an_unmeasured_tier_is_tried_once() -> None:
    """Guards against a pessimistic default that is never corrected, because an unused tier is never measured."""
    gate = LoadGate(8 << 20, 64, always=False)  # an 8B model on a GPU that computes 36,000 tokens/s: 1.8 ms a block
    gate.computed(36_000_000, 1000.0, 0.0)
    assert gate.decide((DISK,) * 4, 0, 0.0).num_blocks == 4
    for _ in range(20):
        gate.loaded((DISK,), load_s=0.0032, copy_s=0.0002, now=0.0, alone=True)  # 2.8 GB/s: slower than computing
    assert gate.decide((DISK,) * 4, 0, 0.0).num_blocks == 0
