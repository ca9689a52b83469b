"""Copies between the store's arena on the first stage's host and pools of stages on several: worker.stages.remote.

Meets kvtransfer.blocks.copies.Copies. A record has all layers of a block. The first stage's are copied here; those of
another stage go through the links between the two. What a stage has of a block is [num_units, layers of the stage,
layer_bytes], a strip of the record's [num_units, num_layers, layer_bytes].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from baton.kvtransfer.blocks.checksum import SUM_BYTES, xxh3, xxh3_sums
from baton.kvtransfer.blocks.copies import BATCH_BYTES, Lock, NoLock, Pair
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import SpreadPools, layer_sums
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import PeerLost
from baton.node.messages.store import DigestName
from baton.worker.stages.remote.messages import (
    MAX_COPIED_BLOCKS,
    MAX_SUMS_BYTES,
    BlocksTaken,
    BlocksWanted,
    Bytes,
)

DAMAGED = b""
"""The digest of a block that is not what it was: no record has it."""
Strip = npt.NDArray[np.uint8]


class GivenBlocks(msgspec.Struct, frozen=True, array_like=True):
    """The record of a parcel of blocks."""

    copy: int
    blocks: tuple[int, ...]


class StageBlocks(Protocol):
    """The links to the other stages, by number."""

    def want_blocks(self, stage: int, wanted: BlocksWanted) -> None: ...

    def give_blocks(self, stage: int, record: bytes, data: Bytes) -> None: ...


class FromStage(NamedTuple):
    """What a stage has answered: its strips of the blocks of a save, or their sums after a load."""

    stage: int
    copy: int
    data: Bytes


@dataclass(slots=True)
class OpenCopy:
    """Begun, and not ended."""

    pairs: Sequence[Pair]
    loads: bool
    waiting: set[int]
    """Stages that have not answered."""
    intact: list[bool] = field(default_factory=list)
    """By block, as far as answers say."""


class SpreadCopies:
    """`take` may be called by any thread; the rest by the store's."""

    digest: DigestName = "xxh3"

    def __init__(self, pools: SpreadPools, stages: StageBlocks) -> None:
        self._pools, self._stages = pools, stages
        self.block_bytes, self.num_units = pools.layout.block_bytes, pools.layout.num_units
        self._layers = pools.cut.layers
        sums_bytes = self.num_units * max(len(layers) for layers in self._layers) * SUM_BYTES
        most = min(BATCH_BYTES // self.block_bytes, MAX_COPIED_BLOCKS, MAX_SUMS_BYTES // sums_bytes)
        self.batch_blocks = max(1, most)
        self._copies = 0
        self._open: dict[int, OpenCopy] = {}
        self._inbox: deque[FromStage] = deque()

    def take(self, answer: FromStage) -> None:
        self._inbox.append(answer)

    def lock(self, memory: memoryview) -> Lock:
        return NoLock()

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        copy = self._begin(pairs, loads=True)
        for block, span in pairs:
            self._own(block)[:] = self._strip(span, 0)
        record = msgspec.msgpack.encode(GivenBlocks(copy, tuple(block for block, _ in pairs)))
        for stage in range(1, len(self._layers)):
            data = np.concatenate([self._strip(span, stage).ravel() for _, span in pairs])
            self._stages.give_blocks(stage, record, data.data)
        return copy

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        copy = self._begin(pairs, loads=False)
        for block, span in pairs:
            self._strip(span, 0)[:] = self._own(block)
        for stage in range(1, len(self._layers)):
            self._stages.want_blocks(stage, BlocksWanted(copy=copy, blocks=tuple(block for block, _ in pairs)))
        return copy

    def ended(self, copy: int) -> list[bytes] | None:
        while self._inbox:
            self._take_in(self._inbox.popleft())
        opened = self._open[copy]
        if opened.waiting:
            return None
        del self._open[copy]
        for place, (block, span) in enumerate(opened.pairs):
            opened.intact[place] &= bool(np.array_equal(self._own(block), self._strip(span, 0)))
        digests = [xxh3(span, self.num_units) for _, span in opened.pairs]
        return [digest if intact else DAMAGED for digest, intact in zip(digests, opened.intact, strict=True)]

    def close(self) -> None:
        """Nothing is written to a span any more."""
        self._open.clear()

    # -- inside

    def _begin(self, pairs: Sequence[Pair], *, loads: bool) -> int:
        self._copies += 1
        self._open[self._copies] = OpenCopy(pairs, loads, set(range(1, len(self._layers))), [True] * len(pairs))
        return self._copies

    def _take_in(self, answer: FromStage) -> None:
        opened = self._open.get(answer.copy)
        if opened is None or answer.stage not in opened.waiting:
            return
        opened.waiting.discard(answer.stage)
        size = len(answer.data) // len(opened.pairs)
        for place, (block, span) in enumerate(opened.pairs):
            part = memoryview(answer.data)[place * size :][:size]
            strip = self._strip(span, answer.stage)
            if opened.loads:
                intact = part == sums_of(strip)
                if intact:
                    self._pools.take_sums(answer.stage, (block,), bytes(part))
            else:
                intact = len(part) == strip.size
                if intact:
                    strip[:] = np.frombuffer(part, np.uint8).reshape(strip.shape)
                    intact = sums_of(strip) == self._pools.sums_of(answer.stage, block)
            opened.intact[place] &= intact

    def _own(self, block: int) -> Strip:
        """What the first stage has of it."""
        return _as_strip(self._pools.own.block(block), self.num_units, len(self._layers[0]))

    def _strip(self, span: memoryview, stage: int) -> Strip:
        """What a stage has of a record: a view."""
        layers = self._layers[stage]
        return _as_strip(span, self.num_units, self._layers[-1].stop)[:, layers.start : layers.stop]


class StageCopies:
    """A stage's side: its pool's strips, whole blocks here, of blocks that the first stage names."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def give(self, wanted: BlocksWanted) -> tuple[bytes, bytes]:
        """The record and the data of a parcel. PeerLost for a block that is none."""
        self._check(wanted.blocks)
        record = msgspec.msgpack.encode(GivenBlocks(wanted.copy, wanted.blocks))
        return record, b"".join(self._pool.block(block) for block in wanted.blocks)

    def take(self, record: bytes, data: bytearray) -> BlocksTaken:
        """Write what a parcel has. PeerLost for what does not fit."""
        given = decode_given(record)
        self._check(given.blocks)
        size = self._pool.block_bytes
        if len(data) != len(given.blocks) * size:
            raise PeerLost(f"{len(data)} bytes are not {len(given.blocks)} blocks of {size}")
        for place, block in enumerate(given.blocks):
            self._pool.write(block, memoryview(data)[place * size :][:size])
        return BlocksTaken(copy=given.copy, sums=b"".join(layer_sums([self._pool], block) for block in given.blocks))

    def _check(self, blocks: Sequence[int]) -> None:
        if not all(0 <= block < self._pool.num_blocks for block in blocks):
            raise PeerLost(f"blocks {list(blocks)[:8]} of a pool of {self._pool.num_blocks}")


def decode_given(record: bytes) -> GivenBlocks:
    """PeerLost for what is none."""
    try:
        return msgspec.msgpack.decode(record, type=GivenBlocks)
    except DECODE_ERRORS as error:
        raise PeerLost(f"no parcel of blocks: {error}") from None


def sums_of(strip: Strip) -> bytes:
    """layer_sums of what a stage has of a block."""
    return xxh3_sums(np.ascontiguousarray(strip).data.cast("B"), strip.shape[0] * strip.shape[1])


def _as_strip(data: memoryview, num_units: int, num_layers: int) -> Strip:
    return np.frombuffer(data, np.uint8).reshape(num_units, num_layers, -1)
