"""The weights of a decoder's layers, as models.layers describes them.

Where a tensor lies in a checkpoint is the part of models.allocation, and how one multiplies by it that of the device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import torch

from baton.kernels import DenseLinear, ExpertLinears, HeldWeight, Linear
from baton.models.layers import LayerShape


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    qkv: Linear  # [Q + 2 K, hidden]
    head_norms: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: the query's for each head, then the key's
    o: Linear  # [hidden, Q]
    whole_norms: tuple[torch.Tensor, torch.Tensor] | None = None  # [Q], [K]: of all query heads, of all key heads
    sinks: torch.Tensor | None = None  # float32 [num_heads]

    @property
    def held(self) -> tuple[Linear, ...]:
        return self.qkv, self.o

    @property
    def plain(self) -> tuple[torch.Tensor, ...]:
        """What is no product."""
        return tuple(each for each in (self.head_norms, *(self.whole_norms or ()), self.sinks) if each is not None)


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
    """Of an ExpertsMlp. The products of a clamped gate have biases."""

    router: DenseLinear  # [num_experts, hidden], of the experts of all ranks; with a bias of its type, or none
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
    def sinks(self) -> tuple[torch.Tensor | None, ...]:
        """Of each layer's attention."""
        return tuple(getattr(layer.attention, "sinks", None) for layer in self.layers)

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
