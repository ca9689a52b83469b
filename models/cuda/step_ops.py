"""A GPU's operations of one step as launches of kernels, over memory that all steps share: models.layer_order.LayerOps.

A layer of a decode step is eight launches: qkv · rope and KV write · attention · o · add and norm · gate_up with silu ·
down · add and norm; parts of split products are summed by the launch after, and with them those of other ranks, where
ranks share the model. `experts` launches what experts compute. Nothing is allocated, and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.kernels import Linear
from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.norm import add_rms_norm, rms_norm
from baton.kernels.triton.rank_words import RankInbox
from baton.kernels.triton.routed_sum import RoutedSum
from baton.kernels.triton.whole_norm import whole_norm
from baton.models.config import ModelConfig
from baton.models.cuda.attention import Attend
from baton.models.cuda.experts import ExpertBlocks
from baton.models.cuda.products import PADDING, Rows, plain
from baton.models.cuda.step_products import StepProducts
from baton.models.families import SILU
from baton.models.layer_weights import (
    AttentionWeights,
    ExpertsWeights,
    LayerWeights,
)
from baton.models.layers import ExpertsMlp

Added = torch.Tensor | RoutedSum
"""What a layer adds to the residual, [N, hidden], or the parts of it [splits, N, hidden]."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Memory of a step of up to `rows` tokens, of which up to `drawn` draw; steps follow one another in it.
    PADDING more rows are of use to products alone."""

    residual: torch.Tensor  # [rows, hidden]
    normed: torch.Tensor  # [rows, hidden]
    mixed: torch.Tensor  # [rows, hidden]
    qkv: torch.Tensor  # [rows, outputs of the product before attention]
    query: torch.Tensor  # [rows, H, D]
    attended: torch.Tensor  # [rows, H, V]: elements of a value, no more than D
    gated: torch.Tensor  # [rows, width of the MLPs]
    wide: torch.Tensor  # [rows, 2 * width of the MLPs]; empty where gate and up meet inside the product
    last: torch.Tensor  # [drawn, hidden]
    logits: torch.Tensor  # [drawn, vocab]

    @classmethod
    def make(
        cls, config: ModelConfig, qkv: int, mlp_width: int, rows: int, drawn: int, dtype: torch.dtype, device: str
    ) -> Activations:
        """qkv: outputs of the product before attention. mlp_width: of dense MLPs; 0: there are none."""
        rows += PADDING

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)  # padding is computed too, and must be finite

        heads, latent = config.num_heads, config.latent
        dim, value = (latent.query_dim, latent.value_dim) if latent else (config.head_dim, config.head_dim)
        return cls(
            zeros(rows, config.hidden_size),
            zeros(rows, config.hidden_size),
            zeros(rows, config.hidden_size),
            zeros(rows, qkv),
            zeros(rows, heads, dim),
            zeros(rows, heads, value),
            zeros(rows, mlp_width),
            zeros(rows, 0 if config.activation == SILU else 2 * mlp_width),
            zeros(drawn, config.hidden_size),
            zeros(drawn, config.vocab_size),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes: N tokens, which are not changed while it runs."""

    tokens: torch.Tensor  # [N] int32
    positions: torch.Tensor  # [N] int32
    kv_slots: torch.Tensor  # [N] int32
    attend: Attend
    drawn: torch.Tensor | None = None
    """The tokens, by number (int32), that are computed behind the last layer's attention; None: all."""
    pdl: bool = False
    adapters: AdapterRows | None = None


