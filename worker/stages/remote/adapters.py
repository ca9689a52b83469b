"""Adapters of stages on several hosts: the first stage reads and checks one, and gives each stage its layers' part.

    prepare ── a parcel of the part ──► kept ── GivenFill, between two steps ──► in a slot
    not used any more ── AdapterForgotten ──► kept by the slot that has it, until that is filled again

Parcels and messages of a link keep their order, and a fill is sent behind the parcel, so a stage has what it is to fill
in. Only a fill that no step follows can find its adapter forgotten: it came by the stages between, which were behind.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import msgspec

from baton.models.adapters.adapter import Adapter
from baton.models.adapters.cut import layers_of
from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.models.adapters.flat import Directory
from baton.models.cpu.adapters import CpuAdapterSlots, FlatAdapter
from baton.models.cpu.peers import OwnMemory
from baton.models.partition import Stage
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import AdapterError, InvariantBroken, PeerLost
from baton.worker.stages.links import StepLink
from baton.worker.stages.messages import GivenFill, SlotFill
from baton.worker.stages.remote.messages import Bytes


class GivenPart(msgspec.Struct, frozen=True, array_like=True):
    """The record of a parcel of adapters."""

    number: int
    """Each time that an adapter is read it has another one."""
    directory: Directory


class StageLinks(Protocol):
    """The links to the other stages, by number."""

    def give_adapter(self, stage: int, record: bytes, data: Bytes) -> None: ...

    def forget_adapter(self, number: int) -> None: ...


@dataclass(frozen=True, eq=False)
class SpreadAdapter:
    """A PreparedAdapter: the first stage's part, and the number by which the others know theirs."""

    own: FlatAdapter
    number: int
    size_bytes: int


class SpreadSlots:
    """AdapterSlots of the first stage. One thread fills slots and launches steps."""

    def __init__(self, first: CpuAdapterSlots, num_stages: int, stages: StageLinks, following: StepLink) -> None:
        self.num_slots = first.num_slots
        self._first, self._num_stages, self._stages, self._following = first, num_stages, stages, following
        self._numbers = count(1)

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """All parts are checked before one is sent."""
        own = self._first.prepare(layers_of(adapter, Stage(0, self._num_stages)))
        parts = {
            stage: self._first.prepare_in(layers_of(adapter, Stage(stage, self._num_stages)), OwnMemory.of)
            for stage in range(1, self._num_stages)
        }
        prepared = SpreadAdapter(own, next(self._numbers), own.size_bytes)
        for stage, part in parts.items():
            record = msgspec.msgpack.encode(GivenPart(prepared.number, part.directory))
            self._stages.give_adapter(stage, record, part.memory.tensor.numpy().data)
        weakref.finalize(prepared, self._stages.forget_adapter, prepared.number)
        return prepared

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        if not isinstance(adapter, SpreadAdapter):
            raise InvariantBroken("an adapter that was not prepared here")
        self._following.send(msgspec.msgpack.encode(GivenFill(slot, adapter.number)))
        return self._first.fill(slot, adapter.own)


class GivenAdapters:
    """A stage's side. `take` and `forget` are called by the transport's thread, `fill` by the one that computes."""

    def __init__(self, slots: CpuAdapterSlots) -> None:
        self._slots = slots
        self._kept: dict[int, FlatAdapter] = {}
        self._in_slots: dict[int, FlatAdapter] = {}

    def take(self, record: bytes, data: bytearray) -> None:
        """PeerLost for what is no part of an adapter."""
        try:
            given = msgspec.msgpack.decode(record, type=GivenPart)
            self._kept[given.number] = self._slots.received(given.directory, data)
        except (*DECODE_ERRORS, AdapterError) as error:
            raise PeerLost(f"no part of an adapter: {error}") from None

    def forget(self, number: int) -> None:
        self._kept.pop(number, None)

    def fill(self, record: SlotFill) -> None:
        if not isinstance(record, GivenFill):
            raise PeerLost("an adapter in memory of another host")
        if (adapter := self._kept.get(record.number)) is not None:
            self._slots.fill(record.slot, adapter)
            self._in_slots[record.slot] = adapter
