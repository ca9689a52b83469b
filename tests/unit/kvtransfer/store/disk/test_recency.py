"""Guards the order of use against a list, in any order of calls, and that every use is saved once."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from baton.kvtransfer.store.disk.recency import Recency
from baton.tests.unit.kvtransfer.store.disk.tier_checks import key


def test_entries_are_loaded_in_the_order_of_their_ticks() -> None:
    """Guards against an order that a restart forgets, and ticks that are given twice."""
    recency = Recency([(key(0), 7), (key(1), 3), (key(2), 5)])
    assert recency.keys() == [key(1), key(2), key(0)]
    assert recency.next_tick() == 8 and recency.next_tick() == 9
    assert Recency().next_tick() == 1


def test_the_oldest_are_taken_but_for_some() -> None:
    """Guards eviction against what is being read, and against taking what is not there."""
    recency = Recency([(key(number), number) for number in range(5)])
    assert list(recency.take_oldest(2, skip={key(0), key(2)})) == [key(1), key(3)]
    assert recency.keys() == [key(0), key(2), key(4)]
    assert recency.take_oldest(0, skip=()) == {} and recency.take_oldest(-3, skip=()) == {}
    assert list(recency.take_oldest(9, skip=())) == [key(0), key(2), key(4)]
    assert len(recency) == 0


class AgainstAList(RuleBasedStateMachine):
    """`order`: held keys, least recently used first; `saved`: what the disk would know."""

    numbers = st.integers(0, 7)

    def __init__(self) -> None:
        super().__init__()
        self.recency = Recency()
        self.order: list[bytes] = []
        self.saved: dict[bytes, int] = {}
        self.last_tick = 0

    @rule(number=numbers)
    def use(self, number: int) -> None:
        if key(number) in self.recency:
            self.recency.touch(key(number))
            self.order.remove(key(number))
        else:
            tick = self.recency.next_tick()
            assert tick > self.last_tick
            self.last_tick = tick
            self.recency.add(key(number), tick)
            self.saved[key(number)] = tick
        self.order.append(key(number))

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        assert self.recency.remove(key(number)) is (key(number) in self.order)
        if key(number) in self.order:
            self.order.remove(key(number))
        self.saved.pop(key(number), None)

    @rule(count=st.integers(0, 4), skip=st.sets(numbers, max_size=3), give_back=st.booleans())
    def take(self, count: int, skip: set[int], give_back: bool) -> None:
        skipped = {key(number) for number in skip}
        expected = [held for held in self.order if held not in skipped][:count]
        taken = self.recency.take_oldest(count, skipped)
        assert list(taken) == expected
        self.order = [held for held in self.order if held not in taken]
        if give_back:
            self.recency.put_back(taken)
            self.order = expected + self.order
        else:
            self.saved = {held: tick for held, tick in self.saved.items() if held not in taken}

    @precondition(lambda self: self.recency.num_unsaved)
    @rule(limit=st.integers(1, 3), fails=st.booleans())
    def save(self, limit: int, fails: bool) -> None:
        ticks = self.recency.take_unsaved(limit)
        assert 0 < len(ticks) <= limit and set(ticks) <= set(self.order)
        if fails:
            self.recency.not_saved([*ticks, key(99)])
        else:
            self.saved.update(ticks)

    @invariant()
    def agrees(self) -> None:
        assert self.recency.keys() == self.order
        assert len(self.recency) == len(self.order) and self.recency.num_unsaved <= len(self.order)
        assert set(self.saved) == set(self.order)

    def teardown(self) -> None:
        """Saved to the end, a restart finds the same order, unless a failed eviction put a newer use first."""
        self.saved.update(self.recency.take_unsaved(99))
        assert self.recency.num_unsaved == 0
        assert set(Recency(self.saved.items()).keys()) == set(self.order)


def test_any_order_of_calls_agrees_with_a_list() -> None:
    """Guards `Recency` against divergence from a plain list, and against a use that is not saved."""
    run_state_machine_as_test(
        AgainstAList,
        settings=settings(
            max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
