"""The pools of the stages of one worker as one: block b of it is the blocks b of all stages, each with its own layers.

Records in stores are of whole units, whatever stages hold their layers, so that they are those of a worker with one
pool; the digest of a chunk is over the layers of units, of which each stage can sum up its own. All pools lie in memory
of this process, and the stages' processes map theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baton.kvtransfer.blocks.checksum import SUM_BYTES, digest_of_sums, xxh3_sums
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.memory import SharedFile
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.reshard import Cut
from baton.node.errors import PeerLost


class LayerMemory:
    """A pool with the layers of its units as blocks: layer l of unit u of block b is number
    (b * units + u) * layers + l. Meets SharedBlockMemory."""

    num_units = 1

    def __init__(self, pool: BlockPool) -> None:
        if pool.layout.padding_bytes:
            raise ValueError(
                f"units with padding of {pool.layout.padding_bytes} bytes have no layers of equal distance"
            )
        self._pool = pool
        self._layers_per_block = pool.layout.num_units * pool.layout.num_layers
        self.num_blocks = pool.num_blocks * self._layers_per_block
        self.block_bytes = pool.layout.layer_bytes

    @property
    def shared(self) -> SharedFile | None:
        return self._pool.shared

    def block(self, index: int) -> memoryview:
        """The writable bytes of one layer of one unit."""
        block, layer = divmod(index, self._layers_per_block)
        return self._pool.block(block)[layer * self.block_bytes : (layer + 1) * self.block_bytes]


class StagePools:
    """A pool of so many blocks of `layout` for each stage of `cut`, whose stages have one rank: all ranks of a stage
    use its pool."""

    def __init__(self, cut: Cut, layout: KVLayout, num_blocks: int) -> None:
        if cut.ranks != 1 or (cut.total_units, cut.num_layers) != (layout.num_units, layout.num_layers):
            raise ValueError(f"pools for {cut} of {layout.num_units} units of {layout.num_layers} layers")
        self.cut, self.num_blocks = cut, num_blocks
        self.num_units, self.block_bytes = layout.num_units, layout.block_bytes
        self.pools = tuple(BlockPool(replace(layout, num_layers=len(layers)), num_blocks) for layers in cut.layers)

    def unit_parts(self, block: int) -> list[list[memoryview]]:
        """Of each unit of a block, its layers in order."""
        parts = [pool.unit_parts(block) for pool in self.pools]
        return [[part for held in parts for part in held[unit]] for unit in range(self.num_units)]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """Of each of these chunks, as BlockPool.layers_digest has it: planes by layer take no other."""
        return [self.layers_digest(chunk) for chunk in chunks]

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        return digest_of_sums(layer_sums(self.pools, block) for block in blocks)

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


class SpreadPools:
    """The pools of stages on several hosts as one; the first stage's is here. Each other stage sums up what a step has
    written there, so that a digest waits for nothing."""

    def __init__(self, cut: Cut, layout: KVLayout, num_blocks: int) -> None:
        self.cut, self.layout, self.num_blocks = cut, layout, num_blocks
        self.own = BlockPool(replace(layout, num_layers=len(cut.layers[0])), num_blocks)
        self._sums: list[dict[int, bytes]] = [{} for _ in cut.layers[1:]]

    def take_sums(self, stage: int, blocks: Sequence[int], sums: bytes) -> None:
        """The layer_sums of these blocks in a stage's pool. PeerLost for what cannot be these."""
        size = self.own.num_units * len(self.cut.layers[stage]) * SUM_BYTES
        if len(sums) != len(blocks) * size or not all(0 <= block < self.num_blocks for block in blocks):
            raise PeerLost(f"{len(sums)} bytes are no sums of {len(blocks)} blocks")
        for place, block in enumerate(blocks):
            self._sums[stage - 1][block] = sums[place * size :][:size]

    def sums_of(self, stage: int, block: int) -> bytes:
        """What a stage has said of a block."""
        return self._sums[stage - 1][block]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """As those of StagePools."""
        return [self.layers_digest(chunk) for chunk in chunks]

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        return digest_of_sums(self._layer_sums(block) for block in blocks)

    def close(self) -> None:
        self.own.close()

    def _layer_sums(self, block: int) -> bytes:
        held = [layer_sums([self.own], block), *(sums[block] for sums in self._sums)]
        return merged([(len(layers), sums) for layers, sums in zip(self.cut.layers, held, strict=True)])


def layer_sums(pools: Sequence[BlockPool], block: int) -> bytes:
    """The xxh3-128 of each layer that these stages hold of a block: unit by unit, of each its layers in order."""
    held = [xxh3_sums(pool.block(block), pool.num_units * pool.layout.num_layers) for pool in pools]
    return merged([(pool.layout.num_layers, sums) for pool, sums in zip(pools, held, strict=True)])


def merged(stages: Sequence[tuple[int, bytes]]) -> bytes:
    """The sums of a block's layers, unit by unit, of those of each stage: its number of layers, and their sums."""
    num_units = len(stages[0][1]) // (stages[0][0] * SUM_BYTES)
    return b"".join(
        sums[unit * num_layers * SUM_BYTES :][: num_layers * SUM_BYTES]
        for unit in range(num_units)
        for num_layers, sums in stages
    )
