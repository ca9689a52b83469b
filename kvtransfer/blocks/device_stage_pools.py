"""The pools of all stages of one worker as one, on GPUs: block b of it is the blocks b of all pools, each with the
layers of its stage and the units of its rank. One process owns all of them, and the others map theirs.

Digests are over the layers of units (layer_digests.py): planes by layer take no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.kvtransfer.blocks.device_copies import DeviceCopies, UnitPart
from baton.kvtransfer.blocks.device_pool import DevicePool
from baton.kvtransfer.blocks.device_stage_copies import DeviceStageCopies
from baton.kvtransfer.blocks.layer_digests import layer_digests
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.rank_copies import RankCopies
from baton.kvtransfer.reshard import Cut

Padding = Callable[[KVLayout], int]
"""Bytes behind each unit of a pool of this layout."""


def stage_layouts(cut: Cut, layout: KVLayout, padding: Padding) -> tuple[KVLayout, ...]:
    """Of the pools of the ranks of `cut` in order, stage by stage; `layout` is the model's. ValueError if `cut` is not
    of that model."""
    if (cut.total_units, cut.num_layers) != (layout.num_units, layout.num_layers):
        raise ValueError(f"pools for {cut} of {layout.num_units} units of {layout.num_layers} layers")
    held = [(len(layers), cut.units(rank)) for layers in cut.layers for rank in range(cut.ranks)]
    parts = [
        replace(layout, num_layers=num_layers, first_unit=units.start, num_units=len(units), padding_bytes=0)
        for num_layers, units in held
    ]
    return tuple(replace(part, padding_bytes=padding(part)) for part in parts)


class DeviceStagePools:
    """A pool of so many blocks on each of `gpus`, which belong to the ranks of `cut` in order, stage by stage."""

    def __init__(self, cut: Cut, layout: KVLayout, num_blocks: int, gpus: Sequence[int], padding: Padding) -> None:
        """`layout`: of all units and layers. Raises SettingsError as DevicePool does."""
        self.cut, self.num_blocks, self._layout = cut, num_blocks, layout
        layouts = stage_layouts(cut, layout, padding)
        self.pools = tuple(DevicePool(part, num_blocks, gpu) for part, gpu in zip(layouts, gpus, strict=True))

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """Of each of these chunks; what was written to these blocks must be complete on all GPUs."""
        return layer_digests(self.cut, self.pools, chunks)

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        return self.digests([blocks])[0]

    def copies(self) -> RankCopies:
        """To and from the host's store, whose records are those of a worker with one pool."""
        ranks = []
        for rank in range(self.cut.ranks):
            pools = self.pools[rank :: self.cut.ranks]
            stages = [
                DeviceCopies(pool.memory, self._part(layers))
                for pool, layers in zip(pools, self.cut.layers, strict=True)
            ]
            ranks.append(DeviceStageCopies(stages, replace(self._layout, num_units=len(self.cut.units(rank)))))
        return RankCopies(ranks, self.cut)

    def _part(self, layers: range) -> UnitPart:
        layer_bytes = self._layout.layer_bytes
        return UnitPart(layers.start * layer_bytes, len(layers) * layer_bytes, self._layout.unit_bytes)

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
