"""Memory for a model's weights, and the place of each tensor of a checkpoint in it.

Query, key and value projections are merged into one matrix, gate and up into another: one multiplication instead of
three or two. The experts of a layer lie behind one another in two. What the tensors hold, and where they are read from,
it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from baton.kernels import DenseLinear, ExpertLinears, Linear, ScaledLinear
from baton.kernels.linear import STACKED_FORMATS
from baton.models.config import ModelConfig
from baton.models.expert_rules import ExpertRules
from baton.models.layers import (
    AttentionWeights,
    DenseMlp,
    DenseMlpWeights,
    ExpertsMlp,
    ExpertsWeights,
    GroupedAttention,
    LatentAttention,
    LatentWeights,
    LayerWeights,
    Mlp,
    Weights,
    describe,
)
from baton.models.partition import Rank
from baton.models.places import JoinedPlaces, PlainPlace, WeightCut, WeightPlace
from baton.models.quantization.kept import KeptPart, keep_quantised
from baton.models.quantization.weight import QuantizedWeight
from baton.models.sources import EMBEDDING

PLAIN_WEIGHTS: Mapping[str, QuantizedWeight] = MappingProxyType({})
OUTPUT_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
"""Names of the norms before the MLP, of what attention adds, and of what the MLP adds."""

Projections = Sequence[tuple[str, WeightCut]]
"""Names, and the rows of each. A name that is there twice has two ranges of rows of a tensor."""


def allocate(
    config: ModelConfig,
    tied: bool,
    rank: Rank,
    dtype: torch.dtype,
    device: str,
    forms: Mapping[str, QuantizedWeight] = PLAIN_WEIGHTS,
) -> tuple[Weights, dict[str, WeightPlace]]:
    """Uninitialised weights, and by Hugging Face name where each tensor goes; `forms`: of weights to be kept so."""
    memory = _Memory(config, rank, dtype, device, forms)
    vocabulary = WeightCut(config.vocab_size, rank.vocabulary(config.vocab_size))
    embedding = memory.empty(config.vocab_size, config.hidden_size)
    memory.put(EMBEDDING, PlainPlace(embedding, (WeightCut.whole(config.vocab_size), memory.hidden)))
    layers = []
    for index, shape in enumerate(describe(config, rank)):
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
    final_norm = memory.norm("model.norm.weight", config.hidden_size)
    if tied:
        own = embedding if rank.count == 1 else embedding[vocabulary.slice]
        return Weights(embedding, tuple(layers), final_norm, DenseLinear(own), tied), memory.places
    head = memory.linear("", [("lm_head", vocabulary)], memory.hidden, False)
    return Weights(embedding, tuple(layers), final_norm, head), memory.places


class _Memory:
    """Allocates parts of one model for one rank, and notes the place of each tensor."""

    def __init__(
        self,
        config: ModelConfig,
        rank: Rank,
        dtype: torch.dtype,
        device: str,
        forms: Mapping[str, QuantizedWeight],
    ) -> None:
        self.config, self.rank = config, rank
        self.hidden = WeightCut.whole(config.hidden_size)
        self.places: dict[str, WeightPlace] = {}
        self._dtype, self._device, self._forms = dtype, device, forms
        self._norm_dtype, self._norm_offset = (torch.float32, 1.0) if config.unit_offset_norms else (dtype, 0.0)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Of the model's dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def put(self, name: str, place: WeightPlace) -> None:
        self.places[name] = JoinedPlaces((self.places[name], place)) if name in self.places else place

    def norm(self, name: str, size: int) -> torch.Tensor:
        weight = self.empty(size, dtype=self._norm_dtype)
        self.put(name, PlainPlace(weight, (WeightCut.whole(size),), self._norm_offset))
        return weight

    def head_norms(self, prefix: str, num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
        norms = self.empty(num_heads + num_kv_heads, head_dim, dtype=self._norm_dtype)
        cuts = (WeightCut.whole(head_dim),)
        self.put(f"{prefix}q_norm.weight", PlainPlace(norms[:num_heads], cuts, self._norm_offset))
        self.put(f"{prefix}k_norm.weight", PlainPlace(norms[num_heads:], cuts, self._norm_offset))
        return norms

    def router_dtype(self, is_float32: bool) -> torch.dtype:
        """On a CPU always float32, so that a product has logits of it; a GPU's kernels have them of any."""
        return torch.float32 if is_float32 or self._device == "cpu" else self._dtype

    def linear(self, prefix: str, outputs: Projections, inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one."""
        bias = self.empty(sum(len(cut.part) for _, cut in outputs)) if with_bias else None
        return self._kept(prefix, outputs, inputs, bias) or self.plain(prefix, outputs, inputs, bias)

    def stacked(self, prefix: str, outputs: Projections, inputs: WeightCut, num_experts: int) -> ExpertLinears:
        """Those of several experts, in order."""
        kept = self._kept(prefix, outputs, inputs, None, STACKED_FORMATS)
        assert kept is None or isinstance(kept, ScaledLinear), "no other has a name of STACKED_FORMATS"
        return ExpertLinears(kept or self.plain(prefix, outputs, inputs, None), num_experts)

    def plain(
        self,
        prefix: str,
        outputs: Projections,
        inputs: WeightCut,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> DenseLinear:
        rows = sum(len(cut.part) for _, cut in outputs)
        made = DenseLinear(self.empty(rows, len(inputs.part), dtype=dtype), bias)
        for (name, cut), part in zip(outputs, _parts(outputs), strict=True):
            self.put(f"{prefix}{name}.weight", PlainPlace(made.weight[part], (cut, inputs)))
        self._put_bias(prefix, outputs, bias)
        return made

    def _kept(
        self,
        prefix: str,
        outputs: Projections,
        inputs: WeightCut,
        bias: torch.Tensor | None,
        formats: tuple[str, ...] | None = None,
    ) -> Linear | None:
        """With codes and scales, if all projections have them in one layout; formats: those to be kept, None: all."""
        names = [f"{prefix}{name}.weight" for name, _ in outputs]
        if not all(name in self._forms for name in names):
            return None
        parts = [KeptPart(self._forms[name], cut) for name, (_, cut) in zip(names, outputs, strict=True)]
        kept = keep_quantised(parts, inputs, bias, "meta" if formats else self._device)
        if kept is not None and formats is not None:
            kept = keep_quantised(parts, inputs, bias, self._device) if kept[0].weight_format in formats else None
        if kept is None:
            return None
        places: Sequence[WeightPlace] = kept[1]
        for name, place in zip(names, places, strict=True):
            self.put(name, place)
        self._put_bias(prefix, outputs, bias)
        return kept[0]

    def _put_bias(self, prefix: str, outputs: Projections, bias: torch.Tensor | None) -> None:
        if bias is not None:
            for (name, cut), part in zip(outputs, _parts(outputs), strict=True):
                self.put(f"{prefix}{name}.bias", PlainPlace(bias[part], (cut,)))


def _parts(outputs: Projections) -> list[slice]:
    """The rows of each in the merged matrix."""
    first, parts = 0, []
    for _, cut in outputs:
        parts.append(slice(first, first + len(cut.part)))
        first += len(cut.part)
    return parts


def _grouped_attention(memory: _Memory, prefix: str, shape: GroupedAttention) -> AttentionWeights:
    config, rank = memory.config, memory.rank
    query = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads")).times(config.head_dim)
    key = WeightCut(config.num_kv_heads, rank.key_heads(config.num_kv_heads)).times(config.head_dim)
    merged = "qkv_proj" if config.merged_projections else None
    outputs = _rows_of(("q_proj", query), ("k_proj", key), ("v_proj", key), merged=merged)
    qkv = memory.linear(prefix, outputs, memory.hidden, shape.qkv_bias)
    heads = shape.num_heads, shape.num_kv_heads
    norms = memory.head_norms(prefix, *heads, config.head_dim) if shape.head_norms else None
    return AttentionWeights(qkv, norms, memory.linear(prefix, [("o_proj", memory.hidden)], query, shape.o_bias))


def _latent_attention(memory: _Memory, prefix: str, shape: LatentAttention) -> LatentWeights:
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


def _dense_mlp(memory: _Memory, prefix: str, shape: DenseMlp, width: int) -> DenseMlpWeights:
    """width: of all ranks."""
    inner = WeightCut(width, memory.rank.share(width, "rows of an MLP"))
    merged = "gate_up_proj" if memory.config.merged_projections else None
    outputs = _rows_of(("gate_proj", inner), ("up_proj", inner), merged=merged)
    gate_up = memory.linear(prefix, outputs, memory.hidden, shape.gate_bias)
    return DenseMlpWeights(gate_up, memory.linear(prefix, [("down_proj", memory.hidden)], inner, shape.down_bias))


def _experts(memory: _Memory, layer: str, shape: ExpertsMlp, rules: ExpertRules) -> ExpertsWeights:
    """layer: begins the names of the layer's tensors."""
    prefix, routing = f"{layer}{rules.block}.", shape.routing
    routed = [("gate", WeightCut.whole(routing.num_experts))]
    router = memory.plain(prefix, routed, memory.hidden, None, memory.router_dtype(rules.float32_router))
    correction = None
    if routing.sigmoid:
        correction = memory.empty(routing.num_experts, dtype=torch.float32)
        memory.put(f"{prefix}gate.e_score_correction_bias", PlainPlace(correction, (routed[0][1],)))
    gate, up, down = rules.projections
    inner, count = WeightCut.whole(shape.width), len(shape.experts)
    of_experts = [(f"{expert}.{name}", inner) for expert in shape.experts for name in (gate, up)]
    gate_up = memory.stacked(f"{prefix}experts.", of_experts, memory.hidden, count)
    down_outputs = [(f"{expert}.{down}", memory.hidden) for expert in shape.experts]
    downs = memory.stacked(f"{prefix}experts.", down_outputs, inner, count)
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
