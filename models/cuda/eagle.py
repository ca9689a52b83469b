"""An EAGLE-3 draft on the GPU, as launches on fixed memory: keys and values of its layer, and chains of drafts.

    eagle.tap(layer, residual)                     # while a step runs through the model
    eagle.write(tokens, positions, kv_slots)       # behind its draws: entries of all its tokens, each of the next token
    eagle.propose(rows, ...)                       # behind that: drafts of rows that decode

models.cpu.eagle says what is computed. How many tokens a row accepted is known on the device alone. Where ranks share
a model each computes with its heads and its rows of the MLP, and draws from its own of the tokens that the whole head
gives: what they exchange are sums and best tokens, as in the model's layers, so all have the same drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.kernels.triton.decode_attention import DecodeScratch, decode_attention
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.eagle import EntryPlaces, eagle_inputs, entry_inputs
from baton.kernels.triton.norm import add_rms_norm
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.rope_write import rope_and_write
from baton.kernels.triton.step_inputs import StepInputs, set_entries
from baton.models.cuda.decoder import rope_tables
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.peers import DevicePeers
from baton.models.cuda.products import PADDING, Products, fastest, shape_of
from baton.models.eagle_config import EagleConfig
from baton.models.eagle_weights import EagleWeights, attention_of
from baton.models.partition import WHOLE
from baton.node.errors import InvariantBroken

PIECE = 1024
"""Tokens of a prompt whose entries are written together."""

DrawTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""draw(logits [rows, V], slots, positions, out)"""


