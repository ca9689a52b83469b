"""Memory for a model's weights, and the place of each tensor of a checkpoint in it.

Query, key and value projections are merged into one matrix, gate and up into another: one multiplication instead of
three or two. The experts of a layer lie behind one another in two. What the tensors hold, and where they are read from,
it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from baton.kernels import DenseLinear
from baton.models.config import ModelConfig
from baton.models.expert_rules import ExpertRules
from baton.models.layer_weights import (
    AttentionWeights,
    DenseMlpWeights,
    ExpertsWeights,
    LatentWeights,
    LayerWeights,
    Mlp,
    Weights,
)
from baton.models.layers import DenseMlp, ExpertsMlp, GroupedAttention, LatentAttention, describe
from baton.models.partition import ONLY_STAGE, Rank, Stage
from baton.models.places import PlainPlace, WeightCut, WeightPlace
from baton.models.quantization.weight import QuantizedWeight
from baton.models.sources import EMBEDDING
from baton.models.weight_memory import WeightMemory

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
    stage: Stage = ONLY_STAGE,
) -> tuple[Weights, dict[str, WeightPlace]]:
    """Uninitialised weights of a stage, and by Hugging Face name where each tensor goes; `forms`: of weights to be kept
    so. What only other stages use is empty."""
    memory = WeightMemory(config, rank, dtype, device, forms)
    vocabulary = WeightCut(config.vocab_size, rank.vocabulary(config.vocab_size))
    if stage.is_first or (stage.is_last and tied):
        embedding = memory.empty(config.vocab_size, config.hidden_size)
        memory.put(EMBEDDING, PlainPlace(embedding, (WeightCut.whole(config.vocab_size), memory.hidden)))
    else:
        embedding = memory.empty(0, config.hidden_size)
    layers = []
    for index, shape in zip(stage.layers(config.num_layers), describe(config, rank, stage), strict=True):
        layer = f"model.layers.{index}."
        input_norm = memory.norm(f"{layer}input_layernorm.weight", config.hidden_size)
        attention: AttentionWeights | LatentWeights
        if isinstance(shape.attention, LatentAttention):
            attention = _latent_attention(memory, f"{layer}self_attn.", shape.attention)
        else:
            attention = _grouped_attention(memory, f"{layer}self_attn.", shape.attention)
        mlp: Mlp
        if isinstance(shape.mlp, ExpertsMlp):
            assert config.experts is not None, "the description follows from it"
            mlp = _experts(memory, layer, shape.mlp, config.experts.rules)
        else:
            mlp = _dense_mlp(memory, f"{layer}mlp.", shape.mlp, config.intermediate_size)
        if shape.output_norms:
            before_mlp, *of_outputs = (
                memory.norm(f"{layer}{name}.weight", config.hidden_size) for name in OUTPUT_NORMS
            )
        else:
            before_mlp, of_outputs = memory.norm(f"{layer}post_attention_layernorm.weight", config.hidden_size), []
        layers.append(LayerWeights(shape, input_norm, attention, before_mlp, mlp, *of_outputs))
    if not stage.is_last:
        none = memory.empty(0, config.hidden_size)
        return Weights(embedding, tuple(layers), memory.empty(0), DenseLinear(none), tied), memory.places
    final_norm = memory.norm("model.norm.weight", config.hidden_size)
    if tied:
        own = embedding if rank.count == 1 else embedding[vocabulary.slice]
        return Weights(embedding, tuple(layers), final_norm, DenseLinear(own), tied), memory.places
    head = memory.linear("", [("lm_head", vocabulary)], memory.hidden, False)
    return Weights(embedding, tuple(layers), final_norm, head), memory.places


def _grouped_attention(memory: WeightMemory, prefix: str, shape: GroupedAttention) -> AttentionWeights:
    config, rank = memory.config, memory.rank
    query = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads")).times(config.head_dim)
    key = WeightCut(config.num_kv_heads, rank.key_heads(config.num_kv_heads)).times(config.head_dim)
    merged = "qkv_proj" if config.merged_projections else None
    outputs = _rows_of(("q_proj", query), ("k_proj", key), ("v_proj", key), merged=merged)
    qkv = memory.linear(prefix, outputs, memory.hidden, shape.qkv_bias)
    heads = shape.num_heads, shape.num_kv_heads
    norms = memory.head_norms(prefix, *heads, config.head_dim) if shape.head_norms else None
    whole_norms = None
    if shape.whole_norms:
        whole_norms = (
            memory.norm(f"{prefix}q_norm.weight", query.total),
            memory.norm(f"{prefix}k_norm.weight", key.total),
        )
    sinks = None
    if shape.sinks:
        sinks = memory.empty(shape.num_heads, dtype=torch.float32)
        cut = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads"))
        memory.put(f"{prefix}sinks", PlainPlace(sinks, (cut,)))
    o = memory.linear(prefix, [("o_proj", memory.hidden)], query, shape.o_bias)
    return AttentionWeights(qkv, norms, o, whole_norms, sinks)


def _latent_attention(memory: WeightMemory, prefix: str, shape: LatentAttention) -> LatentWeights:
    """Latents are made whole on each rank; what is made of them, of its heads."""
    dims, rank, total = shape.dims, memory.rank, memory.config.num_heads
    heads = WeightCut(total, rank.share(total, "query heads"))
    queries, made_of = heads.times(dims.query_dim), ("kv_a_proj_with_mqa", WeightCut.whole(dims.row_dim))
    query, query_norm = None, None
    if dims.query_rank is None:
        qkv = memory.linear(prefix, [("q_proj", queries), made_of], memory.hidden, False)
    else:
        latent = WeightCut.whole(dims.query_rank)
        qkv = memory.linear(prefix, [("q_a_proj", latent), made_of], memory.hidden, False)
        query_norm = memory.norm(f"{prefix}q_a_layernorm.weight", dims.query_rank)
        query = memory.linear(prefix, [("q_b_proj", queries)], latent, False)
    latent_norm = memory.norm(f"{prefix}kv_a_layernorm.weight", dims.latent_dim)
    up = heads.times(dims.plain_dim + dims.value_dim)
    kv_up = memory.empty(len(up.part), dims.latent_dim)
    memory.put(f"{prefix}kv_b_proj.weight", PlainPlace(kv_up, (up, WeightCut.whole(dims.latent_dim))))
    o = memory.linear(prefix, [("o_proj", memory.hidden)], heads.times(dims.value_dim), False)
    return LatentWeights(qkv, query_norm, query, latent_norm, kv_up.view(shape.num_heads, -1, dims.latent_dim), o)


def _dense_mlp(memory: WeightMemory, prefix: str, shape: DenseMlp, width: int) -> DenseMlpWeights:
    """width: of all ranks."""
    inner = WeightCut(width, memory.rank.share(width, "rows of an MLP"))
    merged = "gate_up_proj" if memory.config.merged_projections else None
    outputs = _rows_of(("gate_proj", inner), ("up_proj", inner), merged=merged)
    gate_up = memory.linear(prefix, outputs, memory.hidden, shape.gate_bias)
    return DenseMlpWeights(gate_up, memory.linear(prefix, [("down_proj", memory.hidden)], inner, shape.down_bias))


def _experts(memory: WeightMemory, layer: str, shape: ExpertsMlp, rules: ExpertRules) -> ExpertsWeights:
    """layer: begins the names of the layer's tensors."""
    prefix, routing = f"{layer}{rules.block}.", shape.routing
    routed, router_dtype = (
        [(rules.router, WeightCut.whole(routing.num_experts))],
        memory.router_dtype(rules.float32_router),
    )
    router_bias = memory.empty(routing.num_experts, dtype=router_dtype) if rules.router_bias else None
    router = memory.plain(prefix, routed, memory.hidden, router_bias, router_dtype)
    correction = None
    if routing.sigmoid:
        correction = memory.empty(routing.num_experts, dtype=torch.float32)
        memory.put(f"{prefix}gate.e_score_correction_bias", PlainPlace(correction, (routed[0][1],)))
    if rules.stacked is not None:
        held = WeightCut(routing.num_experts, shape.experts)
        stacked = memory.stacked_experts(f"{prefix}experts.", rules.stacked, held, shape.width)
        return ExpertsWeights(router, correction, *stacked, None, None)
    gate, up, down = rules.projections
    inner, count = WeightCut.whole(shape.width), len(shape.experts)
    of_experts = [(f"{expert}.{name}", inner) for expert in shape.experts for name in (gate, up)]
    down_outputs = [(f"{expert}.{down}", memory.hidden) for expert in shape.experts]
    gate_up, downs = memory.experts(f"{prefix}experts.", of_experts, down_outputs, inner, count)
    shared, shared_gate = None, None
    if shape.shared is not None:
        assert memory.config.experts is not None, "it describes the experts"
        shared = _dense_mlp(memory, f"{prefix}{rules.shared}.", shape.shared, memory.config.experts.shared_width)
    if shape.shared_gated:
        shared_gate = memory.plain(prefix, [(f"{rules.shared}_gate", WeightCut.whole(1))], memory.hidden, None)
    return ExpertsWeights(router, correction, gate_up, downs, shared, shared_gate)


def _rows_of(*projections: tuple[str, WeightCut], merged: str | None) -> list[tuple[str, WeightCut]]:
    """Where the rows of projections are that lie behind one another here; `merged`: in one tensor of this name."""
    if not merged:
        return list(projections)
    total, skipped, rows = sum(cut.total for _, cut in projections), 0, []
    for _, cut in projections:
        rows.append((merged, cut.after(skipped, total)))
        skipped += cut.total
    return rows
