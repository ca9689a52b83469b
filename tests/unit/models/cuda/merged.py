"""Random adapters of a model, and the CPU's runner of the model with one of them in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from baton.kernels import DenseLinear, ExpertLinears, Linear
from baton.models.adapters.adapter import (
    LATENT_PRODUCTS,
    PRODUCTS,
    ROUTER_PRODUCTS,
    Adapter,
    LayerAdapter,
    LowRank,
    Parts,
    adapted_products,
    expert_products,
    latent_products,
    router_products,
)
from baton.models.config import ModelConfig
from baton.models.cpu.decoder import DenseDecoder
from baton.models.cpu.runner import ModelRunner
from baton.models.layer_weights import DenseMlpWeights, LatentWeights, LayerWeights, Weights
from baton.models.layers import describe

SIZE = 0.7
"""Of what an adapter adds, against the product: so that other tokens come of it."""


def random_adapter(config: ModelConfig, ranks: Sequence[int], seed: int, without: Sequence[str] = ()) -> Adapter:
    """ranks: of the parts of each product, in turn. without: products that it leaves alone; of the first of the others
    the first part, too."""
    generator = torch.Generator().manual_seed(seed)

    def part(rank: int, inputs: int, outputs: int) -> LowRank:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        return LowRank(a / inputs**0.5, b * (SIZE / rank**0.5))

    layers = []
    for products in adapted_products(config):
        made: dict[str, Parts] = {}
        for name in PRODUCTS:
            if name in products and name not in without:
                product = products[name]
                drawn = [part(ranks[i % len(ranks)], product.num_inputs, n) for i, n in enumerate(product.outputs)]
                made[name] = tuple(drawn) if made or not without else (None, *drawn[1:])
        layers.append(LayerAdapter(**made))
    return Adapter(seed.to_bytes(32, "big"), tuple(layers))


def with_wholes(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With an embedding, a head and norms of its own; the config has two layers, or one."""
    generator = torch.Generator().manual_seed(8)
    table = config.vocab_size, config.hidden_size
    embedding, head = (torch.randn(table, generator=generator) * 0.3 for _ in range(2))
    norms = {number: 1 + torch.rand(config.hidden_size, generator=generator) for number in (1, 2 * config.num_layers)}
    return replace(adapter, whole_embedding=embedding, whole_head=head, norms=norms)


