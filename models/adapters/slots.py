"""Where a runner keeps the adapters that rows of its steps name, as its worker sees it.

A worker's thread prepares an adapter once, which takes long: the numbers in the model's dtype, in the order of a slot,
in memory that a device reads fast. Its loop fills slots from there. It fills none that a launched, unread step names,
and rows name a slot from when its fill has ended.
"""

from __future__ import annotations

from typing import Protocol

from baton.models.adapters.adapter import Adapter
from baton.node.errors import InvariantBroken


class PreparedAdapter(Protocol):
    """An adapter in the host's memory as a runner's slots take it."""

    @property
    def size_bytes(self) -> int:
        """Of the host's memory that it holds."""
        ...


class Fill(Protocol):
    """A slot that is being filled beside the steps."""

    @property
    def done(self) -> bool:
        """Never waits."""
        ...


class AdapterSlots(Protocol):
    """Of a runner. Slots are numbered from 0 on."""

    @property
    def num_slots(self) -> int:
        """0: the runner takes no adapters."""
        ...

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Called by a thread beside the loop's. AdapterError says what of the adapter cannot run here."""
        ...

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        """Begin to replace what the slot has; called by the loop's thread, and does not wait."""
        ...


class NoSlots:
    """Of a runner that takes no adapters."""

    num_slots = 0

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        raise InvariantBroken("an adapter, where none is taken")

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        raise InvariantBroken("an adapter, where none is taken")


NO_SLOTS: AdapterSlots = NoSlots()
