"""How a worker's loop fills slots with adapters, whatever they are made of. No torch: simulations fill some too."""

from __future__ import annotations

from typing import Protocol


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


class FillableSlots(Protocol):
    """Of a runner. Slots are numbered from 0 on."""

    @property
    def num_slots(self) -> int:
        """0: the runner takes no adapters."""
        ...

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        """Begin to replace what the slot has; called by the loop's thread, and does not wait."""
        ...
