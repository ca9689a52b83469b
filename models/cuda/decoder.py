"""The decoder of all supported families as launches of kernels: the GPU's counterpart of models.decoder, op for op.

A layer of a decode step is eight launches: qkv · rope and KV write · attention · o · add and norm · gate_up with silu ·
down · add and norm; parts of split products are summed by the launch after. Nothing is allocated, nothing waits for the
GPU, and every launch reads and writes fixed memory, so that a decode step can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from baton.kernels.triton.decode_attention import DecodeScratch, decode_attention
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.linear_policy import Shape
from baton.kernels.triton.norm import add_rms_norm, rms_norm
from baton.kernels.triton.rope_write import HeadNorms, RopeTables, rope_and_write
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.config import ModelConfig
from baton.models.cuda.products import Policy, Products
from baton.models.rope import inverse_frequencies
from baton.models.weights import Weights
from baton.node.errors import InvariantBroken

Attend = Callable[[int, torch.Tensor, torch.Tensor], None]
"""attend(layer, query [N, H, D], out [N, H, D]): attention of the step's tokens, whose keys and values are written."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Memory of a step of up to `rows` tokens, of which up to `drawn` draw; steps follow one another in it."""

    residual: torch.Tensor  # [rows, hidden]
    normed: torch.Tensor  # [rows, hidden]
    mixed: torch.Tensor  # [rows, hidden]
    qkv: torch.Tensor  # [rows, (H + 2 KH) * D]
    query: torch.Tensor  # [rows, H, D]
    attended: torch.Tensor  # [rows, H, D]
    gated: torch.Tensor  # [rows, intermediate]
    last: torch.Tensor  # [drawn, hidden]
    logits: torch.Tensor  # [drawn, vocab]

    @classmethod
    def make(cls, config: ModelConfig, rows: int, drawn: int, dtype: torch.dtype, device: str) -> Activations:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)  # padding is computed too, and must be finite

        heads, dim = config.num_heads, config.head_dim
        return cls(
            zeros(rows, config.hidden_size),
            zeros(rows, config.hidden_size),
            zeros(rows, config.hidden_size),
            zeros(rows, (heads + 2 * config.num_kv_heads) * dim),
            zeros(rows, heads, dim),
            zeros(rows, heads, dim),
            zeros(rows, config.intermediate_size),
            zeros(drawn, config.hidden_size),
            zeros(drawn, config.vocab_size),
        )


