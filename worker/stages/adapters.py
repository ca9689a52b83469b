"""Slots of adapters in a worker of several stages: the first fills its own, and the fill follows the steps before it.

An adapter lies in the memory of the first stage's process; the others map it, and compute with their layers of it.
"""

from __future__ import annotations

from baton.models.adapters.adapter import Adapter
from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.models.cpu.adapters import CpuAdapterSlots, FlatAdapter
from baton.node.errors import InvariantBroken
from baton.worker.ranks.exchange import AdapterMemory
from baton.worker.ranks.records import FillRecord, encode_fill
from baton.worker.stages.links import StepLink
from baton.worker.stages.messages import SlotFill


class StagedSlots:
    """AdapterSlots of the first stage. One thread fills slots and launches steps."""

    def __init__(self, first: CpuAdapterSlots, following: StepLink) -> None:
        self.num_slots = first.num_slots
        self._first, self._following = first, following

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        return self._first.prepare_in(adapter, AdapterMemory.made)

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        if not isinstance(adapter, FlatAdapter) or not isinstance(adapter.memory, AdapterMemory):
            raise InvariantBroken("an adapter in memory that no other stage can map")
        memory = adapter.memory
        self._following.send(encode_fill(FillRecord(slot, memory.pid, memory.shared, adapter.directory)))
        return self._first.fill(slot, adapter)


def fill_as_first(slots: CpuAdapterSlots, record: SlotFill) -> None:
    """In a stage after the first, and its ranks."""
    if not isinstance(record, FillRecord):
        raise InvariantBroken("an adapter that was given to another host's stage")
    if (memory := AdapterMemory.of(record)) is not None:
        slots.fill(record.slot, FlatAdapter(memory, record.directory))