@dataclass(frozen=True, slots=True)
class _Memory:
    """H: hidden size of the draft. P rows serve all tokens of a piece, R those that propose."""

    tapped: torch.Tensor  # [tokens, T]
    hidden: torch.Tensor  # [P, H]
    x: torch.Tensor  # [P, 2 H]
    qkv: torch.Tensor  # [P, heads]
    query: torch.Tensor  # [P, query heads, D]
    residual: torch.Tensor  # [R, H]
    row_query: torch.Tensor  # [R, query heads, D]
    attended: torch.Tensor  # [R, query heads, D]
    mixed: torch.Tensor  # [R, H]
    normed: torch.Tensor  # [R, H]
    gated: torch.Tensor  # [R, intermediate]
    logits: torch.Tensor  # [R, V of the draft]
    own: torch.Tensor  # [R, those of the rank's tokens]
    whole: torch.Tensor  # [R, the rank's part of V]: -inf but for tokens of the draft
    drawn: torch.Tensor  # int32 [R]

    @classmethod
    def make(
        cls, config: EagleConfig, num_own: int, tokens: int, rows: int, dtype: torch.dtype, device: str
    ) -> _Memory:
        """num_own: the rank's tokens of the draft's; 0: all, where one rank has them."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape[0] + PADDING, *shape[1:], dtype=dtype, device=device)

        piece, hidden = max(rows, min(tokens, PIECE)), config.hidden_size
        heads, dim = config.num_heads, config.head_dim
        whole = torch.full((rows, config.vocab_size), float("-inf"), dtype=dtype, device=device)
        return cls(
            zeros(tokens, config.tapped_size),
            zeros(piece, hidden),
            zeros(piece, 2 * hidden),
            zeros(piece, (heads + 2 * config.num_kv_heads) * dim),
            zeros(piece, heads, dim),
            zeros(rows, hidden),
            zeros(rows, heads, dim),
            zeros(rows, heads, dim),
            zeros(rows, hidden),
            zeros(rows, hidden),
            zeros(rows, config.intermediate_size),
            zeros(rows, config.draft_vocab_size),
            torch.zeros(rows, num_own, dtype=dtype, device=device),
            whole,
            torch.zeros(rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class _Bound:
    """What depends on the pool."""

    pool: PagedPool
    inputs: StepInputs
    scratch: DecodeScratch


class DeviceEagle:
    """One draft over layer number `layer` of a pool. Up to max_tokens tokens a step, of which up to max_rows decode."""

    def __init__(
        self,
        config: EagleConfig,
        weights: EagleWeights,
        layer: int,
        max_tokens: int,
        max_rows: int,
        max_len: int,
        peers: DevicePeers | None = None,
    ) -> None:
        """Sequences are shorter than max_len. config: of the whole draft; peers: the weights are one rank's part."""
        rank = WHOLE if peers is None else peers.rank
        tokens, config = rank.vocabulary(config.vocab_size), config.part_of(rank)
        self.config, self._weights, self._layer = config, weights, layer
        dtype, device = weights.norm.dtype, str(weights.norm.device)
        self._sums = None if peers is None else peers.sums
        self._columns: torch.Tensor | None = None
        self._tokens = weights.tokens
        if peers is not None:
            is_own = (weights.tokens >= tokens.start) & (weights.tokens < tokens.stop)
            self._columns = is_own.nonzero().view(-1)
            self._tokens = weights.tokens[self._columns] - tokens.start
        num_own = 0 if self._columns is None else len(self._columns)
        self._memory = _Memory.make(config, num_own, max_tokens, max_rows, dtype, device)
        plain = (weights.fc, weights.qkv, weights.o, weights.down, weights.head)
        shapes = [*map(shape_of, plain), shape_of(weights.gate_up, fused=True)]
        self._products = Products(fastest, len(self._memory.hidden) - PADDING, shapes, dtype, device)
        self._rope = rope_tables(config.rope, max_len, device)
        self._attention = attention_of(config)
        self._entries = EntryPlaces.make(max_rows, device)
        self._max_rows, self._device = max_rows, device
        self._bound: _Bound | None = None

    def bind_pool(self, pool: PagedPool, table_width: int, most_parts: int) -> None:
        """most_parts: of a plan of attention."""
        config = self.config
        scratch = DecodeScratch.make(
            self._max_rows, most_parts, config.num_heads, config.num_kv_heads, config.head_dim, self._device
        )
        self._bound = _Bound(pool, StepInputs.make(self._max_rows, table_width, self._device), scratch)

    def tap(self, layer: int, residual: torch.Tensor) -> None:
        """A step has come to this layer of the model; residual [N, hidden] before it."""
        for index, tap in enumerate(self.config.taps):
            if tap == layer:
                first = index * self.config.model_size
                self._memory.tapped[: len(residual), first : first + self.config.model_size].copy_(residual)

    def write(self, tokens: torch.Tensor, positions: torch.Tensor, kv_slots: torch.Tensor) -> None:
        """Entries of the tokens of the step that ran last, int32 [N] each; tokens: those that follow them."""
        memory, weights, most = self._memory, self._weights, len(self._memory.hidden) - PADDING
        for start in range(0, len(tokens), most):
            piece = slice(start, min(start + most, len(tokens)))
            count = piece.stop - piece.start
            hidden, query = memory.hidden[:count], memory.query[:count]
            self._products.whole(weights.fc, memory.tapped[piece], hidden, pdl=False)
            self._project(tokens[piece], hidden, hidden, positions[piece], kv_slots[piece], query)

    def _project(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        query: torch.Tensor,
    ) -> None:
        memory, weights, count = self._memory, self._weights, len(tokens)
        eagle_inputs(
            tokens,
            weights.embedding,
            hidden,
            (weights.input_norm, weights.hidden_norm),
            self.config.rms_norm_eps,
            memory.x[:count],
            residual,
            normed_residual=self.config.norm_before_residual,
        )
        qkv = self._products(weights.qkv, memory.x[:count], memory.qkv[:count], pdl=False)
        rope_and_write(qkv, positions, kv_slots, self._rope, None, self._bind().pool, self._layer, query)

    def forget(self, slots: torch.Tensor, drafts: DraftSlots, tables: torch.Tensor, block_tokens: int) -> None:
        """Rows of these slots, int32 [rows], which `drafts` took in, have no drafts in the next step."""
        inputs = self._bind().inputs.first(len(slots))
        kept = (drafts.places, slots, drafts.kept, drafts.results)
        entry_inputs(slots, *kept, tables, block_tokens, 0, 0, inputs, self._entries)

    def propose(
        self,
        slots: torch.Tensor,
        covered: torch.Tensor,
        drafts: DraftSlots,
        tables: torch.Tensor,
        block_tokens: int,
        plan: DecodePlan,
        draw: DrawTokens,
    ) -> None:
        """Drafts of rows of these slots, int32 [rows], which `drafts` took in and `write` has written the entries of.
        covered int32 [rows]: tokens that the row's blocks have room for; tables: blocks, by slot."""
        memory, weights, count = self._memory, self._weights, len(slots)
        inputs, residual = self._bind().inputs.first(count), memory.residual[:count]
        torch.index_select(tables, 0, slots, out=inputs.tables)
        query, kept = memory.row_query[:count], (drafts.places, covered, drafts.kept, drafts.results)
        for number in range(drafts.most_drafts):
            entry_inputs(slots, *kept, tables, block_tokens, number, drafts.most_drafts, inputs, self._entries)
            if number == 0:
                computed = self._entries.computed[:count]
                torch.index_select(memory.hidden, 0, computed, out=residual)
                torch.index_select(memory.query, 0, computed, out=query)
            else:
                self._project(inputs.tokens, residual, residual, inputs.positions, inputs.kv_slots, query)
            normed = self._layer_output(query, inputs, plan, residual)
            logits, whole, drawn = memory.logits[:count], memory.whole[:count], memory.drawn[:count]
            self._products.whole(weights.head, normed, logits, pdl=False)
            if self._columns is not None:
                logits = torch.index_select(logits, 1, self._columns, out=memory.own[:count])
            whole.index_copy_(1, self._tokens, logits)
            draw(whole, slots, self._entries.positions[:count], drawn)
            set_entries(drafts.kept.drafts.view(-1), self._entries.drafts[:count], drawn)

    def _layer_output(
        self, query: torch.Tensor, inputs: StepInputs, plan: DecodePlan, residual: torch.Tensor
    ) -> torch.Tensor:
        """What the head reads, [rows, H]; the residual is then that of the next entry's hidden state."""
        memory, weights, bound, eps = self._memory, self._weights, self._bind(), self.config.rms_norm_eps
        count = len(residual)
        attended, mixed, normed = memory.attended[:count], memory.mixed[:count], memory.normed[:count]
        share_out(inputs.lengths, plan, bound.scratch.work)
        decode_attention(
            query,
            bound.pool,
            self._layer,
            inputs.tables,
            inputs.lengths,
            plan,
            bound.scratch,
            attended,
            window=None,
            scale=self._attention.scores.scale,
            softcap=None,
            pdl=False,
        )
        added = self._products(weights.o, attended.view(count, -1), mixed, pdl=False)
        add_rms_norm(added, residual, weights.post_norm, eps, normed, ranks=self._sums)
        gated = self._products.gated(weights.gate_up, normed, memory.gated[:count], weights.down, pdl=False)
        added = self._products(weights.down, gated, mixed, pdl=False)
        add_rms_norm(added, residual, weights.norm, eps, normed, ranks=self._sums)
        return normed

    def _bind(self) -> _Bound:
        if self._bound is None:
            raise InvariantBroken("no pool is bound")
        return self._bound
