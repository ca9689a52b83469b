"""Where a slot of adapters on a GPU has which matrix, and how much memory slots take. No adapter, no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from baton.kernels.triton.low_rank import RANK_STEP, AdapterBank, BankSite
from baton.kernels.triton.whole_weights import EMBEDDING, FIRST_NORM, HEAD, WholeWeights
from baton.models.adapters.adapter import (
    ROUTER_PRODUCTS,
    AdaptedProduct,
    Adapter,
    expert_products,
    latent_products,
    layer_products,
    router_products,
)
from baton.models.adapters.modules import optional_modules
from baton.models.config import ModelConfig
from baton.models.cuda.queue import aligned
from baton.models.layers import ExpertsMlp, describe
from baton.models.partition import WHOLE, Rank
from baton.node.errors import SettingsError

MOST_RANK = 256


class VocabularySites(NamedTuple):
    """Of pairs of the embedding and the head."""

    embedding: BankSite
    """Its inputs are the vocabulary; of A a slot has the transpose."""
    head: BankSite


@dataclass(frozen=True, slots=True)
class BankLayout:
    """Where a model's products have their matrices in a slot."""

    sites: tuple[Mapping[str, BankSite], ...]
    """By layer and by the names of PRODUCTS, and of LATENT_PRODUCTS and ROUTER_PRODUCTS where slots have room for
    them."""
    vocabulary: VocabularySites | None
    """None: slots have no room for them."""
    experts: tuple[Mapping[str, BankSite], ...]
    """By layer and by the names of EXPERT_PRODUCTS, of one expert: A of all that the rank holds, then B of all. Empty
    where slots have no room for them."""
    layers_size: int
    """Elements of a slot for each unit of rank, but those of `vocabulary` and of `experts`, which lie behind."""
    vocabulary_end: int
    """With those of `vocabulary`."""
    unit_size: int
    """Elements of a slot for each unit of rank."""
    num_outputs: int
    """Of all products, each padded to a multiple of RANK_STEP."""
    without: Mapping[str, tuple[int, str]]
    """Modules that slots have no room for: layer and product of each, by name."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rank: Rank = WHOLE,
        *,
        vocabulary: bool = False,
        latents: bool = False,
        routers: bool = False,
        experts: bool = False,
    ) -> BankLayout:
        """rank: whose part of the products. vocabulary: with room for pairs of the embedding and the head. latents: of
        what makes keys and values of latents. routers: of routers and gates of shared experts. experts: of routed
        experts. SettingsError for products that the kernels do not take."""
        layers, end, count, outputs = [], 0, 0, 0
        for shape in describe(config, rank):
            sites, products = {}, layer_products(shape, config.hidden_size)
            if latents:
                products |= latent_products(shape)
            if routers:
                products |= router_products(shape, config.hidden_size)
            for name, product in products.items():
                k, ends = _sizes(name, product)
                sites[name] = BankSite(count, end, end + len(ends) * k, k, ends, outputs)
                end += len(ends) * k + ends[-1]
                count += 1
                outputs += aligned(ends[-1], RANK_STEP)
            layers.append(sites)
        layers_size, hidden, vocab_sites = end, config.hidden_size, None
        if vocabulary:
            if hidden % RANK_STEP:
                raise SettingsError(
                    f"--lora-room vocabulary: the hidden size must be a multiple of {RANK_STEP}, it is {hidden}"
                )
            tokens, logits = config.vocab_size, len(rank.vocabulary(config.vocab_size))
            behind = end + tokens + hidden
            embedding = BankSite(count, end, end + tokens, tokens, (hidden,))
            head = BankSite(count + 1, behind, behind + hidden, hidden, (logits,), outputs)
            vocab_sites = VocabularySites(embedding, head)
            outputs += logits
            count += 2
            end = behind + hidden + logits
        vocabulary_end, of_experts = end, []
        for shape in describe(config, rank):
            sites = {}
            if experts and isinstance(shape.mlp, ExpertsMlp):
                held = len(shape.mlp.experts)
                for name, product in expert_products(shape, hidden).items():
                    k, ends = _sizes(name, product)
                    sites[name] = BankSite(count, end, end + held * len(ends) * k, k, ends)
                    end += held * (len(ends) * k + ends[-1])
                    count += 1
            of_experts.append(sites)
        without = {
            module: (place.layer, place.product)
            for module, place in optional_modules(config).items()
            if place.product not in layers[place.layer]
        }
        sizes = layers_size, vocabulary_end, end, outputs
        return cls(tuple(layers), vocab_sites, tuple(of_experts), *sizes, without)

    @property
    def num_sites(self) -> int:
        return sum(map(len, (*self.sites, *self.experts))) + len(self.vocabulary or ())


def _sizes(name: str, product: AdaptedProduct) -> tuple[int, tuple[int, ...]]:
    """Inputs, and where the outputs of each part end."""
    k, ends = product.num_inputs, tuple(accumulate(product.outputs))
    if any(size % RANK_STEP for size in (k, *(() if name in ROUTER_PRODUCTS else ends))):
        raise SettingsError(
            f"--max-loras: on a GPU the sizes of adapted products must be multiples of {RANK_STEP}, "
            f"those of {name} are {k} and {list(product.outputs)}"
        )
    return k, ends


@dataclass(frozen=True, slots=True)
class WholeShape:
    """What a slot has room for beside its matrices: an embedding, a head and norms in place of the model's."""

    vocab_size: int
    head_rows: int
    hidden_size: int
    num_norms: int

    @classmethod
    def of(cls, config: ModelConfig, rank: Rank = WHOLE) -> WholeShape:
        """rank: whose part of the head. SettingsError for sizes that the kernels do not take."""
        if config.hidden_size % RANK_STEP:
            raise SettingsError(
                f"--lora-room modules_to_save: on a GPU the hidden size must be a multiple of {RANK_STEP}, it is "
                f"{config.hidden_size}"
            )
        head_rows = len(rank.vocabulary(config.vocab_size))
        return cls(config.vocab_size, head_rows, config.hidden_size, 2 * config.num_layers + 1)

    @property
    def size(self) -> int:
        """Elements of a slot."""
        return (self.vocab_size + self.head_rows + self.num_norms) * self.hidden_size

    @property
    def num_flags(self) -> int:
        return FIRST_NORM + self.num_norms

    def places(self, adapter: Adapter) -> dict[int, tuple[int, torch.Tensor]]:
        """By flag what an adapter has, and the first element that it takes of a slot."""
        found = {FIRST_NORM + number: norm for number, norm in adapter.norms.items()}
        if adapter.whole_embedding is not None:
            found[EMBEDDING] = adapter.whole_embedding
        if adapter.whole_head is not None:
            found[HEAD] = adapter.whole_head
        head, norms = self.vocab_size, self.vocab_size + self.head_rows - FIRST_NORM
        firsts = {EMBEDDING: 0, HEAD: head}
        return {flag: (firsts.get(flag, norms + flag) * self.hidden_size, own) for flag, own in found.items()}


