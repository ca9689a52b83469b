"""Slots of adapters on a GPU: where each matrix lies, and how an adapter of the host gets there.

A slot is one piece of memory, and a prepared adapter its image in pinned memory, so that a fill is one copy on a stream
beside the steps. Which adapter a slot has, and when it may be filled, is the worker's part (models.adapters.slots).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from baton.kernels.triton.low_rank import RANK_STEP, AdapterBank, BankSite
from baton.models.adapters.adapter import PRODUCTS, Adapter, Parts, layer_products
from baton.models.config import ModelConfig
from baton.models.cuda.queue import Queue, QueueMark, aligned, copy_async
from baton.models.layers import describe
from baton.models.partition import WHOLE, Rank
from baton.node.errors import AdapterError, InvariantBroken, SettingsError

MOST_RANK = 256


@dataclass(frozen=True, slots=True)
class BankLayout:
    """Where a model's products have their matrices in a slot."""

    sites: tuple[Mapping[str, BankSite], ...]
    """By layer and by the names of PRODUCTS."""
    unit_size: int
    """Elements of a slot for each unit of rank."""

    @classmethod
    def of(cls, config: ModelConfig, rank: Rank = WHOLE) -> BankLayout:
        """rank: whose part of the products. SettingsError for those that the kernels do not take."""
        layers, end, count = [], 0, 0
        for shape in describe(config, rank):
            sites = {}
            for name, product in layer_products(shape, config.hidden_size).items():
                k, ends = product.num_inputs, tuple(accumulate(product.outputs))
                if any(size % RANK_STEP for size in (k, *ends)):
                    raise SettingsError(
                        f"--max-loras: on a GPU the sizes of adapted products must be multiples of {RANK_STEP}, "
                        f"those of {name} are {k} and {list(product.outputs)}"
                    )
                sites[name] = BankSite(count, end, end + len(ends) * k, k, ends)
                end += len(ends) * k + ends[-1]
                count += 1
            layers.append(sites)
        return cls(tuple(layers), end)

    @property
    def num_sites(self) -> int:
        return sum(map(len, self.sites))


@dataclass(frozen=True, slots=True)
class BankShape:
    """The slots of a runner."""

    layout: BankLayout
    num_slots: int
    max_rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """SettingsError for a rank for which products have no registers."""
        if self.max_rank > MOST_RANK:
            raise SettingsError(f"--max-lora-rank {self.max_rank}: on a GPU at most {MOST_RANK}")

    @property
    def size_bytes(self) -> int:
        return self._numbers_bytes + self.num_slots * self.layout.num_sites * torch.int32.itemsize

    def bank(self, memory: torch.Tensor) -> AdapterBank:
        """In this memory, uint8 [size_bytes], which is zero where no slot was filled yet."""
        widest = RANK_STEP  # as kernels hold ranks: a power of two
        while widest < self.max_rank:
            widest *= 2
        numbers, ranks = memory[: self._numbers_bytes], memory[self._numbers_bytes : self.size_bytes]
        shaped = numbers.view(self.dtype).view(self.num_slots, -1)
        return AdapterBank(shaped, ranks.view(torch.int32).view(self.num_slots, -1), widest)

    @property
    def _numbers_bytes(self) -> int:
        return self.num_slots * aligned(self.max_rank, RANK_STEP) * self.layout.unit_size * self.dtype.itemsize


class BankImage:
    """A PreparedAdapter: what a slot takes, in memory that is copied without waiting."""

    def __init__(self, numbers: torch.Tensor, ranks: torch.Tensor) -> None:
        self.numbers = numbers  # [elements in use]
        self.ranks = ranks  # int32 [sites]

    @property
    def size_bytes(self) -> int:
        return self.numbers.nbytes + self.ranks.nbytes


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
        self.bank = shape.bank(memory)
        self._layout, self._copies = shape.layout, copies

    @property
    def size_bytes(self) -> int:
        return self.bank.numbers.nbytes

    def prepare(self, adapter: Adapter) -> BankImage:
        """As AdapterSlots says."""
        if adapter.embedding is not None or adapter.lm_head or adapter.wholes:
            raise AdapterError("adapts the embedding, the head or norms, which only a CPU computes with adapters")
        if any(pair.row_scale is not None for pair in adapter.pairs):
            raise AdapterError("has magnitudes (DoRA), which only a CPU computes with")
        if adapter.rank > self.max_rank:
            raise AdapterError(f"has rank {adapter.rank}, more than --max-lora-rank {self.max_rank}")
        rank = max(RANK_STEP, aligned(adapter.rank, RANK_STEP))
        numbers = self._host_memory(rank * self._layout.unit_size)
        ranks = self._copies.host_buffer(self._layout.num_sites)
        for index, (sites, layer) in enumerate(zip(self._layout.sites, adapter.layers, strict=True)):
            for name in PRODUCTS:
                parts = layer.product(name)
                if any(part is not None for part in parts):
                    if name not in sites:
                        raise AdapterError(f"adapts {name} of layer {index}, which no kernel here does")
                    ranks[sites[name].number] = rank
                    _put(parts, sites[name], rank, numbers)
        if not torch.isfinite(numbers).all():  # they would reach other rows of a tile
            raise AdapterError(f"has numbers that are not finite in {numbers.dtype}")
        return BankImage(numbers, ranks)

    def fill(self, slot: int, adapter: object) -> BankFill:
        """As AdapterSlots says."""
        if not isinstance(adapter, BankImage) or not 0 <= slot < self.num_slots:
            raise InvariantBroken(f"slot {slot} of {self.num_slots} is to be filled with {type(adapter).__name__}")
        numbers, ranks = self.bank.numbers[slot, : len(adapter.numbers)], self.bank.ranks[slot]
        self._copies.enqueue(partial(copy_async, numbers, adapter.numbers))
        self._copies.enqueue(partial(copy_async, ranks, adapter.ranks))
        return BankFill(self._copies.mark())

    def _host_memory(self, count: int) -> torch.Tensor:
        dtype = self.bank.numbers.dtype
        return self._copies.host_buffer(-(-count * dtype.itemsize // 4)).view(dtype)[:count]


def _put(parts: Parts, site: BankSite, rank: int, numbers: torch.Tensor) -> None:
    """Into an image that is zero."""
    k, n = site.inputs, site.ends[-1]
    a = numbers[rank * site.a_offset :][: len(parts) * rank * k].view(len(parts), rank, k)
    b = numbers[rank * site.b_offset :][: n * rank].view(n, rank)
    for part, of_a, of_b in zip(parts, a, _cut(b, site.ends), strict=True):
        if part is not None:
            of_a[: part.rank] = part.a
            of_b[:, : part.rank] = part.b


def _cut(b: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
    return [b[begin:end] for begin, end in zip((0, *ends[:-1]), ends, strict=True)]
