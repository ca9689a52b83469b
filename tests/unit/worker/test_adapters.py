"""Adapters in a worker: tokens in mixed batches, and which slots they get."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.node.errors import AdapterError
from baton.node.leg import LegKey
from baton.node.messages.control import AdapterRef, LoadAdapter, SamplingSpec
from baton.tests.unit.worker.demo_worker import Answer, DemoWorker, adapter_refs
from baton.worker.adapter_slots import AdapterRead
from baton.worker.adapters import MAX_OVERTAKES, WorkerAdapters

PROMPT = [2, *range(300, 340), *range(300, 336)]
GREEDY = SamplingSpec(max_tokens=8, temperature=0.0)
SEEDED = SamplingSpec(max_tokens=8, temperature=0.8, seed=7)
NAMES = ("base", "a", "b")
REQUESTS = {f"{name} {kind}": spec for name in NAMES for kind, spec in (("greedy", GREEDY), ("seeded", SEEDED))}


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, AdapterRef]]:
    """Of the requests that have an adapter; ranks differ."""
    root = tmp_path_factory.mktemp("adapters")
    made = adapter_refs(root)
    yield {name: made[name.split()[0]] for name in REQUESTS if name.split()[0] in made}
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def alone(refs: dict[str, AdapterRef]) -> dict[str, Answer]:
    """Each request by itself, on a worker that has a slot for each adapter."""
    worker = DemoWorker(400, max_loras=2)
    return {name: worker.answers({name: spec}, PROMPT, adapters=refs)[name] for name, spec in REQUESTS.items()}


@pytest.mark.parametrize(
    ("num_blocks", "options"),
    [
        (400, {"max_loras": 1, "max_num_batched_tokens": 32}),
        (11, {"max_loras": 2, "speculate": "ngram"}),
    ],
    ids=["one slot, chunks", "preempted, drafts"],
)
def test_tokens_are_those_of_each_adapter_alone(refs, alone, num_blocks, options):
    """Guards against a token of another adapter: by its slot, by a cached prefix of the same prompt, by a slot that is
    filled anew while it is used, by a preemption in between."""
    worker = DemoWorker(num_blocks, **options)
    assert worker.answers(REQUESTS, PROMPT, adapters=refs) == alone
    assert (worker.role.counters.preemptions > 0) == (num_blocks == 11)
    assert len({answer.ids for answer in alone.values()}) == len(alone), "each adapter says something else"


# ---- slots -------------------------------------------------------------------------------------------------------


class ManualFill:
    def __init__(self) -> None:
        self.done = False


class ManualSlots:
    """Slots that log what they are filled with; fills end when the test says so."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: list[bytes | None] = [None] * num_slots
        self.fills: list[ManualFill] = []
        self.named: set[int] = set()

    def prepare(self, adapter: Any) -> Any:
        return adapter

    def fill(self, slot: int, adapter: Any) -> ManualFill:
        assert slot not in self.named, "a launched step reads this slot"
        self.held[slot] = adapter.digest
        self.fills.append(ManualFill())
        return self.fills[-1]


class ManualAdapters:
    """WorkerAdapters whose reads end at once."""

    def __init__(self, num_slots: int, in_memory: int = 100) -> None:
        self.slots = ManualSlots(num_slots)
        self.events: list[AdapterRead] = []
        self.adapters = WorkerAdapters(self.slots, self.read, in_memory, self.events.append, clock=lambda: 0.0)
        self.adapters._thread = SimpleNamespace(submit=lambda load, ref: load(ref))  # type: ignore[assignment]
        self.sequences: dict[LegKey, Any] = {}

    def read(self, path: Path) -> tuple[bytes, Any]:
        if path.name == "bad":
            raise AdapterError("tensor x: is bad")
        return ref(path.name).digest, SimpleNamespace(digest=ref(path.name).digest, size_bytes=1)

    def add(self, number: int, name: str, blocks: bool = False) -> Any:
        leg = LegKey(str(number), 0)
        sequence = SimpleNamespace(
            leg=leg,
            adapter=ref(name),
            adapter_slot=None,
            table=SimpleNamespace(blocks=[1] if blocks else []),
            incoming=None,
            times=SimpleNamespace(received_at=0.0),
        )
        self.sequences[leg] = sequence
        assert not self.adapters.want(sequence.adapter)
        return sequence

    def turn(self) -> None:
        while self.events:
            self.adapters.take_in(self.events.pop(0))
        for sequence in self.sequences.values():
            sequence.awaits_adapter = sequence.adapter_slot is None
        self.adapters.assign(self.sequences, self.slots.named)

    def end_fills(self) -> None:
        for fill in self.slots.fills:
            fill.done = True

    def settle(self) -> None:
        for _ in range(3):
            self.turn()
            self.end_fills()
        self.turn()


