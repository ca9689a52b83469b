"""Adapters on the CPU: the slots of a runner, and what they add to the products of some rows.

    y[rows, outputs] = row_scale * y[rows, outputs] + (x[rows] a^T) b^T

An adapter may bring an embedding and a head of its own, which are read in place of the model's.

Rows without an adapter are computed as in a step without adapters, bit for bit: the product itself is of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from baton.models.adapters.adapter import Adapter, LowRank, Parts, adapted_products
from baton.models.adapters.slots import Fill, PreparedAdapter
from baton.models.config import ModelConfig
from baton.node.errors import AdapterError, InvariantBroken

NO_SLOT = -1
"""Of a row without an adapter, in an array of slots."""


class PlacedPair(NamedTuple):
    """A pair, and the first of the product's outputs that it adds to."""

    a: torch.Tensor  # [rank, inputs]
    b: torch.Tensor  # [outputs, rank]
    first_output: int
    row_scale: torch.Tensor | None  # [outputs]

    def add(self, rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        end = self.first_output + self.b.shape[0]
        if self.row_scale is not None:
            y[rows, self.first_output : end] *= self.row_scale
        y[rows, self.first_output : end] += (x[rows] @ self.a.t()) @ self.b.t()


@dataclass(frozen=True, slots=True, eq=False)
class CpuAdapter:
    """An adapter in the model's dtype; a product that it leaves alone is not there."""

    layers: tuple[dict[str, tuple[PlacedPair, ...]], ...]
    embedding: LowRank | None
    lm_head: tuple[PlacedPair, ...]
    whole_embedding: torch.Tensor | None  # [vocab, hidden]
    whole_head: torch.Tensor | None  # [vocab, hidden]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """Which rows of a tensor are computed with which adapters."""

    groups: tuple[tuple[CpuAdapter, torch.Tensor], ...] = ()
    """Adapters, and of each the numbers of its rows."""

    def add(self, layer: int, product: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y [N, outputs], with what the adapters add to the layer's product of x [N, inputs]."""
        for adapter, rows in self.groups:
            for pair in adapter.layers[layer].get(product, ()):
                pair.add(rows, x, y)
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

    def __init__(self, config: ModelConfig, dtype: torch.dtype, num_slots: int = 0, max_rank: int = 0) -> None:
        self.num_slots = num_slots
        self._config, self._dtype, self._max_rank = config, dtype, max_rank
        self._slots: list[CpuAdapter | None] = [None] * num_slots

    def prepare(self, adapter: Adapter) -> CpuAdapter:
        if adapter.rank > self._max_rank:
            raise AdapterError(f"the adapter has rank {adapter.rank}, more than --max-lora-rank {self._max_rank}")
        cast: dict[int, torch.Tensor] = {}
        for tensor in (*(each for pair in adapter.pairs for each in pair.tensors), *adapter.wholes):
            if id(tensor) not in cast:
                cast[id(tensor)] = self._cast(tensor)

        def placed(parts: Parts, outputs: Sequence[int]) -> tuple[PlacedPair, ...]:
            firsts = np.cumsum((0, *outputs)).tolist()
            pairs = [(part, first) for part, first in zip(parts, firsts, strict=False) if part is not None]
            return tuple(
                PlacedPair(
                    cast[id(part.a)],
                    cast[id(part.b)],
                    first,
                    None if part.row_scale is None else cast[id(part.row_scale)],
                )
                for part, first in pairs
            )

        layers = tuple(
            {name: found for name, shape in shapes.items() if (found := placed(layer.product(name), shape.outputs))}
            for layer, shapes in zip(adapter.layers, adapted_products(self._config), strict=True)
        )
        embedding = adapter.embedding
        if embedding is not None:
            embedding = LowRank(cast[id(embedding.a)], cast[id(embedding.b)])
        whole_embedding, whole_head = (
            None if each is None else cast[id(each)] for each in (adapter.whole_embedding, adapter.whole_head)
        )
        lm_head = placed(adapter.lm_head, (self._config.vocab_size,))
        size_bytes = sum(each.nbytes for each in cast.values())
        return CpuAdapter(layers, embedding, lm_head, whole_embedding, whole_head, size_bytes)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.to(self._dtype).contiguous()
        if not torch.isfinite(found).all():
            raise AdapterError(f"numbers of the adapter are too large for {self._dtype}")
        return found

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        if not isinstance(adapter, CpuAdapter):
            raise InvariantBroken("an adapter that was not prepared here")
        self._slots[slot] = adapter
        return FILLED

    def rows(self, slots: np.ndarray) -> RowAdapters:
        """Of rows with these slots, NO_SLOT for none."""
        groups = []
        for slot in np.unique(slots[slots != NO_SLOT]).tolist():
            adapter = self._slots[slot]
            if adapter is None:
                raise InvariantBroken(f"a row names slot {slot}, which has no adapter")
            groups.append((adapter, torch.from_numpy(np.flatnonzero(slots == slot))))
        return RowAdapters(tuple(groups))
