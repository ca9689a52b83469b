"""Where pairs of routed experts are among our products, by the names that PEFT saves them under.

Pairs of modules have the names of the checkpoint, as `model.layers.3.mlp.experts.7.up_proj` of one expert. Transformers
5 has all experts of a layer in two parameters, which PEFT adapts by `target_parameters`: each wrapper is of the module
that has the parameters, and the second wraps the first, so that the names are `model.layers.3.mlp.experts` and
`model.layers.3.mlp.experts.base_layer`, and only the shapes say which parameter is meant. What is adapted, it does not
know.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import torch

from baton.models.adapters.adapter import AdaptedProduct, LowRank, expert_products
from baton.models.config import ModelConfig
from baton.models.layers import describe


class ExpertPlace(NamedTuple):
    """A projection of one expert of a layer."""

    layer: int
    product: str
    part: int
    shape: AdaptedProduct
    """Of this part alone."""
    expert: int


class ParameterPlace(NamedTuple):
    """A parameter with a product of all experts of a layer."""

    layer: int
    product: str
    shape: AdaptedProduct
    """Of one expert."""
    num_experts: int
    interleaved: bool
    """Outputs of gate and up take turns."""


def expert_modules(config: ModelConfig) -> dict[str, ExpertPlace]:
    """By name; empty where checkpoints of the family have no module for each expert."""
    experts, places = config.experts, {}
    if experts is None or experts.rules.stacked is not None:
        return {}
    for layer, products in enumerate(_products(config)):
        for number in range(experts.num_experts if products else 0):
            prefix = f"model.layers.{layer}.{experts.rules.block}.experts.{number}."
            gate, up, down = (prefix + name for name in experts.rules.projections)
            for name, product, part in (
                (gate, "expert_gate_up", 0),
                (up, "expert_gate_up", 1),
                (down, "expert_down", 0),
            ):
                whole = products[product]
                shape = AdaptedProduct(whole.num_inputs, (whole.outputs[part],))
                places[name] = ExpertPlace(layer, product, part, shape, number)
    return places


def expert_parameters(config: ModelConfig) -> dict[str, dict[str, ParameterPlace]]:
    """By the names of wrappers, the parameters that each may be of, by name."""
    experts, wrappers = config.experts, {}
    if experts is None:
        return {}
    names = {"gate_up_proj": "expert_gate_up", "down_proj": "expert_down"}
    for layer, products in enumerate(_products(config)):
        if products:
            module = f"model.layers.{layer}.mlp.experts"
            wrappers[module] = wrappers[f"{module}.base_layer"] = {
                f"{module}.{name}": ParameterPlace(
                    layer,
                    product,
                    products[product],
                    experts.num_experts,
                    interleaved=experts.rules.stacked is not None and product == "expert_gate_up",
                )
                for name, product in names.items()
            }
    return wrappers


def _products(config: ModelConfig) -> list[dict[str, AdaptedProduct]]:
    return [expert_products(shape, config.hidden_size) for shape in describe(config)]


def parts_of_parameter(a: torch.Tensor, b: torch.Tensor, place: ParameterPlace) -> tuple[LowRank, ...]:
    """Of PEFT's pair: a [experts * rank, inputs], rows of one expert side by side; b [outputs, rank * experts], columns
    of one expert apart by the number of experts (peft.tuners.lora.layer.ParamWrapper)."""
    count = place.num_experts
    a, b = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)
    if place.interleaved:
        b = torch.cat((b[:, 0::2], b[:, 1::2]), 1)
    return tuple(LowRank(a, part) for part in b.split(list(place.shape.outputs), 1))


def joined(pairs: Mapping[int, LowRank], num_experts: int) -> LowRank:
    """Pairs of one projection, by expert, as one; smaller ranks, and experts without a pair, are filled up by zeros."""
    rank, some = max(pair.rank for pair in pairs.values()), next(iter(pairs.values()))
    dtype = reduce(torch.promote_types, {pair.a.dtype for pair in pairs.values()})
    a = torch.zeros(num_experts, rank, some.a.shape[1], dtype=dtype)
    b = torch.zeros(num_experts, some.b.shape[0], rank)
    for expert, pair in pairs.items():
        a[expert, : pair.rank], b[expert, :, : pair.rank] = pair.a, pair.b
    return LowRank(a, b)
