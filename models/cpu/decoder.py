"""The CPU's operations of a layer, and a whole step with them: token ids in, logits out.

The order of a layer's parts is that of models.layer_order, which a GPU follows too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from baton import kernels
from baton.kernels import Linear
from baton.models.config import ModelConfig
from baton.models.cpu.adapters import NO_ADAPTERS, RowAdapters
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.latent import absorbed, raised
from baton.models.cpu.peers import NO_PEERS, RankPeers
from baton.models.cpu.step_batch import StepBatch
from baton.models.families import GELU_TANH, SILU
from baton.models.layer_order import Tap, no_tap, run_layers
from baton.models.layer_weights import (
    AttentionWeights,
    DenseMlpWeights,
    ExpertsWeights,
    LatentWeights,
    LayerWeights,
    Weights,
)
from baton.models.layers import ExpertsMlp, GroupedAttention, LatentAttention
from baton.models.partition import ONLY_STAGE, Stage
from baton.models.rope import inverse_frequencies, rotations
from baton.models.rope_config import RopeConfig

Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS = {SILU: kernels.silu_and_mul, GELU_TANH: kernels.gelu_tanh_and_mul}
"""Of an MLP's gate."""


class Decoder(Protocol):
    """A model that a CPU runner computes steps with."""

    def __call__(self, attention: PagedAttention, step: StepBatch, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        """What logits are made of, [kept tokens, hidden]; keys and values of all tokens are in the pool afterwards. Of
        a stage before the last, the residual [N, hidden] of all tokens, with which the next one enters. adapters: of
        the step's tokens."""
        ...

    def logits(self, hidden: torch.Tensor, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        """float32 [n, vocab] of hidden [n, hidden]; of a rank, its share of the vocabulary. adapters: of its rows."""
        ...


class DenseDecoder:
    """The decoder of all families that models.layers describes, or a part of it: a rank's, a stage's, or both."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        peers: RankPeers = NO_PEERS,
        tap: Tap = no_tap,
        stage: Stage = ONLY_STAGE,
    ) -> None:
        """tap: called before each layer of a step."""
        self._config, self._weights, self._peers, self._tap, self._stage = config, weights, peers, tap, stage
        ropes = {layer.shape.attention.rope for layer in weights.layers}
        self._frequencies = {rope: inverse_frequencies(rope).to(weights.embedding.device) for rope in ropes}
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=weights.embedding.dtype)

    def __call__(self, attention: PagedAttention, step: StepBatch, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        config, weights = self._config, self._weights
        ropes = {
            rope: rotations(step.positions, frequencies, rope.attention_factor, weights.embedding.dtype)
            for rope, frequencies in self._frequencies.items()
        }
        residual = self._embed(step.token_ids, adapters) if step.entering is None else step.entering  # [N, hidden]
        first_norm = 2 * self._stage.layers(config.num_layers).start
        shared = self._peers, adapters, self._tap, self._stage.is_last, first_norm
        ops = _StepOps(config.rms_norm_eps, attention, step, ropes, residual, *shared)
        normed = run_layers(weights, ops)
        assert normed is not None, "the operations below leave no layer out"
        return normed

    def _embed(self, token_ids: torch.Tensor, adapters: RowAdapters) -> torch.Tensor:
        rows = adapters.add_embedding(token_ids, F.embedding(token_ids, self._weights.embedding))
        return rows if self._config.embedding_scale == 1.0 else rows.mul_(self._embedding_scale)

    def logits(self, hidden: torch.Tensor, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        logits = adapters.add_head(hidden, self._weights.lm_head(hidden)).float()
        softcap = self._config.logit_softcap
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class _StepOps:
    """models.layer_order.LayerOps of one step."""

    def __init__(
        self,
        eps: float,
        attention: PagedAttention,
        step: StepBatch,
        ropes: Mapping[RopeConfig, tuple[torch.Tensor, torch.Tensor]],
        residual: torch.Tensor,
        peers: RankPeers,
        adapters: RowAdapters,
        tap: Tap,
        is_last: bool,
        first_norm: int,
    ) -> None:
        """ropes: the rotations of the step's positions; is_last: logits are made of what the layers leave; first_norm:
        the number of the first norm, two a layer."""
        self._tap = tap
        self._eps, self._attention, self._step, self._ropes = eps, attention, step, ropes
        self._residual, self._peers, self._adapters = residual, peers, adapters
        self._is_last, self._layer, self._num_norms = is_last, 0, first_norm

    def norm(self, weight: torch.Tensor, reader: Linear) -> torch.Tensor:
        return self._adapted(kernels.rms_norm(self._residual, weight, self._eps))

    def attention(self, index: int, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        shape, weights, self._layer = layer.shape.attention, layer.attention, index
        self._tap(index, self._residual)
        if isinstance(shape, LatentAttention):
            assert isinstance(weights, LatentWeights), "the weights are of this shape"
            product, pairs = partial(self._adapters.product, index), tuple(self._adapters.pairs(index, "kv_up"))
            query, row = absorbed(shape, weights, x, self._ropes[shape.rope], product, pairs)
            attended = raised(shape, weights, self._attention(index, query, row, self._step), pairs)
            return self._peers.sum(self._adapters.product(index, "o", weights.o, attended))
        assert isinstance(weights, AttentionWeights), "the weights are of this shape"
        query, kv = self._project(shape, weights, x)
        attended = self._attention(index, query, kv, self._step, weights.sinks)
        return self._peers.sum(self._adapters.product(index, "o", weights.o, attended))

    def mlp(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        activation = ACTIVATIONS[layer.shape.mlp.activation]
        if isinstance(layer.mlp, DenseMlpWeights):
            return self._peers.sum(self._dense_mlp(layer.mlp, x, activation))
        assert isinstance(layer.shape.mlp, ExpertsMlp), "the weights are of this shape"
        return self._peers.sum(self._experts_mlp(layer.shape.mlp, layer.mlp, x, activation))

    def _dense_mlp(self, mlp: DenseMlpWeights, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate_up = self._adapters.product(self._layer, "gate_up", mlp.gate_up, x)
        active = activation(gate_up)
        return self._adapters.product(self._layer, "down", mlp.down, active)

    def _experts_mlp(
        self, shape: ExpertsMlp, mlp: ExpertsWeights, x: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        logits = self._adapters.product(self._layer, "router", mlp.router, x.float())
        experts, weights = kernels.route(logits, mlp.correction, shape.routing)
        of_expert = activation if shape.clamped is None else partial(kernels.clamped_gate_and_mul, gate=shape.clamped)
        added_to = partial(self._adapters.add_to_expert, self._layer)
        products, first = (mlp.gate_up, mlp.down), shape.experts.start
        added = kernels.apply_experts(x, experts, weights, *products, of_expert, first, added_to)
        if mlp.shared is not None:
            shared = self._dense_mlp(mlp.shared, x, activation)
            if mlp.shared_gate is not None:
                shared *= self._adapters.product(self._layer, "shared_gate", mlp.shared_gate, x).sigmoid_()
            added += shared
        return added

    def add_and_norm(
        self, added: torch.Tensor, output_norm: torch.Tensor | None, weight: torch.Tensor, reader: Linear
    ) -> torch.Tensor:
        return self._add_and_norm(added, output_norm, weight)

    def _add_and_norm(
        self,
        added: torch.Tensor,
        output_norm: torch.Tensor | None,
        weight: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        added = self._output_normed(added, output_norm)
        normed, self._residual = kernels.add_rms_norm(added, self._residual, weight, self._eps)
        return self._adapted(normed, kept)

    def _adapted(self, normed: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """The next norm of the step, with what adapters have in its place; kept: the tokens that are left."""
        number, self._num_norms = self._num_norms, self._num_norms + 1
        return self._adapters.norm(number, self._residual, normed, self._eps, kept)

    def _output_normed(self, added: torch.Tensor, output_norm: torch.Tensor | None) -> torch.Tensor:
        return added if output_norm is None else kernels.rms_norm(added, output_norm, self._eps)

    def finish(self, added: torch.Tensor, output_norm: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        if not self._is_last:
            return self._residual.add_(self._output_normed(added, output_norm))
        kept = self._step.kept_tokens
        if kept is not None:
            added, self._residual = added[kept], self._residual[kept]
        return self._add_and_norm(added, output_norm, weight, kept)

    def _project(
        self, shape: GroupedAttention, weights: AttentionWeights, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, num_heads, head_dim]; rotated keys and values [N, 2, num_kv_heads * head_dim]."""
        qkv = self._adapters.product(self._layer, "qkv", weights.qkv, x)
        heads = qkv.view(len(qkv), -1, shape.head_dim)  # [N, num_heads + 2 num_kv_heads, head_dim]
        query_key = heads[:, : shape.num_heads + shape.num_kv_heads]
        if weights.whole_norms is not None:
            sizes = [len(weight) for weight in weights.whole_norms]
            for part, weight in zip(qkv[:, : sum(sizes)].split(sizes, -1), weights.whole_norms, strict=True):
                part.copy_(kernels.rms_norm(part, weight, self._eps))
        if weights.head_norms is not None:
            query_key.copy_(kernels.rms_norm(query_key, weights.head_norms, self._eps))
        kernels.apply_rope(query_key[..., : shape.rope.rotary_dim], *self._ropes[shape.rope])
        return heads[:, : shape.num_heads], qkv[:, shape.num_heads * shape.head_dim :].view(len(qkv), 2, -1)
