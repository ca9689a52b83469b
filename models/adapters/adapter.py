"""An adapter on the host, in the layout of our weights: what it adds to each product of each layer.

    y = W x + b (a x)                  a [rank, inputs], b [outputs, rank]; the scaling is in b
    y = row_scale * (W x) + b (a x)    of DoRA, whose factors are in b too

Biases of the model are added behind.

Query, key and value are parts of one product here, gate and up of another (models.layer_weights); of latent attention
queries, or their latent, and the latent of keys and values, which another product makes of it. Routed experts have a
product each, whose pairs lie behind one another: a [experts, rank, inputs], b [experts, outputs, rank]. Each part of a
product's outputs has a pair of its own, or none; an adapter that was trained on a merged product has one `a` for all
its parts. Routers, and gates of shared experts, are products too, before scores are made of them. Where an adapter
comes from, and where a device keeps it, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from baton.models.config import ModelConfig
from baton.models.layers import DenseMlp, ExpertsMlp, GroupedAttention, LatentAttention, LayerShape, describe


class LowRank(NamedTuple):
    """What is added to some outputs of a product."""

    a: torch.Tensor  # [rank, inputs]; of routed experts [experts, rank, inputs]
    b: torch.Tensor  # [outputs, rank], times the scaling; of routed experts [experts, outputs, rank]
    row_scale: torch.Tensor | None = None  # [outputs]: the model's own product is multiplied by it; None: by 1

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b) if self.row_scale is None else (self.a, self.b, self.row_scale)


Parts: TypeAlias = "tuple[LowRank | None, ...]"
"""Of a product, one a part of its outputs, in the order of the outputs; None: nothing is added there."""


class AdaptedProduct(NamedTuple):
    """A product that an adapter may change."""

    num_inputs: int
    outputs: tuple[int, ...]
    """Of each part."""

    @property
    def num_outputs(self) -> int:
        return sum(self.outputs)


@dataclass(frozen=True, slots=True, eq=False)
class LayerAdapter:
    """What an adapter adds in one layer. A product that has no part in it, or cannot be changed, is ()."""

    qkv: Parts = ()  # query, key, value; of latent attention the query or its latent, and what is cached
    query: Parts = ()  # made of the query's latent
    o: Parts = ()
    gate_up: Parts = ()  # gate, up: of a dense MLP, or of the shared expert
    down: Parts = ()
    kv_up: Parts = ()  # of each head its plain key, then its value, made of their latent
    router: Parts = ()  # all routed experts, whatever ranks hold
    shared_gate: Parts = ()  # one output
    expert_gate_up: Parts = ()  # gate, up: of all routed experts
    expert_down: Parts = ()

    def product(self, name: str) -> Parts:
        """`name`: one of ALL_PRODUCTS."""
        parts: Parts = getattr(self, name)
        return parts


PRODUCTS = ("qkv", "query", "o", "gate_up", "down")
"""Of a layer, in the order in which a step computes them."""
LATENT_PRODUCTS = ("kv_up",)
"""Of a layer with latent attention, beside them."""
ROUTER_PRODUCTS = ("router", "shared_gate")
"""Of a layer with routed experts."""
EXPERT_PRODUCTS = ("expert_gate_up", "expert_down")
"""Of one routed expert."""
ALL_PRODUCTS = PRODUCTS + LATENT_PRODUCTS + ROUTER_PRODUCTS + EXPERT_PRODUCTS


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter of a model, float32, bfloat16 or float16 on the CPU."""

    digest: bytes
    """32 bytes: SHA-256 of what counts in its folder."""
    layers: tuple[LayerAdapter, ...]
    """All of the model."""
    embedding: LowRank | None = None  # a [rank, vocab], b [hidden, rank]: token t adds b a[:, t]
    lm_head: Parts = ()  # one part, [vocab, hidden]
    whole_embedding: torch.Tensor | None = None  # [vocab, hidden], in place of the model's
    whole_head: torch.Tensor | None = None  # [vocab, hidden], in place of the model's
    norms: Mapping[int, torch.Tensor] = field(default_factory=dict)  # [hidden], by models.adapters.modules.norm_numbers

    @property
    def pairs(self) -> Iterator[LowRank]:
        """All of it; pairs of one product may share their `a`."""
        for layer in self.layers:
            for name in ALL_PRODUCTS:
                yield from (part for part in layer.product(name) if part is not None)
        yield from (part for part in (self.embedding, *self.lm_head) if part is not None)

    @property
    def rank(self) -> int:
        """The largest."""
        return max((pair.rank for pair in self.pairs), default=0)

    @property
    def size_bytes(self) -> int:
        tensors = {id(tensor): tensor.nbytes for pair in self.pairs for tensor in pair.tensors}
        return sum(tensors.values()) + sum(each.nbytes for each in self.wholes)

    @property
    def wholes(self) -> tuple[torch.Tensor, ...]:
        """What is there in place of weights of the model."""
        return tuple(each for each in (self.whole_embedding, self.whole_head, *self.norms.values()) if each is not None)


