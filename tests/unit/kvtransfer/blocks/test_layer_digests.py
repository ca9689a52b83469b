"""Digests over layers that several pools hold; with pools in memory, of any cut, in test_device_stage_pools.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.kvtransfer.blocks.layer_digests import layer_digests
from baton.kvtransfer.reshard import Cut


def test_pools_sum_up_at_the_same_time():
    """Guards against stages that wait for one another's GPUs in turn, for each offer."""
    events: list[str] = []

    class Pool:
        def __init__(self, name: str) -> None:
            self.name = name

        def begin_layer_sums(self, blocks: Sequence[int]) -> Callable[[], bytes]:
            events.append(f"{self.name} begins {list(blocks)}")

            def wait() -> bytes:
                events.append(f"{self.name} has ended")
                return bytes(8 * len(blocks))

            return wait

    assert len(layer_digests(Cut.even(1, 1, 2, 2), [Pool("a"), Pool("b")], [[3], [1, 2]])) == 2
    assert events == ["a begins [3, 1, 2]", "b begins [3, 1, 2]", "a has ended", "b has ended"]
