"""Memory for a model's weights, and the place of each tensor of a checkpoint in it.

Query, key and value projections are merged into one matrix, gate and up into another: one multiplication instead of
three or two. What the tensors hold, and where they are read from, it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from baton.kernels import DenseLinear, Linear
from baton.models.config import ModelConfig
from baton.models.layers import AttentionWeights, DenseMlpWeights, LayerWeights, Weights, describe
from baton.models.partition import Rank
from baton.models.places import JoinedPlaces, PlainPlace, WeightCut, WeightPlace
from baton.models.quantization.kept import KeptPart, keep_quantised
from baton.models.quantization.weight import QuantizedWeight
from baton.models.sources import EMBEDDING

PLAIN_WEIGHTS: Mapping[str, QuantizedWeight] = MappingProxyType({})
OUTPUT_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
"""Names of the norms before the MLP, of what attention adds, and of what the MLP adds."""


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
    merged = config.merged_projections
    norm_dtype, norm_offset = (torch.float32, 1.0) if config.unit_offset_norms else (dtype, 0.0)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def put(name: str, place: WeightPlace) -> None:
        places[name] = JoinedPlaces((places[name], place)) if name in places else place

    def norm(name: str, size: int) -> torch.Tensor:
        weight = torch.empty(size, dtype=norm_dtype, device=device)
        put(name, PlainPlace(weight, (WeightCut.whole(size),), norm_offset))
        return weight

    def linear(prefix: str, outputs: Sequence[tuple[str, WeightCut]], inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one; a name that is there twice has two ranges of rows of a tensor."""
        rows = sum(len(cut.part) for _, cut in outputs)
        bias = empty(rows) if with_bias else None
        names = [f"{prefix}{name}.weight" for name, _ in outputs]
        kept = None
        if all(name in forms for name in names):
            parts = [KeptPart(forms[name], cut) for name, (_, cut) in zip(names, outputs, strict=True)]
            kept = keep_quantised(parts, inputs, bias, device)
        made: Linear
        if kept is not None:
            made = kept[0]
            kept_places: Sequence[WeightPlace] = kept[1]
            for name, place in zip(names, kept_places, strict=True):
                put(name, place)
        else:
            made = DenseLinear(empty(rows, len(inputs.part)), bias)
        first = 0
        for name, cut in outputs:
            end = first + len(cut.part)
            if isinstance(made, DenseLinear):
                put(f"{prefix}{name}.weight", PlainPlace(made.weight[first:end], (cut, inputs)))
            if bias is not None:
                put(f"{prefix}{name}.bias", PlainPlace(bias[first:end], (cut,)))
            first = end
        return made

    def head_norms(prefix: str, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        norms = torch.empty(num_heads + num_kv_heads, config.head_dim, dtype=norm_dtype, device=device)
        cuts = (WeightCut.whole(config.head_dim),)
        put(f"{prefix}q_norm.weight", PlainPlace(norms[:num_heads], cuts, norm_offset))
        put(f"{prefix}k_norm.weight", PlainPlace(norms[num_heads:], cuts, norm_offset))
        return norms

    query = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads")).times(config.head_dim)
    key = WeightCut(config.num_kv_heads, rank.key_heads(config.num_kv_heads)).times(config.head_dim)
    inner = WeightCut(config.intermediate_size, rank.share(config.intermediate_size, "rows of an MLP"))
    qkv_outputs = _rows_of(("q_proj", query), ("k_proj", key), ("v_proj", key), merged="qkv_proj" if merged else None)
    gate_up_outputs = _rows_of(("gate_proj", inner), ("up_proj", inner), merged="gate_up_proj" if merged else None)
    vocabulary = WeightCut(config.vocab_size, rank.vocabulary(config.vocab_size))
    embedding = empty(config.vocab_size, config.hidden_size)
    put(EMBEDDING, PlainPlace(embedding, (WeightCut.whole(config.vocab_size), hidden)))
    layers = []
    for index, shape in enumerate(describe(config, rank)):
        layer = f"model.layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        of_attention, of_mlp = shape.attention, shape.mlp
        input_norm = norm(f"{layer}input_layernorm.weight", config.hidden_size)
        qkv = linear(attention, qkv_outputs, hidden, of_attention.qkv_bias)
        heads = of_attention.num_heads, of_attention.num_kv_heads
        norms = head_norms(attention, *heads) if of_attention.head_norms else None
        o = linear(attention, [("o_proj", hidden)], query, of_attention.o_bias)
        gate_up = linear(mlp, gate_up_outputs, hidden, of_mlp.gate_bias)
        down = linear(mlp, [("down_proj", hidden)], inner, of_mlp.down_bias)
        if shape.output_norms:
            before_mlp, *of_outputs = (norm(f"{layer}{name}.weight", config.hidden_size) for name in OUTPUT_NORMS)
        else:
            before_mlp, of_outputs = norm(f"{layer}post_attention_layernorm.weight", config.hidden_size), []
        parts = AttentionWeights(qkv, norms, o), before_mlp, DenseMlpWeights(gate_up, down)
        layers.append(LayerWeights(shape, input_norm, *parts, *of_outputs))
    final_norm = norm("model.norm.weight", config.hidden_size)
    if tied:
        own = embedding if rank.count == 1 else embedding[vocabulary.slice]
        return Weights(embedding, tuple(layers), final_norm, DenseLinear(own), tied), places
    head = linear("", [("lm_head", vocabulary)], hidden, False)
    return Weights(embedding, tuple(layers), final_norm, head), places


def _rows_of(*projections: tuple[str, WeightCut], merged: str | None) -> list[tuple[str, WeightCut]]:
    """Where the rows of projections are that lie behind one another here; `merged`: in one tensor of this name."""
    if not merged:
        return list(projections)
    total, skipped, rows = sum(cut.total for _, cut in projections), 0, []
    for _, cut in projections:
        rows.append((merged, cut.after(skipped, total)))
        skipped += cut.total
    return rows
