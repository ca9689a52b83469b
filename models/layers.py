"""What a decoder layer is: its description, its weights, and the order of its parts, which both devices execute.

A family differs from another in data: which norms and biases there are, which layers see a window, how wide the MLP is.
`describe` says so layer by layer; `run_layers` walks a step through them, and a device brings the operations. What an
operation reads and writes is the device's part, and where a tensor lies in a checkpoint that of models.weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch

from baton.kernels import DenseLinear, ExpertLinears, HeldWeight, Linear, Routing, Scores
from baton.models.config import ModelConfig
from baton.models.experts_config import ExpertsConfig
from baton.models.latent_config import LatentConfig
from baton.models.partition import WHOLE, Rank
from baton.models.rope_config import RopeConfig
from baton.node.errors import InvariantBroken


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
    rope: RopeConfig
    scores: Scores


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


def describe(config: ModelConfig, rank: Rank = WHOLE) -> tuple[LayerShape, ...]:
    """The layers of a model as `rank` computes them, first to last; SettingsError if its ranks cannot share them."""
    return tuple(
        LayerShape(_attention(config, rank, windowed), mlp, config.output_norms)
        for windowed, mlp in zip(config.windowed_layers, _mlps(config, rank), strict=True)
    )


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
        head_norms=config.qk_norm,
        rope=config.window_rope if windowed and config.window_rope is not None else config.rope,
        scores=scores,
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
        shared=_dense(config, experts.shared_width, rank) if experts.shared_width else None,
        shared_gated=experts.shared_gated,
    )


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    qkv: Linear  # [Q + 2 K, hidden]
    head_norms: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: the query's for each head, then the key's
    o: Linear  # [hidden, Q]

    @property
    def held(self) -> tuple[Linear, ...]:
        return self.qkv, self.o

    @property
    def plain(self) -> tuple[torch.Tensor, ...]:
        """What is no product."""
        return () if self.head_norms is None else (self.head_norms,)


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Of a LatentAttention with H heads. P, R, V: elements of the plain and rotated parts of a query, and of a value;
    L: of the latent. Q = H * (P + R), or the rank of the queries' latent."""

    qkv: Linear  # [Q + L + R, hidden]
    query_norm: torch.Tensor | None  # [Q]
    query: Linear | None  # [H * (P + R), Q]; None: qkv makes queries
    latent_norm: torch.Tensor  # [L]
    kv_up: torch.Tensor  # [H, P + V, L]: key_up, then value_up
    o: Linear  # [hidden, H * V]

    @property
    def held(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o) if self.query is None else (self.qkv, self.query, self.o)

    @property
    def plain(self) -> tuple[torch.Tensor, ...]:
        """What is no product, and the weight whose parts are multiplied head by head."""
        norms = () if self.query_norm is None else (self.query_norm,)
        return *norms, self.latent_norm, self.kv_up


@dataclass(frozen=True, slots=True)
class DenseMlpWeights:
    """Of a DenseMlp."""

    gate_up: Linear  # [2 * width, hidden]
    down: Linear  # [hidden, width]

    @property
    def reader(self) -> Linear:
        """What reads the norm before the MLP."""
        return self.gate_up

    @property
    def held(self) -> tuple[HeldWeight, ...]:
        return self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """Of an ExpertsMlp."""

    router: DenseLinear  # [num_experts, hidden], of the experts of all ranks
    correction: torch.Tensor | None  # float32 [num_experts]; added to scores where experts are chosen
    gate_up: ExpertLinears  # of each expert of this rank [2 * width, hidden]
    down: ExpertLinears  # of each [hidden, width]
    shared: DenseMlpWeights | None
    shared_gate: DenseLinear | None  # [1, hidden]

    @property
    def reader(self) -> Linear:
        """What reads the norm before the MLP: plain rows, whatever the experts' format."""
        return self.router

    @property
    def held(self) -> tuple[HeldWeight, ...]:
        gate = () if self.shared_gate is None else (self.shared_gate,)
        shared = () if self.shared is None else self.shared.held
        return self.router, self.gate_up, self.down, *shared, *gate


