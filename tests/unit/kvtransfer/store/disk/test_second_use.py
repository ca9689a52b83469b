"""Guards the admission to disk: a block that is used once is not written, and the memory of uses is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.store.disk.second_use import SecondUse
from baton.tests.unit.kvtransfer.store.disk.tier_checks import key


def test_the_second_use_counts() -> None:
    """Guards against writing every block, or none."""
    uses = SecondUse(4)
    assert [uses.use(key(number)) for number in (0, 1, 0, 2, 1, 0)] == [False, False, True, False, True, True]
    uses.forget(key(0))
    uses.forget(key(9))
    assert [uses.use(key(number)) for number in (0, 1)] == [False, True]


def test_the_longest_ago_is_forgotten() -> None:
    """Guards against a memory that grows with every prompt."""
    uses = SecondUse(2)
    assert not any(uses.use(key(number)) for number in range(3))
    assert len(uses) == 2
    assert uses.use(key(1)) and uses.use(key(2)) and not uses.use(key(0))


def test_no_memory_is_refused() -> None:
    """Guards against a filter that silently lets nothing through."""
    with pytest.raises(ValueError, match="0 keys"):
        SecondUse(0)


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 6))
def test_true_means_that_it_was_used_before(numbers: list[int], num_keys: int) -> None:
    """Guards the bound, and against admitting an unknown key, in any order of uses."""
    uses = SecondUse(num_keys)
    seen: set[int] = set()
    for number in numbers:
        assert not uses.use(key(number)) or number in seen
        seen.add(number)
        assert len(uses) <= num_keys
