"""What a decoder layer is: its description, its weights, and the order of its parts, which both devices execute.

A family differs from another in data: which norms and biases there are, which layers see a window, how wide the MLP is.
`describe` says so layer by layer; `run_layers` walks a step through them, and a device brings the operations. What an
operation reads and writes is the device's part, and where a tensor lies in a checkpoint that of models.weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from baton.kernels import DenseLinear, Linear, Scores
from baton.models.config import ModelConfig
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
class DenseMlp:
    """down(activation(gate x) * up x)"""

    width: int
    activation: str
    gate_bias: bool
    """Of gate and up."""
    down_bias: bool


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer with pre-norm residuals:  h += attention(norm(h));  h += mlp(norm(h))."""

    attention: GroupedAttention
    mlp: DenseMlp
    output_norms: bool
    """What is added is normed before:  h += norm(attention(norm(h)));  h += norm(mlp(norm(h)))."""


def describe(config: ModelConfig, rank: Rank = WHOLE) -> tuple[LayerShape, ...]:
    """The layers of a model as `rank` computes them, first to last; SettingsError if its ranks cannot share them."""
    num_heads = len(rank.share(config.num_heads, "query heads"))
    num_kv_heads = len(rank.key_heads(config.num_kv_heads))
    adds_bias = rank.index == 0
    mlp = DenseMlp(
        width=len(rank.share(config.intermediate_size, "rows of an MLP")),
        activation=config.activation,
        gate_bias=config.mlp_bias,
        down_bias=config.mlp_bias and adds_bias,
    )
    return tuple(
        LayerShape(
            GroupedAttention(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=config.head_dim,
                window=config.sliding_window if windowed else None,
                qkv_bias=config.qkv_bias,
                o_bias=config.o_bias and adds_bias,
                head_norms=config.qk_norm,
                rope=config.window_rope if windowed and config.window_rope is not None else config.rope,
                scores=Scores(config.score_scale, config.score_softcap),
            ),
            mlp,
            config.output_norms,
        )
        for windowed in config.windowed_layers
    )


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    qkv: Linear  # [Q + 2 K, hidden]
    head_norms: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: the query's for each head, then the key's
    o: Linear  # [hidden, Q]


@dataclass(frozen=True, slots=True)
class DenseMlpWeights:
    """Of a DenseMlp."""

    gate_up: Linear  # [2 * width, hidden]
    down: Linear  # [hidden, width]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, and what it is."""

    shape: LayerShape
    input_norm: torch.Tensor  # [hidden]
    attention: AttentionWeights
    post_norm: torch.Tensor  # [hidden], before the MLP
    mlp: DenseMlpWeights
    attention_output_norm: torch.Tensor | None = None  # [hidden]
    mlp_output_norm: torch.Tensor | None = None  # [hidden]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down)

    @property
    def norms(self) -> tuple[torch.Tensor, ...]:
        given = (self.input_norm, self.attention.head_norms, self.attention_output_norm, self.post_norm)
        return tuple(norm for norm in (*given, self.mlp_output_norm) if norm is not None)


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
    def linears(self) -> tuple[Linear, ...]:
        return (*(linear for layer in self.layers for linear in layer.linears), self.lm_head)

    @property
    def size_bytes(self) -> dict[str, int]:
        """By format; embedding and norms are dense."""
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        sizes = Counter({DenseLinear.weight_format: self.embedding.nbytes + sum(norm.nbytes for norm in norms)})
        for linear in self.linears[: -1 if self.tied else None]:
            sizes[linear.weight_format] += linear.size_bytes
        return dict(sizes)


X = TypeVar("X")
"""Rows [N, hidden] as a device hands them to a product: plain or, where the product wants them so, quantised."""


class LayerOps(Protocol[X]):
    """A device's operations on one step, which holds its residual h [N, hidden].

    What an operation returns may be parts that the next `add_and_norm` sums. A norm knows the product that reads it.
    """

    def norm(self, weight: torch.Tensor, reader: Linear) -> X:
        """Of the residual."""
        ...

    def attention(self, index: int, layer: LayerWeights, x: X) -> torch.Tensor | None:
        """What layer number `index` adds to the residual, with keys and values written to the pool. None: no token of
        the step draws and this is the last layer, so that nothing behind its keys and values is of use."""
        ...

    def mlp(self, layer: LayerWeights, x: X) -> torch.Tensor:
        """What the layer's MLP adds to the residual."""
        ...

    def add_and_norm(
        self, added: torch.Tensor, output_norm: torch.Tensor | None, weight: torch.Tensor, reader: Linear
    ) -> X:
        """The residual takes `added`, normed by `output_norm` if there is one; its norm."""
        ...

    def finish(self, added: torch.Tensor, output_norm: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """The same behind the last layer, of the tokens that draw, plain: [drawn, hidden]."""
        ...


def run_layers(weights: Weights, ops: LayerOps[X], indices: Iterable[int]) -> torch.Tensor | None:
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
        x = ops.add_and_norm(attended, layer.attention_output_norm, layer.post_norm, layer.mlp.gate_up)
        added = ops.mlp(layer, x)
        if index + 1 == len(layers):
            return ops.finish(added, layer.mlp_output_norm, weights.norm)
        following = layers[index + 1]
        x = ops.add_and_norm(added, layer.mlp_output_norm, following.input_norm, following.attention.qkv)
    raise InvariantBroken("the last layer was left out")