Mlp: TypeAlias = "DenseMlpWeights | ExpertsWeights"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, and what it is."""

    shape: LayerShape
    input_norm: torch.Tensor  # [hidden]
    attention: AttentionWeights | LatentWeights
    post_norm: torch.Tensor  # [hidden], before the MLP
    mlp: Mlp
    attention_output_norm: torch.Tensor | None = None  # [hidden]
    mlp_output_norm: torch.Tensor | None = None  # [hidden]

    @property
    def linears(self) -> tuple[HeldWeight, ...]:
        return (*self.attention.held, *self.mlp.held)

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """Norms and what is added to scores, and what else is no product."""
        given = (self.input_norm, *self.attention.plain, self.attention_output_norm, self.post_norm)
        correction = self.mlp.correction if isinstance(self.mlp, ExpertsWeights) else None
        return tuple(each for each in (*given, self.mlp_output_norm, correction) if each is not None)


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder, or a rank's part of it."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: Linear  # [the rank's part of vocab, hidden]
    tied: bool = False
    """The head reads rows of the embedding."""

    @property
    def linears(self) -> tuple[HeldWeight, ...]:
        return (*(linear for layer in self.layers for linear in layer.linears), self.lm_head)

    @property
    def size_bytes(self) -> dict[str, int]:
        """By format; embedding and norms are dense."""
        vectors = [self.norm, *(each for layer in self.layers for each in layer.vectors)]
        sizes = Counter({DenseLinear.weight_format: self.embedding.nbytes + sum(each.nbytes for each in vectors)})
        for linear in self.linears[: -1 if self.tied else None]:
            sizes[linear.weight_format] += linear.size_bytes
        return dict(sizes)


X = TypeVar("X")
"""Rows [N, hidden] as a device hands them to a product: plain or, where the product wants them so, quantised."""
A = TypeVar("A")
"""What a part of a layer adds to the residual, as a device has it: [N, hidden], or parts still to be summed."""


class LayerOps(Protocol[X, A]):
    """A device's operations on one step, which holds its residual h [N, hidden].

    A norm knows the product that reads it.
    """

    def norm(self, weight: torch.Tensor, reader: Linear) -> X:
        """Of the residual."""
        ...

    def attention(self, index: int, layer: LayerWeights, x: X) -> A | None:
        """What layer number `index` adds to the residual, with keys and values written to the pool. None: no token of
        the step draws and this is the last layer, so that nothing behind its keys and values is of use."""
        ...

    def mlp(self, layer: LayerWeights, x: X) -> A:
        """What the layer's MLP adds to the residual."""
        ...

    def add_and_norm(self, added: A, output_norm: torch.Tensor | None, weight: torch.Tensor, reader: Linear) -> X:
        """The residual takes `added`, normed by `output_norm` if there is one; its norm."""
        ...

    def finish(self, added: A, output_norm: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """The same behind the last layer, of the tokens that draw, plain: [drawn, hidden]."""
        ...


def run_layers(weights: Weights, ops: LayerOps[X, A], indices: Iterable[int]) -> torch.Tensor | None:
    """The final norm's output of the tokens that draw, [drawn, hidden]; None if none does.

    indices: of the layers to run, in rising order and with the last; all of them, but for a rehearsal.
    """
    layers = weights.layers
    x = ops.norm(layers[0].input_norm, layers[0].attention.qkv)
    for index in indices:
        layer = layers[index]
        attended = ops.attention(index, layer, x)
        if attended is None:
            return None
        x = ops.add_and_norm(attended, layer.attention_output_norm, layer.post_norm, layer.mlp.reader)
        added = ops.mlp(layer, x)
        if index + 1 == len(layers):
            return ops.finish(added, layer.mlp_output_norm, weights.norm)
        following = layers[index + 1]
        x = ops.add_and_norm(added, layer.mlp_output_norm, following.input_norm, following.attention.qkv)
    raise InvariantBroken("the last layer was left out")
