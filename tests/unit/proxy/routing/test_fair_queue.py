"""Guards the order among tenants: shares in tokens, no credit for idling, priority and age within a tenant."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.routing.fair_queue import BURST_TOKENS, MOST_STALE, FairQueue, Ticket


def ticket(tenant: str, cost: int = 10, priority: int = 0, turn: int = 0, refusable: bool = True) -> Ticket:
    return Ticket(tenant=tenant, priority=priority, turn=turn, num_tokens=cost, cost_tokens=cost, refusable=refusable)


def served(queue: FairQueue, names: dict[int, str], count: int) -> str:
    """Admit `count` tickets; their names, joined."""
    order = []
    for _ in range(count):
        number = queue.first()
        assert number is not None
        queue.admit(number)
        order.append(names[number])
    return "".join(order)


def filled(*tickets: Ticket) -> tuple[FairQueue, dict[int, str]]:
    queue = FairQueue()
    return queue, {queue.add(each): each.tenant for each in tickets}


def test_tenants_take_turns_by_their_tokens() -> None:
    """Guards against a burst that is served before all that came after it, and shares in requests instead of tokens."""
    queue, names = filled(*[ticket("a")] * 10, *[ticket("b", 20)] * 10)
    order = served(queue, names, 15)
    assert order[:3] in ("aba", "baa") and Counter(order) == {"a": 10, "b": 5}


def test_a_light_tenant_is_next_whenever_it_asks() -> None:
    """Guards the wait of a tenant that asks for little beside one with a long queue: it waits for no admission."""
    queue, names = filled(*[ticket("heavy", 1000)] * 100)
    for _ in range(10):
        served(queue, names, 9)
        names |= {queue.add(ticket("light", 200)): "light" for _ in range(3)}
        assert served(queue, names, 3) == "light" * 3, "also where some of its requests come together"


def test_being_idle_saves_no_more_than_a_burst_up() -> None:
    """Guards against a tenant that is served alone for as long as it was away."""
    cost = BURST_TOKENS // 8
    queue, names = filled(*[ticket("a", cost)] * 1000)
    served(queue, names, 500)
    names |= {queue.add(ticket("b", cost)): "b" for _ in range(50)}
    assert Counter(served(queue, names, 28)) == {"a": 10, "b": 18}


def test_a_tenant_that_lets_its_queue_run_empty_keeps_its_place() -> None:
    """Guards against a tenant that gets more than its part, as it begins anew with each request."""
    queue, names = filled(*[ticket("b", 1000)] * 200)
    for _ in range(100):
        number = queue.add(ticket("a", 1000))
        names[number] = "a"
        queue.admit(number)
    names[queue.add(ticket("a", 1000))] = "a"
    assert served(queue, names, 100) == "b" * 100


def test_within_a_tenant_priority_then_age() -> None:
    """Guards `priority`; and a further attempt, which keeps its place by its turn."""
    queue = FairQueue()
    late, old, urgent = (queue.add(ticket("a", priority=p, turn=turn)) for p, turn in ((0, 5), (0, 2), (1, 9)))
    order = []
    for _ in range(3):
        number = queue.first()
        assert number is not None
        queue.admit(number)
        order.append(number)
    assert order == [urgent, old, late]
    assert queue.first() is None and len(queue) == 0


def test_priority_counts_for_nothing_among_tenants() -> None:
    """Guards against a tenant that overtakes others by asking for it."""
    queue, names = filled(*[ticket("a", priority=5)] * 4, *[ticket("b")] * 4)
    assert sorted(served(queue, names, 2)) == ["a", "b"]


def test_what_was_not_used_comes_back() -> None:
    """Guards a tenant whose answers end long before their max_tokens."""
    queue, names = filled(*[ticket("a", 100)] * 20, *[ticket("b", 10)] * 20)
    order: Counter[str] = Counter()
    for _ in range(20):
        number = queue.first()
        assert number is not None
        queue.admit(number)
        order[names[number]] += 1
        if names[number] == "a":
            queue.correct("a", -90)
    assert order == {"a": 10, "b": 10}
    queue.correct("unknown", 1)


def test_a_full_queue_turns_the_longest_away() -> None:
    """Guards a light tenant against a full queue, and requests that have begun against being turned away."""
    queue, _ = filled(*[ticket("a", turn=n) for n in range(3)], ticket("b", turn=9))
    assert queue.to_refuse("a") is None
    assert queue.to_refuse("b") == 3 and queue.to_refuse("c") == 3, "the youngest of the longest"
    queue, _ = filled(*[ticket("a", turn=n, refusable=False) for n in range(3)])
    assert queue.to_refuse("b") is None
    queue, _ = filled(ticket("a", turn=0, priority=1), ticket("a", turn=1), ticket("a", turn=2, priority=1))
    assert queue.to_refuse("b") == 2, "the lowest priority"
    queue, _ = filled(ticket("a"))
    assert queue.to_refuse("b") is None, "equal shares"


def test_tickets_that_leave_take_their_memory_along() -> None:
    """Guards against a queue that grows while its first request waits and clients come and go."""
    queue, _ = filled(ticket("a"))
    for _ in range(10_000):
        queue.discard(queue.add(ticket("a", turn=1)))
    assert len(queue._tenants["a"].order) <= MOST_STALE + 3
    assert queue.first() == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "discard", "admit"]), st.sampled_from("abc"), st.integers(0, 50)),
        max_size=80,
    )
)
def test_no_ticket_is_lost_or_served_twice(steps: list[tuple[str, str, int]]) -> None:
    """Guards the books of the queue under any order of arrivals, departures and admissions."""
    queue, present = FairQueue(), {}
    for step, tenant, value in steps:
        if step == "add":
            number = queue.add(ticket(tenant, value, priority=value % 3, turn=value))
            assert number not in present
            present[number] = tenant
        elif step == "discard" and present:
            number = sorted(present)[value % len(present)]
            del present[number]
            queue.discard(number)
            queue.discard(number)
        elif step == "admit" and present:
            number = queue.first()
            assert number is not None
            queue.admit(number)
            del present[number]
        heads = list(queue.heads())
        assert len(queue) == len(present)
        assert sorted(present[number] for number in heads) == sorted(set(present.values()))


@pytest.mark.parametrize("costs", [(10, 10), (10, 500), (1000, 3)])
def test_the_part_of_a_tenant_with_a_queue_is_even(costs: tuple[int, int]) -> None:
    """Guards the bound of the virtual token counter: two queued tenants differ by two of their largest requests."""
    queue, names = filled(*[ticket("a", costs[0])] * 2000, *[ticket("b", costs[1])] * 2000)
    tokens: Counter[str] = Counter()
    for _ in range(1000):
        number = queue.first()
        assert number is not None
        queue.admit(number)
        tokens[names[number]] += costs["ab".index(names[number])]
        assert abs(tokens["a"] - tokens["b"]) <= 2 * max(costs)
