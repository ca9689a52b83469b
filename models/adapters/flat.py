"""An adapter in one piece of memory, which all processes that share a model can map: numbers, and where they lie.

Tensors lie behind one another in one dtype, each on a boundary of 64 bytes; one that several pairs share is there once.
How the memory gets from one process to another is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import torch

from baton.models.adapters.adapter import ALL_PRODUCTS, Adapter, LayerAdapter, LowRank, Parts
from baton.node.errors import AdapterError

ALIGNMENT = 64
EMBEDDING, LM_HEAD = "embedding", "lm_head"
"""In the place of a product of a layer."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A tensor: its first byte, and its shape."""

    offset: int
    shape: tuple[int, ...]


class PairPlace(msgspec.Struct, frozen=True, array_like=True):
    """A pair of one of the parts of a product."""

    layer: int
    product: str
    part: int
    num_parts: int
    a: Span
    b: Span
    row_scale: Span | None


class Directory(msgspec.Struct, frozen=True, array_like=True):
    """Where an adapter lies in its memory."""

    digest: bytes
    num_layers: int
    pairs: tuple[PairPlace, ...]
    whole_embedding: Span | None
    whole_head: Span | None
    norms: dict[int, Span]


class _Layout:
    """Gives each tensor its place."""

    def __init__(self, element_bytes: int) -> None:
        self._element_bytes = element_bytes
        self.spans: dict[int, tuple[Span, torch.Tensor]] = {}
        self.size_bytes = 0

    def span(self, tensor: torch.Tensor) -> Span:
        if id(tensor) not in self.spans:
            self.spans[id(tensor)] = Span(self.size_bytes, tuple(tensor.shape)), tensor
            end = self.size_bytes + tensor.numel() * self._element_bytes
            self.size_bytes = -(-end // ALIGNMENT) * ALIGNMENT
        return self.spans[id(tensor)][0]

    def maybe(self, tensor: torch.Tensor | None) -> Span | None:
        return None if tensor is None else self.span(tensor)


def flatten(
    adapter: Adapter, dtype: torch.dtype, allocate: Callable[[int], torch.Tensor]
) -> tuple[torch.Tensor, Directory]:
    """The adapter in this dtype, in what `allocate` gives for a number of bytes: uint8 of at least so many. Raises
    AdapterError for numbers that the dtype does not have."""
    layout = _Layout(dtype.itemsize)
    pairs = tuple(
        PairPlace(layer, product, part, count, layout.span(pair.a), layout.span(pair.b), layout.maybe(pair.row_scale))
        for layer, product, part, count, pair in _places(adapter)
    )
    wholes = layout.maybe(adapter.whole_embedding), layout.maybe(adapter.whole_head)
    norms = {number: layout.span(norm) for number, norm in adapter.norms.items()}
    memory = allocate(max(1, layout.size_bytes))
    for span, tensor in layout.spans.values():
        placed = _tensor(memory, dtype, span)
        placed.copy_(tensor)
        if not torch.isfinite(placed).all():
            raise AdapterError(f"numbers of the adapter are too large for {dtype}")
    return memory, Directory(adapter.digest, len(adapter.layers), pairs, *wholes, norms)


def view(memory: torch.Tensor, dtype: torch.dtype, directory: Directory) -> Adapter:
    """The adapter that lies in `memory`, uint8, without a copy."""
    layers: list[dict[str, list[LowRank | None]]] = [{} for _ in range(directory.num_layers)]
    apart: dict[str, LowRank] = {}
    for place in directory.pairs:
        a, b = _tensor(memory, dtype, place.a), _tensor(memory, dtype, place.b)
        pair = LowRank(a, b, _maybe(memory, dtype, place.row_scale))
        if place.product in (EMBEDDING, LM_HEAD):
            apart[place.product] = pair
        else:
            empty: list[LowRank | None] = [None] * place.num_parts
            layers[place.layer].setdefault(place.product, empty)[place.part] = pair
    head: Parts = (apart[LM_HEAD],) if LM_HEAD in apart else ()
    made = tuple(LayerAdapter(**{product: tuple(parts) for product, parts in layer.items()}) for layer in layers)
    norms = {number: _tensor(memory, dtype, span) for number, span in directory.norms.items()}
    return Adapter(
        directory.digest,
        made,
        apart.get(EMBEDDING),
        head,
        whole_embedding=_maybe(memory, dtype, directory.whole_embedding),
        whole_head=_maybe(memory, dtype, directory.whole_head),
        norms=norms,
    )


def _places(adapter: Adapter) -> Iterable[tuple[int, str, int, int, LowRank]]:
    """Layer, product, number of the part, number of parts, pair."""
    for index, layer in enumerate(adapter.layers):
        for product in ALL_PRODUCTS:
            parts = layer.product(product)
            for part, pair in enumerate(parts):
                if pair is not None:
                    yield index, product, part, len(parts), pair
    for product, parts in ((EMBEDDING, (adapter.embedding,)), (LM_HEAD, adapter.lm_head)):
        for part, pair in enumerate(parts):
            if pair is not None:
                yield 0, product, part, 1, pair


def _maybe(memory: torch.Tensor, dtype: torch.dtype, span: Span | None) -> torch.Tensor | None:
    return None if span is None else _tensor(memory, dtype, span)


def _tensor(memory: torch.Tensor, dtype: torch.dtype, span: Span) -> torch.Tensor:
    size_bytes = torch.Size(span.shape).numel() * dtype.itemsize
    return memory[span.offset : span.offset + size_bytes].view(dtype).view(span.shape)
