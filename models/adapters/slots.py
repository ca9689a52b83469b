"""Where a runner keeps the adapters that rows of its steps name, as its worker sees it.

A worker's thread prepares an adapter once, which takes long: the numbers in the model's dtype, in the order of a slot,
in memory that a device reads fast. Its loop fills slots from there. It fills none that a launched, unread step names,
and rows name a slot from when its fill has ended.
"""

from __future__ import annotations

from typing import Protocol

from baton.models.adapters.adapter import Adapter
from baton.models.adapters.fills import Fill, FillableSlots, PreparedAdapter
from baton.node.errors import InvariantBroken


class AdapterSlots(FillableSlots, Protocol):
    """Of a runner."""

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Called by a thread beside the loop's. AdapterError says what of the adapter cannot run here."""
        ...


class NoSlots:
    """Of a runner that takes no adapters."""

    num_slots = 0

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        raise InvariantBroken("an adapter, where none is taken")

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        raise InvariantBroken("an adapter, where none is taken")


NO_SLOTS: AdapterSlots = NoSlots()
