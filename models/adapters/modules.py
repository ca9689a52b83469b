"""Where the modules of a model that PEFT adapts are among our products, by the names of the checkpoint.

`model.layers.3.self_attn.q_proj` is the first part of product qkv of layer 3; in a checkpoint with merged projections
`qkv_proj` is all three. What is adapted, it does not know.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from baton.models.adapters.adapter import AdaptedProduct, adapted_products
from baton.models.config import ModelConfig

EMBEDDING, LM_HEAD = "model.embed_tokens", "lm_head"
SEPARATE = {
    "q_proj": ("qkv", 0),
    "k_proj": ("qkv", 1),
    "v_proj": ("qkv", 2),
    "o_proj": ("o", 0),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
    "down_proj": ("down", 0),
}
MERGED = {"qkv_proj": "qkv", "gate_up_proj": "gate_up"}
BLOCKS = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}


class ProductPlace(NamedTuple):
    """A module of a layer."""

    layer: int
    product: str
    first_part: int
    shape: AdaptedProduct
    """Of the module: its inputs, and the outputs of each part that it has."""


Place: TypeAlias = "ProductPlace | AdaptedProduct"
"""AdaptedProduct: of the embedding or the head."""


def adapted_modules(config: ModelConfig) -> dict[str, Place]:
    """All modules of the model that an adapter may change, by name."""
    vocabulary = AdaptedProduct(config.hidden_size, (config.vocab_size,))
    places: dict[str, Place] = {EMBEDDING: vocabulary, LM_HEAD: vocabulary}
    for layer, products in enumerate(adapted_products(config)):
        for product, shape in products.items():
            for name, first_part, part in _modules(product, shape, config.merged_projections):
                module = f"model.layers.{layer}.{BLOCKS[product]}.{name}"
                places[module] = ProductPlace(layer, product, first_part, part)
    return places


def norm_numbers(config: ModelConfig) -> dict[str, int]:
    """By name, in which order a step comes to the norms of the residual, two a layer and the last: those that an
    adapter may bring. None of families whose weights are offsets from 1, or that norm what is added as well."""
    if config.unit_offset_norms or config.output_norms:
        return {}
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{layer}.{norm}" for layer in range(config.num_layers) for norm in norms]
    return {name: number for number, name in enumerate([*names, "model.norm"])}


def _modules(product: str, shape: AdaptedProduct, merged: bool) -> list[tuple[str, int, AdaptedProduct]]:
    """Name, first part and shape of each module that makes up a product."""
    for name, of in MERGED.items():
        if merged and of == product:
            return [(name, 0, shape)]
    return [
        (name, part, AdaptedProduct(shape.num_inputs, (shape.outputs[part],)))
        for name, (of, part) in SEPARATE.items()
        if of == product
    ]