class StepOps:
    """models.layer_order.LayerOps of one step, over the memory that all steps share."""

    def __init__(
        self,
        act: Activations,
        products: StepProducts,
        experts: ExpertBlocks | None,
        step: Step,
        rope_and_write: Callable[[int, torch.Tensor, torch.Tensor], None],
        last: int | None,
        eps: float,
        sums: RankInbox | None,
        num_norms: int,
    ) -> None:
        """last: number of the last layer, which ends for tokens that draw alone; None: these layers compute all tokens
        to their end. num_norms: of the step that were computed."""
        self._sums = sums
        self._act, self._products, self._experts, self._step = act, products, experts, step
        self._kv_slots: torch.Tensor | None = step.kv_slots
        self._index = 0  # of the layer
        self._num_norms = num_norms
        self._rope_and_write, self._last, self._eps = rope_and_write, last, eps
        num_tokens = len(step.tokens)
        self._residual, self._qkv = act.residual[:num_tokens], act.qkv[:num_tokens]
        self._query, self._attended = act.query[:num_tokens], act.attended[:num_tokens]
        self._normed, self._mixed = act.normed[:num_tokens], act.mixed[:num_tokens]
        self._gated, self._flat = act.gated[:num_tokens], self._attended.view(num_tokens, -1)

    def norm(self, weight: torch.Tensor, reader: Linear) -> Rows:
        out = self._for(reader)
        rms_norm(self._residual, weight, self._eps, out, pdl=self._step.pdl)
        self._own_norm(out)
        return out

    def _own_norm(self, out: Rows) -> None:
        """Behind each norm of the step: what adapters have in its place."""
        self._products.norm(self._num_norms, self._residual, self._eps, out)
        self._num_norms += 1

    def _for(self, reader: Linear) -> Rows:
        """Where what `reader` multiplies next belongs."""
        return self._products.codes_for(reader, len(self._residual)) or self._normed

    def attention(self, index: int, layer: LayerWeights, x: Rows) -> Added | None:
        self._index = index
        qkv = self._products(index, "qkv", layer.attention.qkv, x, self._qkv)
        if isinstance(layer.attention, AttentionWeights) and layer.attention.whole_norms is not None:
            whole_norm(qkv, *layer.attention.whole_norms, self._eps, self._qkv, pdl=self._step.pdl)
            qkv = self._qkv
        self._rope_and_write(index, qkv, self._query)
        drawn = self._step.drawn if index == self._last else None
        if drawn is not None and not len(drawn):
            return None
        self._step.attend(index, self._query, self._attended)
        if drawn is not None:
            self._keep(drawn)
        return self._products(index, "o", layer.attention.o, self._flat, self._mixed)

    def _keep(self, drawn: torch.Tensor) -> None:
        """From now on the step has these of its tokens."""
        act, count = self._act, len(drawn)
        heads, value = self._attended.shape[1:]
        kept = act.query.view(-1)[: count * heads * value].view(count, heads, value)
        self._flat = torch.index_select(self._attended, 0, drawn, out=kept).view(count, -1)
        self._residual = torch.index_select(self._residual, 0, drawn, out=act.last[:count])
        self._normed, self._mixed, self._gated = self._normed[:count], self._mixed[:count], self._gated[:count]
        self._kv_slots = None
        self._products.keep(drawn)

    def mlp(self, layer: LayerWeights, x: Rows) -> Added:
        mlp, shape = layer.mlp, layer.shape.mlp
        if isinstance(mlp, ExpertsWeights):
            assert isinstance(shape, ExpertsMlp) and self._experts is not None, "planned with the weights"
            return self._experts(shape, mlp, plain(x), self._products, self._index, self._kv_slots, pdl=self._step.pdl)
        if shape.activation == SILU:
            gated = self._products.gated(self._index, mlp.gate_up, x, self._gated, mlp.down)
        else:
            wide = self._act.wide[: len(self._residual)]
            gated = self._products.gelu_gated(self._index, mlp.gate_up, x, wide, self._gated, mlp.down)
        return self._products(self._index, "down", mlp.down, gated, self._mixed)

    def add_and_norm(
        self, added: Added, output_norm: torch.Tensor | None, weight: torch.Tensor, reader: Linear
    ) -> Rows:
        out = self._for(reader)
        self._add_and_norm(added, output_norm, weight, out)
        return out

    def finish(self, added: Added, output_norm: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        self._add_and_norm(added, output_norm, weight, self._normed)
        return self._normed

    def _add_and_norm(self, added: Added, output_norm: torch.Tensor | None, weight: torch.Tensor, out: Rows) -> None:
        add_rms_norm(
            added,
            self._residual,
            weight,
            self._eps,
            out,
            output_norm=output_norm,
            ranks=self._sums,
            pdl=self._step.pdl,
        )
        self._own_norm(out)
