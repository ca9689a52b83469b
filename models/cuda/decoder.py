"""One model's steps on a GPU: tokens in, logits out, layer by layer in the order of models.layer_order.

What a layer launches is in `step_ops`. Nothing is allocated, nothing waits for the GPU, and every launch reads and
writes fixed memory, so that a decode step can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.linear_policy import ProductShape
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.rank_words import RankInbox
from baton.kernels.triton.rope_write import HeadNorms, RopeTables, rope_and_write
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_steps import AdapterSteps
from baton.models.cuda.attention import Attend, attend_rows, grouped_shapes
from baton.models.cuda.experts import plan_experts
from baton.models.cuda.latent import LatentLayers
from baton.models.cuda.products import Policy, Products, Rows, shape_of
from baton.models.cuda.step_ops import Activations, Step, StepOps
from baton.models.cuda.step_products import StepProducts
from baton.models.families import SILU
from baton.models.layer_order import Tap, begin_layers, end_layers, no_tap
from baton.models.layer_weights import (
    AttentionWeights,
    DenseMlpWeights,
    LayerWeights,
    Mlp,
    Weights,
)
from baton.models.layers import DenseMlp
from baton.models.partition import ONLY_STAGE, Stage
from baton.models.rope import inverse_frequencies
from baton.models.rope_config import RopeConfig
from baton.models.vector_math import prepare_vector_math
from baton.node.errors import InvariantBroken

EndPrefill = Callable[[Step], None]
"""Launches what is left of a step of prompts that has begun."""


class DeviceDecoder:
    """One model's forward over one pool: the StepDecoder of all models that models.layers describes.

    That of a stage computes its layers of steps of prompts. They enter it, and leave it, as `residual`.
    """

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
        stage: Stage = ONLY_STAGE,
    ) -> None:
        """Room for steps of up to max_tokens tokens and max_drawn rows that draw, with positions below max_len.

        sums: the weights are a rank's, config its part_of the model's, and what layers add is exchanged here.
        adapters: of a decoder whose steps may have rows with adapters. tap: called in each layer of a step. stage: the
        weights are a stage's, and config its part_of the model's.
        """
        if not stage.is_last:  # its last sum is of a kernel that norms too, into memory that nothing reads
            weights = replace(weights, norm=weights.layers[-1].post_norm)
        self._config, self._weights, self._sums, self._adapters = config, weights, sums, adapters
        self._tap, self._stage = tap, stage
        dtype, device = weights.embedding.dtype, str(weights.embedding.device)
        mlps = [layer.shape.mlp for layer in weights.layers]
        mlp_width = max((mlp.width for mlp in mlps if isinstance(mlp, DenseMlp)), default=0)
        qkv = weights.layers[0].attention.qkv.num_outputs
        self._act = Activations.make(config, qkv, mlp_width, max_tokens, max_drawn, dtype, device)
        self._products = Products(policy, max_tokens, product_shapes(weights, head=stage.is_last), dtype, device)
        self._latent = LatentLayers(weights, max_tokens, max_drawn) if config.latent else None
        pair_width = 0 if adapters is None else adapters.expert_width
        self._experts = plan_experts(weights, policy, max_tokens, pair_width)
        ropes = {layer.shape.attention.rope for layer in weights.layers}
        tables = {rope: rope_tables(rope, max_len, device) for rope in ropes}
        self._ropes = [tables[layer.shape.attention.rope] for layer in weights.layers]
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._norms = [
            None if norms is None else HeadNorms(norms, config.rms_norm_eps)
            for norms in (head_norms(layer) for layer in weights.layers)
        ]
        self._pool: PagedPool | None = None
        self._indices: Iterable[int] = range(len(weights.layers) - 1)  # of the layers before the last

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    def bind_pool(self, pool: PagedPool) -> None:
        self._pool = pool

    @contextmanager
    def abridged(self) -> Iterator[None]:
        """Inside, steps leave out layers that launch only what others launch. What they compute is of no use."""
        shapes = [layer.shape for layer in self._weights.layers[:-1]]
        self._indices = sorted(set(map(shapes.index, shapes)))
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
        attend = self.attend_rows(inputs, plan, scratch, pdl, adapters)
        step = Step(inputs.tokens, inputs.positions, inputs.kv_slots, attend, pdl=pdl, adapters=adapters)
        normed = self._layers(step)
        assert normed is not None, "all rows draw"
        return self._logits(normed, pdl, adapters)

    def attend_rows(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> Attend:
        """As StepDecoder says."""
        if self._latent is not None:
            pairs = None if adapters is None else self._adapted().latent_pairs(adapters)
            return self._latent.attend_rows(self._bound(), inputs, plan, scratch, pdl, pairs)
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
        written for all; behind the last layer's attention only drawn tokens are computed. A stage before the last
        computes all tokens to its end, and no logits.
        """
        step = Step(tokens, positions, kv_slots, attend, drawn, adapters=adapters)
        self.begin(step)(step)

    def _end_prefill(self, x: Rows, step: Step) -> None:
        assert step.drawn is not None, "known by now"
        normed = self._end(step, x)
        if normed is not None:
            self._logits(normed, pdl=False, adapters=self._head_rows(step.adapters, step.drawn))

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
        normed = self._layers(Step(tokens, positions, kv_slots, attend, adapters=adapters))
        assert normed is not None, "all tokens are computed to the end"
        for number, (begin, end) in enumerate(parts):
            own = None if adapters is None else self._adapted().head_span(adapters, begin, end)
            take(self._logits(normed[begin:end], pdl=False, adapters=own), number)
        if count := len(drawn):
            last = torch.index_select(normed, 0, drawn, out=self._act.last[:count])
            self._logits(last, pdl=False, adapters=self._head_rows(adapters, drawn))

    def _layers(self, step: Step) -> torch.Tensor | None:
        """The final norm's output, [N, hidden], or of the drawn tokens; None if they are none."""
        return self._end(step, self._begin(step))

    def begin(self, step: Step) -> EndPrefill:
        """Launch what depends on no draw: all layers but the last, or all layers of a stage before the last. What it
        returns ends any step of so many tokens, whose memory is the same."""
        x = self._begin(step)
        if self._stage.is_last:
            return partial(self._end_prefill, x)
        self._end(step, x)
        return _end_nothing

    def _begin(self, step: Step) -> Rows:
        """All layers but the last; what that one reads."""
        products = self._products_of(step)
        if self._stage.is_first:
            self._embed(step, products)
        return begin_layers(self._weights, self._ops(step, products, 0), self._indices)

    def _embed(self, step: Step, products: StepProducts) -> None:
        # Not launched early: what attention reads before it waits, lengths and work, is complete when the chain begins.
        residual = self.residual(len(step.tokens))
        torch.index_select(self._weights.embedding, 0, step.tokens, out=residual)
        products.embed(step.tokens, residual)
        if self._embedding_scale != 1.0:
            residual.mul_(self._embedding_scale)

    def _end(self, step: Step, x: Rows) -> torch.Tensor | None:
        """The last layer, of which two norms are left."""
        num_norms = 2 * len(self._weights.layers) - 1
        return end_layers(self._weights, self._ops(step, self._products_of(step), num_norms), x)

    def residual(self, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden]: of a step while it runs; of a stage, with which the step enters and leaves it."""
        return self._act.residual[:num_tokens]

    def _products_of(self, step: Step) -> StepProducts:
        return StepProducts(self._products, self._adapters, step.adapters, pdl=step.pdl)

    def _ops(self, step: Step, products: StepProducts, num_norms: int) -> StepOps:
        """num_norms: of the step that were computed."""
        config, residual = self._config, self.residual(len(step.tokens))

        def rope_and_write_layer(index: int, qkv: torch.Tensor, query: torch.Tensor) -> None:
            norms, pool, rope = self._norms[index], self._bound(), self._ropes[index]
            self._tap(index, residual)
            if self._latent is not None:
                places = step.positions, step.kv_slots
                self._latent.write(index, qkv, *places, rope, pool, query, products, pdl=step.pdl)
            else:
                rope_and_write(qkv, step.positions, step.kv_slots, rope, norms, pool, index, query, pdl=step.pdl)

        last, eps = config.num_layers - 1 if self._stage.is_last else None, config.rms_norm_eps
        return StepOps(self._act, products, self._experts, step, rope_and_write_layer, last, eps, self._sums, num_norms)

    def _head_rows(self, adapters: AdapterRows | None, drawn: torch.Tensor) -> AdapterRows | None:
        """As AdapterSteps, of some tokens."""
        return None if adapters is None else self._adapted().head_rows(adapters, drawn)

    def _adapted(self) -> AdapterSteps:
        assert self._adapters is not None, "a step with adapters of a decoder without"
        return self._adapters

    def _logits(self, normed: torch.Tensor, pdl: bool, adapters: AdapterRows | None) -> torch.Tensor:
        """adapters: of these rows."""
        logits = self._act.logits[: len(normed)]
        self._products.whole(self._weights.lm_head, normed, logits, pdl=pdl)
        if adapters is not None:
            self._adapted().head(normed, adapters, logits)
        softcap = self._config.logit_softcap
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def _bound(self) -> PagedPool:
        if self._pool is None:
            raise InvariantBroken("no pool is bound")
        return self._pool


def _end_nothing(step: Step) -> None:
    """Of a step that has ended."""


def head_norms(layer: LayerWeights) -> torch.Tensor | None:
    """Weights of the norms of query and key heads; None where the layer has none."""
    return layer.attention.head_norms if isinstance(layer.attention, AttentionWeights) else None


def product_shapes(weights: Weights, *, head: bool = True) -> tuple[ProductShape, ...]:
    """Of all products of the model but those of experts, each once; head: it has one."""
    shapes = [shape_of(weights.lm_head)] if head else []
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