def with_vocabulary(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With pairs of the embedding and the head."""
    generator, vocab_size, hidden = torch.Generator().manual_seed(9), config.vocab_size, config.hidden_size

    def pair(rank: int, inputs: int, outputs: int, size: float) -> LowRank:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        return LowRank(a / rank**0.5, b * size)

    head = pair(5, hidden, vocab_size, 0.3 / hidden**0.5)
    return replace(adapter, embedding=pair(3, vocab_size, hidden, 0.3), lm_head=(head,))


def with_routers(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With pairs of routers and of gates of shared experts."""
    generator, layers = torch.Generator().manual_seed(12), []

    def pair(inputs: int, outputs: int) -> LowRank:
        a, b = (torch.randn(shape, generator=generator) for shape in ((5, inputs), (outputs, 5)))
        return LowRank(a / inputs**0.5, b)

    for layer, shape in zip(adapter.layers, describe(config), strict=True):
        products = router_products(shape, config.hidden_size)
        made = {name: (pair(of.num_inputs, of.num_outputs),) for name, of in products.items()}
        layers.append(replace(layer, **made))
    return replace(adapter, layers=tuple(layers))


def with_latents(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With pairs of what makes keys and values of latents."""
    generator, layers = torch.Generator().manual_seed(14), []
    for layer, shape in zip(adapter.layers, describe(config), strict=True):
        of = latent_products(shape)["kv_up"]
        a, b = (torch.randn(size, generator=generator) for size in ((6, of.num_inputs), (of.num_outputs, 6)))
        layers.append(replace(layer, kv_up=(LowRank(a / of.num_inputs**0.5, b * (SIZE / 6**0.5)),)))
    return replace(adapter, layers=tuple(layers))


def with_experts(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With pairs of routed experts; of one product's first part in layers with a number above 0 none."""
    generator, layers = torch.Generator().manual_seed(13), []

    def pairs(count: int, rank: int, inputs: int, outputs: int) -> LowRank:
        a = torch.randn(count, rank, inputs, generator=generator) / inputs**0.5
        return LowRank(a, torch.randn(count, outputs, rank, generator=generator) * (SIZE / rank**0.5))

    for number, (layer, shape) in enumerate(zip(adapter.layers, describe(config), strict=True)):
        made: dict[str, Parts] = {}
        for name, of in expert_products(shape, config.hidden_size).items():
            assert config.experts is not None
            count = config.experts.num_experts
            parts = [pairs(count, 4 + part, of.num_inputs, outputs) for part, outputs in enumerate(of.outputs)]
            made[name] = (None, *parts[1:]) if number and len(parts) > 1 else tuple(parts)
        layers.append(replace(layer, **made))
    return replace(adapter, layers=tuple(layers))


def with_magnitudes(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Whose pairs scale the model's own products, as DoRA does."""
    generator = torch.Generator().manual_seed(10)

    def scaled(part: LowRank | None) -> LowRank | None:
        return part and part._replace(row_scale=0.5 + torch.rand(len(part.b), generator=generator))

    names = PRODUCTS + LATENT_PRODUCTS + ROUTER_PRODUCTS
    layers = [
        replace(layer, **{name: tuple(map(scaled, layer.product(name))) for name in names}) for layer in adapter.layers
    ]
    return replace(adapter, layers=tuple(layers), lm_head=tuple(map(scaled, adapter.lm_head)))


def merged(weights: Weights, adapter: Adapter) -> Weights:
    """Plain weights with c W + b a in the place of W, and those that the adapter has in their place."""
    layers, norms = [], adapter.norms
    for number, (layer, changes) in enumerate(zip(weights.layers, adapter.layers, strict=True)):
        attention, mlp = layer.attention, layer.mlp
        if isinstance(attention, LatentWeights) and attention.query is not None:
            attention = replace(attention, query=_with(attention.query, changes.query))
        if isinstance(attention, LatentWeights) and changes.kv_up:
            flat = attention.kv_up.flatten(0, 1)
            attention = replace(attention, kv_up=_merged(flat, changes.kv_up).view_as(attention.kv_up))
        attention = replace(attention, qkv=_with(attention.qkv, changes.qkv), o=_with(attention.o, changes.o))
        if isinstance(mlp, DenseMlpWeights):
            mlp = _merged_mlp(mlp, changes)
        else:
            shared = mlp.shared and _merged_mlp(mlp.shared, changes)
            gate = mlp.shared_gate and _with(mlp.shared_gate, changes.shared_gate)
            experts = {
                "gate_up": _with_pairs(mlp.gate_up, changes.expert_gate_up),
                "down": _with_pairs(mlp.down, changes.expert_down),
            }
            router = _with(mlp.router, changes.router)
            mlp = replace(mlp, router=router, shared=shared, shared_gate=gate, **experts)
        changed: LayerWeights = replace(
            layer,
            attention=attention,
            mlp=mlp,
            input_norm=norms.get(2 * number, layer.input_norm),
            post_norm=norms.get(2 * number + 1, layer.post_norm),
        )
        layers.append(changed)
    whole, embedding = adapter.whole_embedding, weights.embedding
    if adapter.embedding is not None:
        embedding = embedding + (adapter.embedding.b @ adapter.embedding.a).t()
    head = _with(weights.lm_head, adapter.lm_head) if adapter.whole_head is None else DenseLinear(adapter.whole_head)
    return replace(
        weights,
        layers=tuple(layers),
        embedding=embedding if whole is None else whole,
        lm_head=head,
        norm=norms.get(2 * len(layers), weights.norm),
    )


def _merged_mlp(mlp: DenseMlpWeights, changes: LayerAdapter) -> DenseMlpWeights:
    return replace(mlp, gate_up=_with(mlp.gate_up, changes.gate_up), down=_with(mlp.down, changes.down))


def _with(linear: Linear, parts: Parts) -> Linear:
    assert isinstance(linear, DenseLinear)
    if not parts:
        return linear
    return DenseLinear(_merged(linear.weight, parts), linear.bias)


def _merged(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    weight = weight.clone()
    rest = len(weight) - sum(len(part.b) for part in parts if part is not None)
    begin = 0
    for part in parts:
        size = rest if part is None else len(part.b)
        if part is not None:
            own = slice(begin, begin + size)
            if part.row_scale is not None:
                weight[own] *= part.row_scale[:, None]
            weight[own] += part.b @ part.a
        begin += size
    return weight


def _with_pairs(linears: ExpertLinears, parts: Parts) -> ExpertLinears:
    """Of each expert its own."""
    if not parts:
        return linears
    stacked, count = linears.stacked, linears.num_experts
    assert isinstance(stacked, DenseLinear)
    made = []
    for number, weight in enumerate(stacked.weight.view(count, -1, stacked.num_inputs)):
        own = tuple(part and LowRank(part.a[number], part.b[number]) for part in parts)
        made.append(_merged(weight, own))
    return ExpertLinears(DenseLinear(torch.cat(made), stacked.bias), count)


def merged_runner(config: ModelConfig, weights: Weights, adapter: Adapter | None, block_tokens: int) -> ModelRunner:
    """On the CPU, in float32, over 48 blocks."""
    runner = ModelRunner(
        config, DenseDecoder(config, weights if adapter is None else merged(weights, adapter)), torch.float32
    )
    runner.bind_pool(torch.zeros(runner.kv_shape(48, block_tokens)))
    return runner
