"""A GPU's operations of a layer as launches of kernels, and whole steps with them, in the order of models.layer_order.

A layer of a decode step is eight launches: qkv · rope and KV write · attention · o · add and norm · gate_up with silu ·
down · add and norm; parts of split products are summed by the launch after, and with them those of other ranks, where
ranks share the model. `experts` launches what experts compute. Nothing is allocated, nothing waits for the GPU, and
every launch reads and writes fixed memory, so that a decode step can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from baton.kernels import Linear
from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.linear_policy import ProductShape
from baton.kernels.triton.low_rank import AddedProduct
from baton.kernels.triton.norm import add_rms_norm, rms_norm
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.rank_words import RankInbox
from baton.kernels.triton.rope_write import HeadNorms, RopeTables, rope_and_write
from baton.kernels.triton.routed_sum import RoutedSum
from baton.kernels.triton.step_inputs import StepInputs
from baton.kernels.triton.whole_norm import whole_norm
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_steps import AdapterSteps
from baton.models.cuda.attention import Attend, attend_rows, grouped_shapes
from baton.models.cuda.experts import ExpertBlocks, plan_experts
from baton.models.cuda.latent import LatentLayers
from baton.models.cuda.products import PADDING, Policy, Products, Rows, plain, shape_of
from baton.models.families import SILU
from baton.models.layer_order import Tap, no_tap, run_layers
from baton.models.layer_weights import (
    AttentionWeights,
    DenseMlpWeights,
    ExpertsWeights,
    LayerWeights,
    Mlp,
    Weights,
)
from baton.models.layers import DenseMlp, ExpertsMlp
from baton.models.rope import inverse_frequencies
from baton.models.rope_config import RopeConfig
from baton.models.vector_math import prepare_vector_math
from baton.node.errors import InvariantBroken

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
class _Step:
    """What a step computes: N tokens, which are not changed while it runs."""

    tokens: torch.Tensor  # [N] int32
    positions: torch.Tensor  # [N] int32
    kv_slots: torch.Tensor  # [N] int32
    attend: Attend
    drawn: torch.Tensor | None = None
    """The tokens, by number (int32), that are computed behind the last layer's attention; None: all."""
    pdl: bool = False
    adapters: AdapterRows | None = None


