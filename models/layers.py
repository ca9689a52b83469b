"""What a decoder layer is: its description, which both devices execute.

A family differs from another in data: which norms and biases there are, which layers see a window, how wide the MLP is.
`describe` says so layer by layer. What layers hold is in models.layer_weights, in which order a step runs through their
parts in models.layer_order.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.kernels import ClampedGate, Routing, Scores
from baton.models.config import ModelConfig
from baton.models.experts_config import ExpertsConfig
from baton.models.latent_config import LatentConfig
from baton.models.partition import ONLY_STAGE, WHOLE, Rank, Stage
from baton.models.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Causal attention with rope over cached keys and values, of which a group of query heads shares one."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    """A token sees itself and the window - 1 before it; None: all before it."""
    qkv_bias: bool
    o_bias: bool
    head_norms: bool
    """Queries and keys are normed head by head before rope."""
    whole_norms: bool
    """All query heads of a token are normed together before rope, and all key heads."""
    rope: RopeConfig
    scores: Scores
    sinks: bool
    """Each query head has a score more, whose weight goes nowhere."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Causal attention whose keys and values are made, head by head, of a cached latent, and of one rotated key.

    As products with the latents themselves: key_up and value_up, the parts of a head of the weight that makes them,
    multiply the query and what is attended instead.
    """

    num_heads: int
    dims: LatentConfig
    rope: RopeConfig
    scores: Scores


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(activation(gate x) * up x)"""

    width: int
    activation: str
    gate_bias: bool
    """Of gate and up."""
    down_bias: bool


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    """The sum over a token's experts of  weight * down(activation(gate x) * up x),  and what a shared expert adds."""

    routing: Routing
    """Among the experts of all ranks."""
    experts: range
    """Those of this rank."""
    width: int
    """Of one expert."""
    activation: str
    clamped: ClampedGate | None
    """The gate of experts, instead of the activation; then their products have biases, and the router too."""
    shared: DenseMlp | None
    """It computes every token; this rank's part of its width."""
    shared_gated: bool
    """Its output is multiplied by sigmoid(shared_gate x)."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer with pre-norm residuals:  h += attention(norm(h));  h += mlp(norm(h))."""

    attention: GroupedAttention | LatentAttention
    mlp: DenseMlp | ExpertsMlp
    output_norms: bool
    """What is added is normed before:  h += norm(attention(norm(h)));  h += norm(mlp(norm(h)))."""


def describe(config: ModelConfig, rank: Rank = WHOLE, stage: Stage = ONLY_STAGE) -> tuple[LayerShape, ...]:
    """The layers of a stage as `rank` computes them, first to last; SettingsError if its ranks cannot share them."""
    layers = stage.layers(config.num_layers)
    kinds = list(zip(config.windowed_layers, _mlps(config, rank), strict=True))[layers.start : layers.stop]
    return tuple(LayerShape(_attention(config, rank, windowed), mlp, config.output_norms) for windowed, mlp in kinds)


def _attention(config: ModelConfig, rank: Rank, windowed: bool) -> GroupedAttention | LatentAttention:
    num_heads = len(rank.share(config.num_heads, "query heads"))
    scores = Scores(config.score_scale, config.score_softcap)
    if config.latent is not None:
        return LatentAttention(num_heads, config.latent, config.rope, scores)
    return GroupedAttention(
        num_heads=num_heads,
        num_kv_heads=len(rank.key_heads(config.num_kv_heads)),
        head_dim=config.head_dim,
        window=config.sliding_window if windowed else None,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias and rank.index == 0,
        head_norms=config.qk_norm and not config.whole_qk_norm,
        whole_norms=config.qk_norm and config.whole_qk_norm,
        rope=config.window_rope if windowed and config.window_rope is not None else config.rope,
        scores=scores,
        sinks=config.sinks,
    )


def _mlps(config: ModelConfig, rank: Rank) -> list[DenseMlp | ExpertsMlp]:
    """Of all layers."""
    if config.experts is None:
        return [_dense(config, config.intermediate_size, rank)] * config.num_layers
    experts = _experts(config, config.experts, rank)
    return [experts if has else _dense(config, config.intermediate_size, rank) for has in config.experts.layers]


def _dense(config: ModelConfig, width: int, rank: Rank) -> DenseMlp:
    return DenseMlp(
        width=len(rank.share(width, "rows of an MLP")),
        activation=config.activation,
        gate_bias=config.mlp_bias,
        down_bias=config.mlp_bias and rank.index == 0,
    )


def _experts(config: ModelConfig, experts: ExpertsConfig, rank: Rank) -> ExpertsMlp:
    return ExpertsMlp(
        routing=Routing(
            num_experts=experts.num_experts,
            top_k=experts.top_k,
            sigmoid=experts.sigmoid,
            renormalised=experts.renormalised,
            scale=experts.scale,
            num_groups=experts.num_groups,
            kept_groups=experts.kept_groups,
            groups_by_two=experts.sigmoid,
        ),
        experts=rank.share(experts.num_experts, "experts"),
        width=experts.width,
        activation=config.activation,
        clamped=None if experts.clamp is None else ClampedGate(*experts.clamp),
        shared=_dense(config, experts.shared_width, rank) if experts.shared_width else None,
        shared_gated=experts.shared_gated,
    )