class DeviceDecoder:
    """One model's forward over one pool. Pool: [num_blocks, layers, 2, block_tokens, KH, D], of the weights' dtype."""

    def __init__(
        self, config: ModelConfig, weights: Weights, policy: Policy, max_tokens: int, max_drawn: int, max_len: int
    ) -> None:
        """Room for steps of up to max_tokens tokens and max_drawn rows that draw, with positions below max_len."""
        self._config, self._weights = config, weights
        dtype, device = weights.embedding.dtype, str(weights.embedding.device)
        self._act = Activations.make(config, max_tokens, max_drawn, dtype, device)
        self._products = Products(policy, max_tokens, product_shapes(config), dtype, device)
        self._rope = _rope_tables(config, max_len, device)
        self._norms = [
            None if layer.qk_norm is None else HeadNorms(layer.qk_norm, config.rms_norm_eps) for layer in weights.layers
        ]
        self._pool: torch.Tensor | None = None
        self._indices: Sequence[int] = range(config.num_layers)

    def bind_pool(self, pool: torch.Tensor) -> None:
        self._pool = pool

    @contextmanager
    def abridged(self) -> Iterator[None]:
        """Inside, steps leave out layers that launch only what others launch. What they compute is of no use."""
        windowed = self._config.windowed_layers
        self._indices = sorted({*map(windowed.index, windowed), len(windowed) - 1})
        try:
            yield
        finally:
            self._indices = range(len(windowed))

    def decode(self, inputs: StepInputs, plan: DecodePlan, scratch: DecodeScratch, pdl: bool) -> torch.Tensor:
        """Logits [rows, vocab] of one new token a row."""
        attend = self.attend_rows(inputs, plan, scratch, pdl)
        normed = self._layers(inputs.tokens, inputs.positions, inputs.kv_slots, attend, pdl)
        return self._logits(normed, pdl)

    def attend_rows(self, inputs: StepInputs, plan: DecodePlan, scratch: DecodeScratch, pdl: bool) -> Attend:
        """Attention of one new token a row."""
        pool, config = self._bound(), self._config

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            window = config.sliding_window if config.windowed_layers[layer] else None
            decode_attention(
                query, pool, layer, inputs.tables, inputs.lengths, plan, scratch, out, window=window, pdl=pdl
            )

        return attend

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
    ) -> None:
        """Logits of the tokens number `drawn` (int32) of a step become `last_logits`; the other arrays are int32 [N].

        The tokens may be those of chunks and of decode rows together, if `attend` attends for both. Keys and values are
        written for all; behind the last layer's attention only drawn tokens are computed.
        """
        normed = self._layers(tokens, positions, kv_slots, attend, pdl=False, drawn=drawn)
        if len(drawn):
            self._logits(normed, pdl=False)

    def _layers(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        pdl: bool,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The final norm's output, [N, hidden], or [drawn, hidden] of these tokens."""
        count, act, eps, weights = len(tokens), self._act, self._config.rms_norm_eps, self._weights
        products, pool = self._products, self._bound()
        residual, normed, mixed = act.residual[:count], act.normed[:count], act.mixed[:count]
        query, attended, gated = act.query[:count], act.attended[:count], act.gated[:count]
        # Not launched early: what attention reads before it waits, lengths and work, is complete when the chain begins.
        torch.index_select(weights.embedding, 0, tokens, out=residual)
        rms_norm(residual, weights.layers[0].input_norm, eps, normed, pdl=pdl)
        following = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]
        for index in self._indices:
            layer = weights.layers[index]
            qkv = products(layer.qkv, normed, act.qkv[:count], pdl=pdl)
            rope_and_write(qkv, positions, kv_slots, self._rope, self._norms[index], pool, index, query, pdl=pdl)
            if drawn is not None and index == len(weights.layers) - 1:
                if not len(drawn):
                    break
                attend(index, query, attended)
                count = len(drawn)
                attended = torch.index_select(attended, 0, drawn, out=act.query[:count])
                residual = torch.index_select(residual, 0, drawn, out=act.last[:count])
                normed, mixed, gated = normed[:count], mixed[:count], gated[:count]
            else:
                attend(index, query, attended)
            added = products(layer.o, attended.view(count, -1), mixed, pdl=pdl)
            add_rms_norm(added, residual, layer.post_norm, eps, normed, pdl=pdl)
            products.gated(layer.gate_up, normed, gated, pdl=pdl)
            added = products(layer.down, gated, mixed, pdl=pdl)
            add_rms_norm(added, residual, following[index], eps, normed, pdl=pdl)
        return normed

    def _logits(self, normed: torch.Tensor, pdl: bool) -> torch.Tensor:
        logits = self._act.logits[: len(normed)]
        self._products.whole(self._weights.lm_head, normed, logits, pdl=pdl)
        return logits

    def _bound(self) -> torch.Tensor:
        if self._pool is None:
            raise InvariantBroken("no pool is bound")
        return self._pool


def product_shapes(config: ModelConfig) -> tuple[Shape, ...]:
    """(outputs, inputs, fused) of all products of the model."""
    hidden, inner, q_size = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return (
        (q_size + 2 * config.num_kv_heads * config.head_dim, hidden, False),
        (hidden, q_size, False),
        (inner, hidden, True),
        (hidden, inner, False),
        (config.vocab_size, hidden, False),
    )


def _rope_tables(config: ModelConfig, max_len: int, device: str) -> RopeTables:
    """float32 [max_len, D / 2]."""
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    factor = config.rope.attention_factor
    return RopeTables((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))
