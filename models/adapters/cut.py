"""The part of an adapter that one rank of a group, or one stage, computes with: views of what all have.

    query, key, value, gate, up, head:  y[outputs of a rank] = W x + b (a x)              rows of b
    o, down:                            y = sum over ranks of W x + b (a x)[its inputs]    columns of a
    routed experts:                     those of the rank, whole

As models.partition cuts the model; of what makes keys and values of latents, the heads of the rank. The embedding,
latents of attention, routers and gates of shared experts every rank computes whole.
"""

from __future__ import annotations

from dataclasses import replace

from baton.models.adapters.adapter import Adapter, LayerAdapter, LowRank, Parts
from baton.models.config import ModelConfig
from baton.models.latent_config import LatentConfig
from baton.models.partition import Rank, Stage


def share_of(adapter: Adapter, config: ModelConfig, rank: Rank) -> Adapter:
    """The part of `rank`; what the adapter leaves alone need not be divisible."""
    if rank.count == 1:
        return adapter
    vocabulary = rank.vocabulary(config.vocab_size)
    head = None if adapter.whole_head is None else adapter.whole_head[vocabulary.start : vocabulary.stop]
    return replace(
        adapter,
        layers=tuple(_layer(number, layer, config, rank) for number, layer in enumerate(adapter.layers)),
        lm_head=_outputs(adapter.lm_head, vocabulary),
        whole_head=head,
    )


def layers_of(adapter: Adapter, stage: Stage) -> Adapter:
    """The part of `stage`: nothing in the layers of others. Norms are small, and stay."""
    own = stage.layers(len(adapter.layers))
    return replace(
        adapter,
        layers=tuple(layer if number in own else LayerAdapter() for number, layer in enumerate(adapter.layers)),
        embedding=adapter.embedding if stage.is_first else None,
        lm_head=adapter.lm_head if stage.is_last else (),
        whole_embedding=adapter.whole_embedding if stage.is_first else None,
        whole_head=adapter.whole_head if stage.is_last else None,
    )


def _layer(number: int, layer: LayerAdapter, config: ModelConfig, rank: Rank) -> LayerAdapter:
    made = _grouped(layer, config, rank) if config.latent is None else _latent(layer, config, config.latent, rank)
    made = replace(made, router=layer.router, shared_gate=layer.shared_gate)
    experts = config.experts
    if experts is not None and (layer.expert_gate_up or layer.expert_down):
        held = rank.share(experts.num_experts, "experts")
        gate_up, down = _of_experts(layer.expert_gate_up, held), _of_experts(layer.expert_down, held)
        made = replace(made, expert_gate_up=gate_up, expert_down=down)
    if not layer.gate_up and not layer.down:
        return made
    width = experts.shared_width if experts is not None and experts.layers[number] else config.intermediate_size
    inner = rank.share(width, "rows of an MLP")
    return replace(made, gate_up=_outputs(layer.gate_up, inner, inner), down=_inputs(layer.down, inner))


def _grouped(layer: LayerAdapter, config: ModelConfig, rank: Rank) -> LayerAdapter:
    query = _times(rank.share(config.num_heads, "query heads"), config.head_dim)
    key = _times(rank.key_heads(config.num_kv_heads), config.head_dim)
    return LayerAdapter(qkv=_outputs(layer.qkv, query, key, key), o=_inputs(layer.o, query))


def _latent(layer: LayerAdapter, config: ModelConfig, dims: LatentConfig, rank: Rank) -> LayerAdapter:
    heads = rank.share(config.num_heads, "query heads")
    queries = _times(heads, dims.query_dim)
    first = queries if dims.query_rank is None else range(dims.query_rank)
    return LayerAdapter(
        qkv=_outputs(layer.qkv, first, range(dims.row_dim)),
        query=_outputs(layer.query, queries),
        o=_inputs(layer.o, _times(heads, dims.value_dim)),
        kv_up=_outputs(layer.kv_up, _times(heads, dims.plain_dim + dims.value_dim)),
    )


def _times(heads: range, width: int) -> range:
    return range(heads.start * width, heads.stop * width)


def _outputs(parts: Parts, *cuts: range) -> Parts:
    return tuple(part and _rows(part, cut) for part, cut in zip(parts, cuts, strict=False))


def _rows(pair: LowRank, cut: range) -> LowRank:
    scale = None if pair.row_scale is None else pair.row_scale[cut.start : cut.stop]
    return LowRank(pair.a, pair.b[cut.start : cut.stop], scale)


def _of_experts(parts: Parts, held: range) -> Parts:
    cut = slice(held.start, held.stop)
    return tuple(part and LowRank(part.a[cut], part.b[cut]) for part in parts)


def _inputs(parts: Parts, cut: range) -> Parts:
    return tuple(part and part._replace(a=part.a[:, cut.start : cut.stop]) for part in parts)