def adapted_products(config: ModelConfig) -> tuple[dict[str, AdaptedProduct], ...]:
    """By the names of PRODUCTS, what adapters may change of each layer: the products of attention but the one that
    makes keys and values of latents, those of dense MLPs and of shared experts."""
    return tuple(layer_products(shape, config.hidden_size) for shape in describe(config))


def layer_products(shape: LayerShape, hidden_size: int) -> dict[str, AdaptedProduct]:
    products = {}
    attention, mlp = shape.attention, shape.mlp
    if isinstance(attention, GroupedAttention):
        query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        products["qkv"] = AdaptedProduct(hidden_size, (query, key, key))
        products["o"] = AdaptedProduct(query, (hidden_size,))
    else:
        products |= _latent_products(attention, hidden_size)
    dense = mlp if isinstance(mlp, DenseMlp) else mlp.shared
    if dense is not None:
        products["gate_up"] = AdaptedProduct(hidden_size, (dense.width, dense.width))
        products["down"] = AdaptedProduct(dense.width, (hidden_size,))
    return products


def latent_products(shape: LayerShape) -> dict[str, AdaptedProduct]:
    """By the names of LATENT_PRODUCTS, those of a layer."""
    attention = shape.attention
    if not isinstance(attention, LatentAttention):
        return {}
    dims = attention.dims
    return {"kv_up": AdaptedProduct(dims.latent_dim, (attention.num_heads * (dims.plain_dim + dims.value_dim),))}


def router_products(shape: LayerShape, hidden_size: int) -> dict[str, AdaptedProduct]:
    """By the names of ROUTER_PRODUCTS, those of a layer."""
    mlp = shape.mlp
    if not isinstance(mlp, ExpertsMlp):
        return {}
    router = {"router": AdaptedProduct(hidden_size, (mlp.routing.num_experts,))}
    return router | {"shared_gate": AdaptedProduct(hidden_size, (1,))} if mlp.shared_gated else router


def expert_products(shape: LayerShape, hidden_size: int) -> dict[str, AdaptedProduct]:
    """By the names of EXPERT_PRODUCTS, those of one routed expert of a layer; none of a dense layer."""
    if isinstance(shape.mlp, DenseMlp):
        return {}
    width = shape.mlp.width
    gate_up, down = AdaptedProduct(hidden_size, (width, width)), AdaptedProduct(width, (hidden_size,))
    return dict(zip(EXPERT_PRODUCTS, (gate_up, down), strict=True))


def _latent_products(attention: LatentAttention, hidden_size: int) -> dict[str, AdaptedProduct]:
    dims, products = attention.dims, {}
    queries = attention.num_heads * dims.query_dim
    products["qkv"] = AdaptedProduct(hidden_size, (dims.query_rank or queries, dims.row_dim))
    if dims.query_rank is not None:
        products["query"] = AdaptedProduct(dims.query_rank, (queries,))
    products["o"] = AdaptedProduct(attention.num_heads * dims.value_dim, (hidden_size,))
    return products