class DeviceDecoder:
    """One model's forward over one pool: the StepDecoder of all models that models.layers describes."""

    captured = True

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        policy: Policy,
        max_tokens: int,
        max_drawn: int,
        max_len: int,
        sums: RankInbox | None = None,
        adapters: AdapterSteps | None = None,
        tap: Tap = no_tap,
    ) -> None:
        """Room for steps of up to max_tokens tokens and max_drawn rows that draw, with positions below max_len.

        sums: the weights are a rank's, config its part_of the model's, and what layers add is exchanged here.
        adapters: of a decoder whose steps may have rows with adapters. tap: called in each layer of a step.
        """
        self._config, self._weights, self._sums, self._adapters = config, weights, sums, adapters
        self._tap = tap
        dtype, device = weights.embedding.dtype, str(weights.embedding.device)
        mlps = [layer.shape.mlp for layer in weights.layers]
        mlp_width = max((mlp.width for mlp in mlps if isinstance(mlp, DenseMlp)), default=0)
        qkv = weights.layers[0].attention.qkv.num_outputs
        self._act = Activations.make(config, qkv, mlp_width, max_tokens, max_drawn, dtype, device)
        self._products = Products(policy, max_tokens, product_shapes(weights), dtype, device)
        self._latent = LatentLayers(weights, self._products, max_tokens, max_drawn) if config.latent else None
        self._experts = plan_experts(weights, self._products, policy, max_tokens)
        ropes = {layer.shape.attention.rope for layer in weights.layers}
        tables = {rope: rope_tables(rope, max_len, device) for rope in ropes}
        self._ropes = [tables[layer.shape.attention.rope] for layer in weights.layers]
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._norms = [
            None if norms is None else HeadNorms(norms, config.rms_norm_eps)
            for norms in (head_norms(layer) for layer in weights.layers)
        ]
        self._pool: PagedPool | None = None
        self._indices: Sequence[int] = range(len(weights.layers))

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    def bind_pool(self, pool: PagedPool) -> None:
        self._pool = pool

    @contextmanager
    def abridged(self) -> Iterator[None]:
        """Inside, steps leave out layers that launch only what others launch. What they compute is of no use."""
        shapes = [layer.shape for layer in self._weights.layers]
        self._indices = sorted({*map(shapes.index, shapes), len(shapes) - 1})
        try:
            yield
        finally:
            self._indices = range(len(shapes))

    def decode(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocab] of one new token a row; with the rows' adapters."""
        attend = self.attend_rows(inputs, plan, scratch, pdl)
        step = _Step(inputs.tokens, inputs.positions, inputs.kv_slots, attend, pdl=pdl, adapters=adapters)
        normed = self._layers(step)
        assert normed is not None, "all rows draw"
        return self._logits(normed, pdl)

    def attend_rows(self, inputs: StepInputs, plan: DecodePlan, scratch: DecodeScratch, pdl: bool) -> Attend:
        """Attention of one new token a row."""
        if self._latent is not None:
            return self._latent.attend_rows(self._bound(), inputs, plan, scratch, pdl)
        shapes = grouped_shapes(layer.shape for layer in self._weights.layers)
        return attend_rows(shapes, self._weights.sinks, self._bound(), inputs, plan, scratch, pdl)

    def last_logits(self, num_rows: int) -> torch.Tensor:
        """[num_rows, vocab] of the step that ran last, valid until the next runs."""
        return self._act.logits[:num_rows]

    def prefill(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        drawn: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:
        """Logits of the tokens number `drawn` (int32) of a step become `last_logits`; the other arrays are int32 [N].

        The tokens may be those of chunks and of decode rows together, if `attend` attends for both. Keys and values are
        written for all; behind the last layer's attention only drawn tokens are computed.
        """
        normed = self._layers(_Step(tokens, positions, kv_slots, attend, drawn, adapters=adapters))
        if normed is not None:
            self._logits(normed, pdl=False)

    def prefill_scored(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        drawn: torch.Tensor,
        parts: Sequence[tuple[int, int]],
        take: Callable[[torch.Tensor, int], None],
        adapters: AdapterRows | None = None,
    ) -> None:
        """As `prefill`; before, `take` gets the logits behind tokens begin .. end - 1 of each part, and its number.

        They are valid until it returns.
        """
        normed = self._layers(_Step(tokens, positions, kv_slots, attend, adapters=adapters))
        assert normed is not None, "all tokens are computed to the end"
        for number, (begin, end) in enumerate(parts):
            take(self._logits(normed[begin:end], pdl=False), number)
        if count := len(drawn):
            self._logits(torch.index_select(normed, 0, drawn, out=self._act.last[:count]), pdl=False)

    def _layers(self, step: _Step) -> torch.Tensor | None:
        """The final norm's output, [N, hidden], or of the drawn tokens; None if they are none."""
        act, config = self._act, self._config
        # Not launched early: what attention reads before it waits, lengths and work, is complete when the chain begins.
        residual = torch.index_select(self._weights.embedding, 0, step.tokens, out=act.residual[: len(step.tokens)])
        if self._embedding_scale != 1.0:
            residual.mul_(self._embedding_scale)

        def rope_and_write_layer(index: int, qkv: torch.Tensor, query: torch.Tensor) -> None:
            norms, pool, rope = self._norms[index], self._bound(), self._ropes[index]
            self._tap(index, residual)
            if self._latent is not None:
                places = step.positions, step.kv_slots
                self._latent.write(index, qkv, *places, rope, pool, query, pdl=step.pdl)
            else:
                rope_and_write(qkv, step.positions, step.kv_slots, rope, norms, pool, index, query, pdl=step.pdl)

        last = config.num_layers - 1
        products, experts = _StepProducts(self._products, self._adapters, step), self._experts
        ops = _StepOps(act, products, experts, step, rope_and_write_layer, last, config.rms_norm_eps, self._sums)
        return run_layers(self._weights, ops, self._indices)

    def _logits(self, normed: torch.Tensor, pdl: bool) -> torch.Tensor:
        logits = self._act.logits[: len(normed)]
        self._products.whole(self._weights.lm_head, normed, logits, pdl=pdl)
        softcap = self._config.logit_softcap
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def _bound(self) -> PagedPool:
        if self._pool is None:
            raise InvariantBroken("no pool is bound")
        return self._pool


class _StepProducts:
    """Products of one step, with what the adapters of its rows add to them."""

    def __init__(self, products: Products, adapters: AdapterSteps | None, step: _Step) -> None:
        self._products, self._adapters = products, adapters
        self._rows, self._pdl = step.adapters, step.pdl

    def keep(self, drawn: torch.Tensor) -> None:
        """From now on the step has these of its rows."""
        if self._rows is not None:
            assert self._adapters is not None, "a step with adapters of a decoder without"
            self._rows = self._adapters.keep(self._rows, drawn)

    def codes_for(self, reader: Linear, num_rows: int) -> Rows | None:
        """As Products; adapters multiply plain rows."""
        return self._products.codes_for(reader, num_rows) if self._rows is None else None

    def __call__(self, layer: int, name: str, weights: Linear, x: Rows, out: torch.Tensor) -> torch.Tensor:
        """name: as BankLayout has it."""
        return self._products(weights, x, out, self._added(layer, name, x), pdl=self._pdl)

    def gated(self, layer: int, gate_up: Linear, x: Rows, out: torch.Tensor, reader: Linear) -> Rows:
        added = self._added(layer, "gate_up", x)
        following = reader if self._rows is None else None
        return self._products.gated(gate_up, x, out, following, added, pdl=self._pdl)

    def gelu_gated(
        self, layer: int, gate_up: Linear, x: Rows, wide: torch.Tensor, out: torch.Tensor, reader: Linear
    ) -> Rows:
        added = self._added(layer, "gate_up", x)
        return self._products.gelu_gated(gate_up, x, wide, out, reader, added, pdl=self._pdl)

    def _added(self, layer: int, name: str, x: Rows) -> AddedProduct | None:
        if self._rows is None:
            return None
        assert self._adapters is not None, "a step with adapters of a decoder without"
        return self._adapters.added(layer, name, plain(x), self._rows, pdl=self._pdl)


class _StepOps:
    """models.layer_order.LayerOps of one step, over the memory that all steps share."""

    def __init__(
        self,
        act: Activations,
        products: _StepProducts,
        experts: ExpertBlocks | None,
        step: _Step,
        rope_and_write: Callable[[int, torch.Tensor, torch.Tensor], None],
        last: int,
        eps: float,
        sums: RankInbox | None,
    ) -> None:
        """last: number of the last layer."""
        self._sums = sums
        self._act, self._products, self._experts, self._step = act, products, experts, step
        self._kv_slots: torch.Tensor | None = step.kv_slots
        self._index = 0  # of the layer
        self._rope_and_write, self._last, self._eps = rope_and_write, last, eps
        num_tokens = len(step.tokens)
        self._residual, self._qkv = act.residual[:num_tokens], act.qkv[:num_tokens]
        self._query, self._attended = act.query[:num_tokens], act.attended[:num_tokens]
        self._normed, self._mixed = act.normed[:num_tokens], act.mixed[:num_tokens]
        self._gated, self._flat = act.gated[:num_tokens], self._attended.view(num_tokens, -1)

    def norm(self, weight: torch.Tensor, reader: Linear) -> Rows:
        out = self._for(reader)
        rms_norm(self._residual, weight, self._eps, out, pdl=self._step.pdl)
        return out

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
            return self._experts(shape, mlp, plain(x), self._kv_slots, pdl=self._step.pdl)
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


def head_norms(layer: LayerWeights) -> torch.Tensor | None:
    """Weights of the norms of query and key heads; None where the layer has none."""
    return layer.attention.head_norms if isinstance(layer.attention, AttentionWeights) else None


def product_shapes(weights: Weights) -> tuple[ProductShape, ...]:
    """Of all products of the model but those of experts, each once."""
    shapes = [shape_of(weights.lm_head)]
    for layer in weights.layers:
        mlp = layer.mlp
        shapes += map(shape_of, layer.attention.held)
        if (dense := dense_part(mlp)) is not None:
            shapes += [shape_of(dense.gate_up, fused=layer.shape.mlp.activation == SILU), shape_of(dense.down)]
    return tuple(dict.fromkeys(shapes))


def dense_part(mlp: Mlp) -> DenseMlpWeights | None:
    """The MLP itself, or the shared expert; None: there is none."""
    return mlp if isinstance(mlp, DenseMlpWeights) else mlp.shared


def rope_tables(rope: RopeConfig, max_len: int, device: str) -> RopeTables:
    """float32 [max_len, rotary_dim / 2]: rounded from float64, so that the bits do not depend on the host's CPU."""
    prepare_vector_math()
    angles = (torch.arange(max_len, dtype=torch.float32)[:, None] * inverse_frequencies(rope)).double()
    factor = rope.attention_factor
    return RopeTables((angles.cos() * factor).float().to(device), (angles.sin() * factor).float().to(device))