@dataclass(frozen=True, slots=True)
class BankShape:
    """The slots of a runner."""

    layout: BankLayout
    num_slots: int
    max_rank: int
    dtype: torch.dtype
    wholes: WholeShape | None = None
    """None: adapters bring no whole weights."""
    magnitudes: bool = False
    """Whether adapters scale what the model's own products make (DoRA)."""

    def __post_init__(self) -> None:
        """SettingsError for a rank for which products have no registers."""
        if self.max_rank > MOST_RANK:
            raise SettingsError(f"--max-lora-rank {self.max_rank}: on a GPU at most {MOST_RANK}")

    @property
    def size_bytes(self) -> int:
        wholes = self.wholes
        integers = self.layout.num_sites + (0 if wholes is None else wholes.num_flags)
        return self._scales_end + self.num_slots * integers * torch.int32.itemsize

    def bank(self, memory: torch.Tensor) -> AdapterBank:
        """In this memory, uint8 [size_bytes], which is zero where no slot was filled yet."""
        widest = RANK_STEP  # as kernels hold ranks: a power of two
        while widest < self.max_rank:
            widest *= 2
        numbers, ranks = memory[: self._numbers_bytes], self._integers(memory)[: self._num_ranks]
        shaped, scales = numbers.view(self.dtype).view(self.num_slots, -1), None
        if self.magnitudes:
            scales = memory[self._wholes_end : self._scales_end].view(torch.float32).view(self.num_slots, -1)
        return AdapterBank(shaped, ranks.view(self.num_slots, -1), widest, scales)

    def whole_weights(self, memory: torch.Tensor) -> WholeWeights | None:
        """In the same memory."""
        if (wholes := self.wholes) is None:
            return None
        numbers = memory[self._numbers_bytes : self._wholes_end].view(self.dtype)
        flags = self._integers(memory)[self._num_ranks :].view(self.num_slots, -1)
        shaped = numbers.view(self.num_slots, -1)
        return WholeWeights(shaped, flags, wholes.vocab_size, wholes.head_rows, wholes.hidden_size)

    def _integers(self, memory: torch.Tensor) -> torch.Tensor:
        """Ranks of all slots, then flags of all."""
        return memory[self._scales_end : self.size_bytes].view(torch.int32)

    @property
    def _num_ranks(self) -> int:
        return self.num_slots * self.layout.num_sites

    @property
    def _wholes_end(self) -> int:
        size = 0 if self.wholes is None else self.wholes.size
        return self._numbers_bytes + self.num_slots * size * self.dtype.itemsize

    @property
    def _scales_end(self) -> int:
        count = self.layout.num_outputs if self.magnitudes else 0
        return self._wholes_end + self.num_slots * count * torch.float32.itemsize

    @property
    def _numbers_bytes(self) -> int:
        return self.num_slots * aligned(self.max_rank, RANK_STEP) * self.layout.unit_size * self.dtype.itemsize
