"""Requests with adapters: workers that cannot have them, and few workers for each adapter."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from baton.node.messages.control import AdapterRef
from baton.proxy.routing.adapter_places import AdapterPlaces, RequestAdapter
from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, WorkerView, pick

RULES = RoutingRules("kv-aware", "always", 16, 0.15)


def adapter(number: int = 0) -> RequestAdapter:
    return RequestAdapter(AdapterRef(number.to_bytes(32, "big"), "/a"), 8, 84 << 20)


def places(*in_slots: int, num_slots: int = 4, in_memory: tuple[int, ...] = ()) -> AdapterPlaces:
    slots, memory = (frozenset(adapter(each).ref.digest for each in group) for group in (in_slots, in_memory))
    return AdapterPlaces(num_slots, 16, slots, memory)


def worker(name: str, adapters: AdapterPlaces, role: str = "decode", requests: int = 1) -> WorkerView:
    return WorkerView(f"{name}/1", f"tcp://{name}", role, False, requests, 0, 100, 100, 64, 10_000.0, adapters=adapters)


def request(number: int = 0, turn: int = 0) -> RequestView:
    return RequestView(50, 4, turn, adapter=adapter(number))


def chosen(view: list[WorkerView], asked: RequestView, rules: RoutingRules = RULES) -> str:
    route = pick(view, asked, rules)
    assert isinstance(route, Route), route
    return route.decode.identity


def test_an_adapter_is_used_where_it_is() -> None:
    """In a slot before in memory, and in memory before elsewhere; a crowded worker shares it all the same."""
    view = [worker("a", places(1)), worker("b", places(0)), worker("c", places(in_memory=(0,)))]
    assert {chosen(view, request(turn=turn)) for turn in range(3)} == {"b/1"}
    assert chosen([view[0], view[2]], request()) == "c/1"
    assert chosen([view[0], replace(view[1], requests=60)], request()) == "a/1"


@pytest.mark.parametrize(
    ("unable", "reason"),
    [
        (AdapterPlaces(0, 0, frozenset(), frozenset()), "no decode worker takes adapters; see --max-loras of workers"),
        (
            AdapterPlaces(4, 7, frozenset(), frozenset()),
            "the adapter has rank 8, decode workers take up to 7; see --max-lora-rank of workers",
        ),
    ],
)
def test_workers_that_cannot_have_it_are_left_out(unable: AdapterPlaces, reason: str) -> None:
    """Guards against a request that is answered by the model alone, or waits for ever."""
    assert chosen([worker("a", unable), worker("b", places(), requests=20)], request()) == "b/1"
    wait = pick([worker("a", unable)], request(), RULES)
    assert isinstance(wait, Wait) and wait.in_vain and wait.reason == reason
    pair = [worker("p", unable, "prefill"), worker("b", places())]
    route = pick(pair, request(), RoutingRules("kv-aware", "auto", 16, 0.15))
    assert isinstance(route, Route) and route.prefill is None
    assert isinstance(pick(pair, request(), RoutingRules("kv-aware", "never", 16, 0.15)), Wait)


def test_requests_without_an_adapter_take_turns() -> None:
    view = [worker("a", places(0)), worker("b", places())]
    base = replace(request(), adapter=None)
    assert [chosen(view, replace(base, turn=turn)) for turn in range(2)] == ["a/1", "b/1"]


def test_many_adapters_settle_on_few_workers() -> None:
    """64 adapters on 8 idle workers of 16 slots, each asked for ten times: one worker has each of them, and no worker
    has many more than its share."""
    slots: dict[str, dict[int, None]] = {f"w{number}/1": {} for number in range(8)}
    homes = defaultdict(set)
    for turn in range(640):
        number = turn * 37 % 64
        view = [worker(name[:-2], places(*list(held)[-16:], num_slots=16)) for name, held in slots.items()]
        home = chosen(view, request(number, turn))
        slots[home].pop(number, None)
        slots[home][number] = None
        homes[number].add(home)
    assert all(len(found) == 1 for found in homes.values())
    assert max(len(held) for held in slots.values()) <= 16
