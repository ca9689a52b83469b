"""Adapters on the CPU: the slots of a runner, and what they add to the products of some rows.

    y[rows, outputs] = row_scale * (W x) + bias + (x[rows] a^T) b^T

An adapter may bring an embedding, norms and a head of its own, which are read in place of the model's.

Rows without an adapter are computed as in a step without adapters, bit for bit: the product itself is of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from baton import kernels
from baton.kernels import Linear
from baton.models.adapters.adapter import (
    Adapter,
    LowRank,
    Parts,
    expert_products,
    latent_products,
    layer_products,
    router_products,
)
from baton.models.adapters.cut import share_of
from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.models.adapters.flat import Directory, flatten, view
from baton.models.config import ModelConfig
from baton.models.cpu.peers import NO_PEERS, FilledSlot, MappableMemory, RankPeers
from baton.models.layers import describe
from baton.models.partition import ONLY_STAGE, Stage
from baton.node.errors import AdapterError, InvariantBroken

NO_SLOT = -1
"""Of a row without an adapter, in an array of slots."""


class PlacedPair(NamedTuple):
    """A pair, and the first of the product's outputs that it adds to."""

    a: torch.Tensor  # [rank, inputs]; of routed experts [experts, rank, inputs]
    b: torch.Tensor  # [outputs, rank]; of routed experts [experts, outputs, rank]
    first_output: int
    row_scale: torch.Tensor | None  # [outputs]

    def of_expert(self, expert: int) -> PlacedPair:
        return self._replace(a=self.a[expert], b=self.b[expert])

    def add(self, rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """bias: of y [N, outputs], the product of x [N, inputs]; it is not scaled."""
        own = slice(self.first_output, self.first_output + self.b.shape[0])
        if self.row_scale is not None:
            added = 0.0 if bias is None else bias[own]
            y[rows, own] = (y[rows, own] - added) * self.row_scale + added
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)  # a router reads float32
        y[rows, own] += (x[rows] @ a.t()) @ b.t()


@dataclass(frozen=True, slots=True, eq=False)
class CpuAdapter:
    """A rank's part of an adapter in the model's dtype; a product that it leaves alone is not there."""

    layers: tuple[dict[str, tuple[PlacedPair, ...]], ...]
    embedding: LowRank | None
    lm_head: tuple[PlacedPair, ...]
    whole_embedding: torch.Tensor | None  # [vocab, hidden]
    whole_head: torch.Tensor | None  # [vocab, hidden]
    norms: Mapping[int, torch.Tensor]  # [hidden]


