"""Where the modules of a model that PEFT adapts are among our products, by the names of the checkpoint.

`model.layers.3.self_attn.q_proj` is the first part of product qkv of layer 3; in a checkpoint with merged projections
`qkv_proj` is all three. What is adapted, it does not know.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from baton.models.adapters.adapter import AdaptedProduct, adapted_products, latent_products, router_products
from baton.models.config import ModelConfig
from baton.models.layers import describe

PREFIX, DECODER = "base_model.model.", "language_model."
"""Before all names that PEFT saves; before or behind the first `model.` where the model sees images, in its decoder."""
OF_IMAGES = ("vision_tower.", "multi_modal_projector.", "visual.")
"""What the names of other parts of such models begin with."""
EMBEDDING, LM_HEAD = "model.embed_tokens", "lm_head"
GROUPED = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2), "o_proj": ("o", 0)}
LATENT = {"kv_a_proj_with_mqa": ("qkv", 1), "o_proj": ("o", 0)}
PLAIN_QUERIES, LATENT_QUERIES = {"q_proj": ("qkv", 0)}, {"q_a_proj": ("qkv", 0), "q_b_proj": ("query", 0)}
"""Beside LATENT: queries are made of hidden states, or of a latent of their own."""
MLP = {"gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0)}
MERGED = {"qkv_proj": "qkv", "gate_up_proj": "gate_up"}


class ProductPlace(NamedTuple):
    """A module of a layer."""

    layer: int
    product: str
    first_part: int
    num_parts: int
    """Of the product."""
    shape: AdaptedProduct
    """Of the module: its inputs, and the outputs of each part that it has."""


Place: TypeAlias = "ProductPlace | AdaptedProduct"
"""AdaptedProduct: of the embedding or the head."""


def name_in_decoder(name: str) -> str:
    """A name that PEFT saved, as a model that is the decoder alone has it."""
    bare = name.removeprefix(PREFIX)
    return bare.replace(DECODER, "", 1) if bare.startswith((DECODER, f"model.{DECODER}")) else bare


def is_of_images(name: str) -> bool:
    """Whether text does not pass what has this name."""
    return name.removeprefix(PREFIX).removeprefix("model.").startswith(OF_IMAGES)


def adapted_modules(config: ModelConfig) -> dict[str, Place]:
    """By name, the modules that an adapter may change, but those of optional_modules and routed experts."""
    vocabulary = AdaptedProduct(config.hidden_size, (config.vocab_size,))
    places: dict[str, Place] = {EMBEDDING: vocabulary, LM_HEAD: vocabulary}
    for layer, products in enumerate(adapted_products(config)):
        for product, shape in products.items():
            for name, first_part, part in _modules(product, shape, config):
                module = f"model.layers.{layer}.{_block(product, layer, config)}.{name}"
                places[module] = ProductPlace(layer, product, first_part, len(shape.outputs), part)
    return places


def optional_modules(config: ModelConfig) -> dict[str, ProductPlace]:
    """By name, what makes keys and values of latents, routers, and gates of shared experts; a router is named as
    transformers 5 has it, and as the checkpoint does."""
    names = {"kv_up": ["self_attn.kv_b_proj"]}
    if config.experts is not None:
        rules = config.experts.rules
        names["router"] = [f"{block}.{rules.router}" for block in ("mlp", rules.block)]
        names["shared_gate"] = [f"{rules.block}.{rules.shared}_gate"]
    return {
        f"model.layers.{layer}.{name}": ProductPlace(layer, product, 0, 1, whole)
        for layer, shape in enumerate(describe(config))
        for product, whole in (latent_products(shape) | router_products(shape, config.hidden_size)).items()
        for name in names[product]
    }


def norm_numbers(config: ModelConfig) -> dict[str, int]:
    """By name, in which order a step comes to the norms of the residual, two a layer and the last: those that an
    adapter may bring. None of families whose weights are offsets from 1, or that norm what is added as well."""
    if config.unit_offset_norms or config.output_norms:
        return {}
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{layer}.{norm}" for layer in range(config.num_layers) for norm in norms]
    return {name: number for number, name in enumerate([*names, "model.norm"])}


def reason_not_adapted(module: str, config: ModelConfig) -> str:
    """Why no adapter may change a module of that name."""
    if config.experts is not None and "experts" in module.split("."):
        return "names no projection of a routed expert of this model"
    return "this model has no module of that name that can be adapted"


def _block(product: str, layer: int, config: ModelConfig) -> str:
    """What the modules of a product are below, in their layer."""
    if product not in ("gate_up", "down"):
        return "self_attn"
    experts = config.experts
    return f"mlp.{experts.rules.shared}" if experts is not None and experts.layers[layer] else "mlp"


def _modules(product: str, shape: AdaptedProduct, config: ModelConfig) -> list[tuple[str, int, AdaptedProduct]]:
    """Name, first part and shape of each module that makes up a product."""
    for name, of in MERGED.items():
        if config.merged_projections and of == product:
            return [(name, 0, shape)]
    return [
        (name, part, AdaptedProduct(shape.num_inputs, (shape.outputs[part],)))
        for name, (of, part) in _separate(config).items()
        if of == product
    ]


def _separate(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Product and part of each module that is a part alone."""
    if config.latent is None:
        return GROUPED | MLP
    return LATENT | (PLAIN_QUERIES if config.latent.query_rank is None else LATENT_QUERIES) | MLP
