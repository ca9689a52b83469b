"""Memory for a model's weights, and the place of each tensor of a checkpoint in it.

Query, key and value projections are merged into one matrix, gate and up into another: one multiplication instead of
three or two. What the tensors hold, and where they are read from, it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from baton.kernels import DenseLinear, Linear
from baton.models.config import ModelConfig
from baton.models.layers import AttentionWeights, DenseMlpWeights, LayerWeights, Rank, Weights, describe
from baton.models.places import PlainPlace, WeightCut, WeightPlace
from baton.models.quantization.kept import Part, keep_quantised
from baton.models.quantization.weight import QuantizedWeight
from baton.models.sources import EMBEDDING

PLAIN_WEIGHTS: Mapping[str, QuantizedWeight] = MappingProxyType({})


def allocate(
    config: ModelConfig,
    tied: bool,
    rank: Rank,
    dtype: torch.dtype,
    device: str,
    forms: Mapping[str, QuantizedWeight] = PLAIN_WEIGHTS,
) -> tuple[Weights, dict[str, WeightPlace]]:
    """Uninitialised weights, and by Hugging Face name where each tensor goes; `forms`: of weights to be kept so."""
    places: dict[str, WeightPlace] = {}
    hidden = WeightCut.whole(config.hidden_size)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def named(name: str, *cuts: WeightCut) -> torch.Tensor:
        place = PlainPlace(empty(*(len(cut.part) for cut in cuts)), cuts)
        places[name] = place
        return place.target

    def linear(prefix: str, outputs: dict[str, WeightCut], inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one."""
        rows = sum(len(cut.part) for cut in outputs.values())
        bias = empty(rows) if with_bias else None
        names = [f"{prefix}{name}.weight" for name in outputs]
        kept = None
        if all(name in forms for name in names):
            parts = [Part(forms[name], cut) for name, cut in zip(names, outputs.values(), strict=True)]
            kept = keep_quantised(parts, inputs, bias, device)
        made: Linear
        if kept is not None:
            made = kept[0]
            places.update(zip(names, kept[1], strict=True))
        else:
            made = DenseLinear(empty(rows, len(inputs.part)), bias)
        first = 0
        for name, cut in outputs.items():
            end = first + len(cut.part)
            if isinstance(made, DenseLinear):
                places[f"{prefix}{name}.weight"] = PlainPlace(made.weight[first:end], (cut, inputs))
            if bias is not None:
                places[f"{prefix}{name}.bias"] = PlainPlace(bias[first:end], (cut,))
            first = end
        return made

    def head_norms(prefix: str, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        norms, cuts = empty(num_heads + num_kv_heads, config.head_dim), (WeightCut.whole(config.head_dim),)
        places[f"{prefix}q_norm.weight"] = PlainPlace(norms[:num_heads], cuts)
        places[f"{prefix}k_norm.weight"] = PlainPlace(norms[num_heads:], cuts)
        return norms

    query = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads")).times(config.head_dim)
    key = WeightCut(config.num_kv_heads, rank.key_heads(config.num_kv_heads)).times(config.head_dim)
    inner = WeightCut(config.intermediate_size, rank.share(config.intermediate_size, "rows of an MLP"))
    embedding = named(EMBEDDING, WeightCut.whole(config.vocab_size), hidden)
    layers = []
    for index, shape in enumerate(describe(config, rank)):
        layer = f"model.layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        of_attention, of_mlp = shape.attention, shape.mlp
        input_norm = named(f"{layer}input_layernorm.weight", hidden)
        qkv = linear(attention, {"q_proj": query, "k_proj": key, "v_proj": key}, hidden, of_attention.qkv_bias)
        heads = of_attention.num_heads, of_attention.num_kv_heads
        norms = head_norms(attention, *heads) if of_attention.head_norms else None
        o = linear(attention, {"o_proj": hidden}, query, of_attention.o_bias)
        post_norm = named(f"{layer}post_attention_layernorm.weight", hidden)
        gate_up = linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, of_mlp.gate_bias)
        down = linear(mlp, {"down_proj": hidden}, inner, of_mlp.down_bias)
        parts = AttentionWeights(qkv, norms, o), post_norm, DenseMlpWeights(gate_up, down)
        layers.append(LayerWeights(shape, input_norm, *parts))
    norm = named("model.norm.weight", hidden)
    if tied:
        return Weights(embedding, tuple(layers), norm, DenseLinear(embedding)), places
    head = linear("", {"lm_head": WeightCut.whole(config.vocab_size)}, hidden, False)
    return Weights(embedding, tuple(layers), norm, head), places