@dataclass(frozen=True, slots=True, eq=False)
class FlatAdapter:
    """A PreparedAdapter: in memory that all ranks can map."""

    memory: MappableMemory
    directory: Directory

    @property
    def size_bytes(self) -> int:
        return self.memory.tensor.nbytes


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """Which rows of a tensor are computed with which adapters."""

    groups: tuple[tuple[CpuAdapter, torch.Tensor], ...] = ()
    """Adapters, and of each the numbers of its rows."""

    def product(self, layer: int, name: str, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """[N, outputs]: the layer's product of x [N, inputs], with what the adapters change of it."""
        y = linear(x)
        for rows, pair in self.pairs(layer, name):
            pair.add(rows, x, y, linear.bias)
        return y

    def pairs(self, layer: int, product: str) -> Iterator[tuple[torch.Tensor, PlacedPair]]:
        """Those of the layer's product, and their rows."""
        for adapter, rows in self.groups:
            yield from ((rows, pair) for pair in adapter.layers[layer].get(product, ()))

    def add_to_expert(
        self, layer: int, product: str, expert: int, tokens: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """kernels.AddedToExpert in a layer. The rows of x and y are those of `tokens`; expert: among the rank's."""
        for adapter, rows in self.groups:
            if pairs := adapter.layers[layer].get(f"expert_{product}"):
                own = torch.isin(tokens, rows).nonzero().flatten()
                for pair in pairs:
                    pair.of_expert(expert).add(own, x, y)
        return y

    def norm(
        self, number: int, x: torch.Tensor, y: torch.Tensor, eps: float, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y, the norm of x [N, hidden], with what adapters have in place of norm `number`. kept: x is of these rows."""
        for adapter, rows in self.groups:
            if (weight := adapter.norms.get(number)) is not None:
                own = rows if kept is None else torch.isin(kept, rows).nonzero().flatten()
                y[own] = kernels.rms_norm(x[own], weight, eps)
        return y

    def add_head(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for adapter, rows in self.groups:
            if adapter.whole_head is not None:
                y[rows] = x[rows] @ adapter.whole_head.t()
            for pair in adapter.lm_head:
                pair.add(rows, x, y)
        return y

    def add_embedding(self, token_ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for adapter, rows in self.groups:
            if adapter.whole_embedding is not None:
                y[rows] = F.embedding(token_ids[rows], adapter.whole_embedding)
            if adapter.embedding is not None:
                y[rows] += F.embedding(token_ids[rows], adapter.embedding.a.t()) @ adapter.embedding.b.t()
        return y


NO_ADAPTERS = RowAdapters()


class _FilledAtOnce:
    done = True


FILLED: Fill = _FilledAtOnce()


class CpuAdapterSlots:
    """models.adapters.slots.AdapterSlots: an adapter in the host's memory needs no copy."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        num_slots: int = 0,
        max_rank: int = 0,
        peers: RankPeers = NO_PEERS,
        stage: Stage = ONLY_STAGE,
    ) -> None:
        """peers: the other ranks, whose slots are filled as rank 0's are. stage: whose layers are computed."""
        self.num_slots = num_slots
        self._config, self._dtype, self._max_rank, self._peers = config, dtype, max_rank, peers
        self._layers = stage.layers(config.num_layers)
        shapes = describe(config, peers.rank, stage) if num_slots else ()
        hidden = config.hidden_size
        self._products = tuple(
            layer_products(shape, hidden)
            | latent_products(shape)
            | router_products(shape, hidden)
            | expert_products(shape, hidden)
            for shape in shapes
        )
        self._slots: list[CpuAdapter | None] = [None] * num_slots

    def prepare(self, adapter: Adapter) -> FlatAdapter:
        return self.prepare_in(adapter, self._peers.allocate)

    def prepare_in(self, adapter: Adapter, allocate: Callable[[int], MappableMemory]) -> FlatAdapter:
        """The same in the memory that `allocate` gives."""
        if adapter.rank > self._max_rank:
            raise AdapterError(f"the adapter has rank {adapter.rank}, more than --max-lora-rank {self._max_rank}")
        memories: list[MappableMemory] = []

        def tensor_of(size_bytes: int) -> torch.Tensor:
            memories.append(allocate(size_bytes))
            return memories[0].tensor

        _, directory = flatten(adapter, self._dtype, tensor_of)
        return FlatAdapter(memories[0], directory)

    def received(self, directory: Directory, data: bytearray) -> FlatAdapter:
        """The one that lies so in `data`, prepared by a process of another host. AdapterError if it does not."""
        memory = self._peers.allocate(len(data))
        memory.tensor[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
        try:
            view(memory.tensor[: len(data)], self._dtype, directory)
        except (RuntimeError, IndexError, TypeError) as error:
            raise AdapterError(f"{len(data)} bytes are not the adapter that they should be: {error}") from None
        return FlatAdapter(memory, directory)

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        if not isinstance(adapter, FlatAdapter):
            raise InvariantBroken("an adapter that was not prepared here")
        self._peers.fill(slot, adapter.memory, adapter.directory)
        self.take(FilledSlot(slot, adapter.memory.tensor, adapter.directory))
        return FILLED

    def take(self, filled: FilledSlot) -> None:
        """Another rank than 0 does only this."""
        adapter = view(filled.tensor, self._dtype, filled.directory)
        share = share_of(adapter, self._config, self._peers.rank)
        layers = tuple(
            {name: found for name, shape in shapes.items() if (found := _placed(layer.product(name), shape.outputs))}
            for layer, shapes in zip(share.layers[self._layers.start : self._layers.stop], self._products, strict=True)
        )
        head = _placed(share.lm_head, (self._config.vocab_size,))
        wholes = share.whole_embedding, share.whole_head, share.norms
        self._slots[filled.slot] = CpuAdapter(layers, share.embedding, head, *wholes)

    def rows(self, slots: np.ndarray) -> RowAdapters:
        """Of rows with these slots, NO_SLOT for none."""
        groups = []
        for slot in np.unique(slots[slots != NO_SLOT]).tolist():
            adapter = self._slots[slot]
            if adapter is None:
                raise InvariantBroken(f"a row names slot {slot}, which has no adapter")
            groups.append((adapter, torch.from_numpy(np.flatnonzero(slots == slot))))
        return RowAdapters(tuple(groups))


def _placed(parts: Parts, outputs: Sequence[int]) -> tuple[PlacedPair, ...]:
    """outputs: of each part of the product."""
    firsts = np.cumsum((0, *outputs)).tolist()
    pairs = [(part, first) for part, first in zip(parts, firsts, strict=False) if part is not None]
    return tuple(PlacedPair(part.a, part.b, first, part.row_scale) for part, first in pairs)
