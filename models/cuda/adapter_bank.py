"""Slots of adapters on a GPU: how an adapter of the host gets where `adapter_layout` has it.

A slot is one piece of memory, and a prepared adapter its image in pinned memory, so that a fill is one copy on a stream
beside the steps. Which adapter a slot has, and when it may be filled, is the worker's part (models.adapters.slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from baton.kernels.triton.low_rank import RANK_STEP, BankSite
from baton.models.adapters.adapter import (
    ALL_PRODUCTS,
    EXPERT_PRODUCTS,
    ROUTER_PRODUCTS,
    Adapter,
    LowRank,
    Parts,
)
from baton.models.cuda.adapter_layout import BankShape
from baton.models.cuda.queue import Queue, QueueMark, aligned, copy_async
from baton.node.errors import AdapterError, InvariantBroken


class BankImage:
    """A PreparedAdapter: what a slot takes, in memory that is copied without waiting."""

    def __init__(
        self,
        numbers: torch.Tensor,
        ranks: torch.Tensor,
        flags: torch.Tensor | None,
        wholes: Sequence[tuple[int, torch.Tensor]],
        scales: torch.Tensor | None,
    ) -> None:
        self.numbers = numbers  # [elements in use]
        self.ranks = ranks  # int32 [sites]
        self.flags = flags  # int32 [flags]; None: slots have no room for whole weights
        self.wholes = wholes  # these, flat, and the first element of each
        self.scales = scales  # float32 [outputs]; None: slots have no room for them

    @property
    def size_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.numbers.nbytes + self.ranks.nbytes + scales + sum(whole.nbytes for _, whole in self.wholes)


@dataclass(frozen=True, slots=True)
class BankFill:
    """A Fill: a copy on its way."""

    mark: QueueMark

    @property
    def done(self) -> bool:
        return self.mark.passed


class BankSlots:
    """AdapterSlots of a GPU."""

    def __init__(self, shape: BankShape, copies: Queue, memory: torch.Tensor | None = None) -> None:
        """copies: a stream beside that of the steps. memory: as BankShape has it, which another process may have made;
        None: it is allocated."""
        self.num_slots, self.max_rank = shape.num_slots, shape.max_rank
        if memory is None:
            memory = torch.zeros(shape.size_bytes, dtype=torch.uint8, device=copies.device)
        self.bank, self.wholes = shape.bank(memory), shape.whole_weights(memory)
        self._layout, self._whole_shape, self._copies = shape.layout, shape.wholes, copies

    @property
    def size_bytes(self) -> int:
        scales, wholes = self.bank.scales, self.wholes
        return (
            self.bank.numbers.nbytes
            + (0 if wholes is None else wholes.numbers.nbytes)
            + (0 if scales is None else scales.nbytes)
        )

    def prepare(self, adapter: Adapter) -> BankImage:
        """As AdapterSlots says."""
        of_vocabulary = adapter.embedding is not None or bool(adapter.lm_head)
        if of_vocabulary and self._layout.vocabulary is None:
            raise AdapterError(
                "has a low-rank pair, or rows of tokens, of the embedding or the head, for which slots on a GPU have "
                "room with --lora-room vocabulary"
            )
        if adapter.wholes and self._whole_shape is None:
            raise AdapterError(
                "has an embedding, a head or norms of its own (modules_to_save), for which slots on a GPU have room "
                "with --lora-room modules_to_save"
            )
        if self.bank.scales is None and any(pair.row_scale is not None for pair in adapter.pairs):
            raise AdapterError("has magnitudes (DoRA), for which slots on a GPU have room with --lora-room dora")
        experts = _expert_bytes(adapter, self.bank.numbers.dtype)
        if experts and not any(self._layout.experts):
            raise AdapterError(
                f"adapts routed experts, for which slots on a GPU have room with --lora-room experts: their pairs are "
                f"{experts:,} bytes, a slot has {self.bank.numbers[0].nbytes:,} now"
            )
        for module, (number, product) in self._layout.without.items():
            if adapter.layers[number].product(product):
                option = "--lora-room routers" if product in ROUTER_PRODUCTS else "--lora-room kv_b_proj"
                raise AdapterError(f"adapts {module}, for which slots on a GPU have room with {option}")
        if adapter.rank > self.max_rank:
            raise AdapterError(f"has rank {adapter.rank}, more than --max-lora-rank {self.max_rank}")
        rank = max(RANK_STEP, aligned(adapter.rank, RANK_STEP))
        layout = self._layout
        used = layout.vocabulary_end if of_vocabulary else layout.layers_size
        numbers = self._host_memory(rank * (layout.unit_size if experts else used))
        ranks = self._copies.host_buffer(layout.num_sites)
        for index, layer in enumerate(adapter.layers):
            sites = {**layout.sites[index], **layout.experts[index]}
            for name in ALL_PRODUCTS:
                parts = layer.product(name)
                if any(part is not None for part in parts):
                    if name not in sites:
                        raise AdapterError(f"adapts {name} of layer {index}, which no kernel here does")
                    ranks[sites[name].number] = rank
                    _put(parts, sites[name], rank, numbers)
        if layout.vocabulary is not None:
            embedding, head = layout.vocabulary
            if adapter.embedding is not None:
                ranks[embedding.number] = rank
                _put_embedding(adapter.embedding, embedding, rank, numbers)
            if adapter.lm_head:
                ranks[head.number] = rank
                _put(adapter.lm_head, head, rank, numbers)
        flags, wholes = self._wholes_of(adapter)
        for each in (numbers, *(whole for _, whole in wholes)):
            if not torch.isfinite(each).all():  # they would reach other rows of a tile
                raise AdapterError(f"has numbers that are not finite in {numbers.dtype}")
        return BankImage(numbers, ranks, flags, wholes, self._scales_of(adapter))

    def _scales_of(self, adapter: Adapter) -> torch.Tensor | None:
        """1 where it scales nothing."""
        if self.bank.scales is None:
            return None
        layout, scales = self._layout, self._copies.host_buffer(self._layout.num_outputs).view(torch.float32)
        scales.fill_(1.0)
        scaled = [
            (site, layer.product(name))
            for sites, layer in zip(layout.sites, adapter.layers, strict=True)
            for name, site in sites.items()
        ]
        if layout.vocabulary is not None:
            scaled.append((layout.vocabulary.head, adapter.lm_head))
        for site, parts in scaled:
            own = scales[site.first_output : site.first_output + site.ends[-1]]
            for part, of_part in zip(parts, _cut(own, site.ends), strict=False):
                if part is not None and part.row_scale is not None:
                    of_part.copy_(part.row_scale)
        return scales

    def _wholes_of(self, adapter: Adapter) -> tuple[torch.Tensor | None, list[tuple[int, torch.Tensor]]]:
        """Flags, and the weights in memory of the host that is copied without waiting."""
        if self._whole_shape is None:
            return None, []
        flags, wholes = self._copies.host_buffer(self._whole_shape.num_flags), []
        for flag, (first, own) in self._whole_shape.places(adapter).items():
            flags[flag] = 1
            wholes.append((first, self._host_memory(own.numel())))
            wholes[-1][1].copy_(own.flatten())
        return flags, wholes

    def fill(self, slot: int, adapter: object) -> BankFill:
        """As AdapterSlots says."""
        if not isinstance(adapter, BankImage) or not 0 <= slot < self.num_slots:
            raise InvariantBroken(f"slot {slot} of {self.num_slots} is to be filled with {type(adapter).__name__}")
        numbers, ranks = self.bank.numbers[slot, : len(adapter.numbers)], self.bank.ranks[slot]
        self._copies.enqueue(partial(copy_async, numbers, adapter.numbers))
        self._copies.enqueue(partial(copy_async, ranks, adapter.ranks))
        if self.wholes is not None and adapter.flags is not None:
            self._copies.enqueue(partial(copy_async, self.wholes.flags[slot], adapter.flags))
            for first, whole in adapter.wholes:
                target = self.wholes.numbers[slot, first : first + len(whole)]
                self._copies.enqueue(partial(copy_async, target, whole))
        if self.bank.scales is not None and adapter.scales is not None:
            self._copies.enqueue(partial(copy_async, self.bank.scales[slot], adapter.scales))
        return BankFill(self._copies.mark())

    def _host_memory(self, count: int) -> torch.Tensor:
        dtype = self.bank.numbers.dtype
        return self._copies.host_buffer(-(-count * dtype.itemsize // 4)).view(dtype)[:count]


def _expert_bytes(adapter: Adapter, dtype: torch.dtype) -> int:
    """Of all pairs of routed experts."""
    parts = (part for layer in adapter.layers for name in EXPERT_PRODUCTS for part in layer.product(name))
    tensors = {id(tensor): tensor for part in parts if part is not None for tensor in part.tensors}
    return sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize


def _put(parts: Parts, site: BankSite, rank: int, numbers: torch.Tensor) -> None:
    """Into an image that is zero; of routed experts pairs of all that the rank holds."""
    k, n = site.inputs, site.ends[-1]
    count = (site.b_offset - site.a_offset) // (len(parts) * k)
    a = numbers[rank * site.a_offset :][: count * len(parts) * rank * k].view(count, len(parts), rank, k)
    b = numbers[rank * site.b_offset :][: count * n * rank].view(count, n, rank)
    for part, of_a, begin, end in zip(parts, a.unbind(1), (0, *site.ends), site.ends, strict=False):
        if part is not None:
            of_a[:, : part.rank] = part.a
            b[:, begin:end, : part.rank] = part.b


def _put_embedding(pair: LowRank, site: BankSite, rank: int, numbers: torch.Tensor) -> None:
    """The same, with A by tokens."""
    num_tokens, hidden = site.inputs, site.ends[-1]
    numbers[rank * site.a_offset :][: num_tokens * rank].view(num_tokens, rank)[:, : pair.rank] = pair.a.t()
    numbers[rank * site.b_offset :][: hidden * rank].view(hidden, rank)[:, : pair.rank] = pair.b


def _cut(b: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
    return [b[begin:end] for begin, end in zip((0, *ends[:-1]), ends, strict=True)]