def ref(name: str) -> AdapterRef:
    return AdapterRef(name.encode().ljust(32, b"."), name)


def test_a_sequence_waits_until_its_slot_is_filled():
    bench = ManualAdapters(2)
    sequence = bench.add(1, "a")
    bench.turn()
    assert sequence.adapter_slot is None and bench.adapters.wake_in_s(1.0) < 0.01
    bench.end_fills()
    bench.turn()
    assert bench.slots.held[sequence.adapter_slot] == sequence.adapter.digest
    assert bench.adapters.wake_in_s(1.0) == 1.0


def test_a_slot_that_a_launched_step_names_is_not_filled():
    """The sequence has ended, but the device still computes with its adapter."""
    bench = ManualAdapters(1)
    first = bench.add(1, "a", blocks=True)
    bench.settle()
    bench.slots.named = {first.adapter_slot}
    bench.sequences.clear()
    second = bench.add(2, "b")
    bench.settle()
    assert second.adapter_slot is None
    bench.slots.named = set()
    bench.settle()
    assert second.adapter_slot is not None


def test_a_sequence_with_blocks_takes_the_slot_of_one_without():
    """Else the one would wait for blocks, and the other for a slot, for ever."""
    bench = ManualAdapters(1)
    first, second = bench.add(1, "a"), None
    bench.settle()
    second = bench.add(2, "b", blocks=True)
    bench.settle()
    assert (first.adapter_slot, second.adapter_slot) == (None, 0)


def test_others_overtake_a_bounded_number_of_times():
    """Guards against an adapter that never gets a slot because others are used without a break."""
    bench = ManualAdapters(1)
    bench.add(0, "a", blocks=True)
    bench.settle()
    starving = bench.add(1, "b")
    for number in range(2, 2 + 2 * MAX_OVERTAKES):
        bench.add(number, "a")
        bench.turn()
    taken = [each for each in bench.sequences.values() if each.adapter_slot is not None]
    assert len(taken) == 1 + MAX_OVERTAKES
    for each in taken:
        del bench.sequences[each.leg]
    bench.settle()
    assert starving.adapter_slot is not None


def test_a_bad_adapter_is_answered_and_tried_again():
    bench = ManualAdapters(1)
    assert bench.adapters.load("proxy", LoadAdapter(adapter=ref("bad"))) is None
    ((link, answer),) = bench.adapters.take_in(bench.events.pop())
    assert (link, answer.error) == ("proxy", "tensor x: is bad")
    assert bench.adapters.load("proxy", LoadAdapter(adapter=ref("bad"))) is None


def test_an_adapter_in_memory_is_answered_at_once():
    bench = ManualAdapters(1)
    bench.adapters.load("one", LoadAdapter(adapter=ref("a")))
    bench.turn()
    assert bench.adapters.load("two", LoadAdapter(adapter=ref("a"))).error == ""


def test_a_folder_with_other_content_is_refused():
    bench = ManualAdapters(1)
    bench.adapters.want(AdapterRef(b"x" * 32, "a"))
    assert "is another adapter than was asked for" in bench.events[0].error


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add with blocks", "end", "fills", "launch", "read"]), st.integers(0, 5)),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(1, 3), actions=ACTIONS)
def test_a_slot_has_the_adapter_of_the_sequences_that_use_it(num_slots, actions):
    """In any order of arrivals, ends, fills and steps; and in the end all get a slot."""
    bench = ManualAdapters(num_slots, in_memory=3)
    for number, (action, value) in enumerate(actions):
        if action.startswith("add"):
            bench.add(number, "abcdef"[value], blocks=action.endswith("blocks"))
        elif action == "end" and bench.sequences:
            bench.sequences.pop(list(bench.sequences)[value % len(bench.sequences)])
        elif action == "fills":
            bench.end_fills()
        elif action == "launch":
            bench.slots.named |= {
                each.adapter_slot for each in bench.sequences.values() if each.adapter_slot is not None
            }
        else:
            bench.slots.named = set()
        bench.turn()
        for each in bench.sequences.values():
            if each.adapter_slot is not None:
                assert bench.slots.held[each.adapter_slot] == each.adapter.digest
    bench.slots.named = set()
    while bench.sequences:
        bench.settle()
        served = [leg for leg, each in bench.sequences.items() if each.adapter_slot is not None]
        assert served, "nothing runs, and sequences wait"
        for leg in served:
            del bench.sequences[leg]
