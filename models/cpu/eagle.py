"""EAGLE-3 drafts on the CPU: what a step's hidden states give for the tokens behind it. The plain twin of the GPU's.

Entry i of the draft's layer is made of hidden states of the model at place i and of token i + 1: it predicts i + 2.

    tokens   t0 t1 t2 t3 | t4 drawn         x_i  = norm(embedding t_i+1) | norm(g_i),   g_i = fc(hidden states at i)
    entries  x0 x1 x2 x3                    h_i  = the layer over x_0 .. x_i;  head(norm(h_3)) proposes t5
             then x4 of t5 and h_3 for g_4, and so on

Its keys and values lie in the blocks, as one layer more: entry i at the place of token i. Those of drafts are written
behind the known tokens and over again when these are known. Drafts are drawn with the noise of their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from msgspec.structs import replace

from baton import kernels
from baton.models.batch import Draw, Drawn, Row
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.sampler import draw_tokens
from baton.models.cpu.step_batch import StepBatch, lay_out
from baton.models.cpu.verify import Verified
from baton.models.drafts import NO_DRAFTS, Drafts
from baton.models.eagle_config import EagleConfig
from baton.models.eagle_weights import EagleWeights
from baton.models.rope import inverse_frequencies, rotations
from baton.node.errors import InvariantBroken


class _Proposed(NamedTuple):
    """Drafts behind the last known token of a sequence."""

    place: int
    token: int
    drafts: tuple[int, ...]


class _Entry(NamedTuple):
    """The last entry of a row: the one that drafts follow."""

    row: Row
    place: int
    token: int


class EagleDrafts:
    """A draft over layer number `layer` of the pool, which proposes up to `most` tokens a row; 0: it only keeps its
    keys and values, for a worker that drafts."""

    def __init__(self, config: EagleConfig, weights: EagleWeights, layer: int, most: int) -> None:
        self.config, self._weights, self._layer, self._most = config, weights, layer, most
        self._frequencies = inverse_frequencies(config.rope)
        self._attention: PagedAttention | None = None
        self._tapped: dict[int, torch.Tensor] = {}
        self._proposed: dict[int, _Proposed] = {}  # by slot

    def bind(self, attention: PagedAttention) -> None:
        """Steps write to its pool from now on."""
        self._attention = attention
        self._proposed.clear()

    def tap(self, layer: int, residual: torch.Tensor) -> None:
        """A step has come to this layer of the model; residual [N, hidden] before it."""
        if layer in self.config.taps:
            self._tapped[layer] = residual.clone()

    def drafts_for(self, row: Row) -> Drafts:
        """What was proposed to follow the row's token, as many as it may have."""
        found = self._proposed.get(row.slot)
        if found is None or (found.place, found.token) != (row.start, row.token_ids[0]):
            return NO_DRAFTS
        return Drafts(found.drafts[: row.most_drafts], "eagle")

    def take_in(self, step: StepBatch, verified: Verified, drawn: Sequence[Drawn | None]) -> None:
        """Behind the draws of a step; drawn: what each of the rows that were given has."""
        tapped = torch.cat([self._tapped[layer] for layer in self.config.taps], -1)  # [N, T]
        rows, sources = [], []
        entries, of_entries = [], []
        for index, row in enumerate(verified.rows[: verified.num_given]):
            following, places = _entries(step, verified, index, drawn[index])
            known = following[-1]
            if self._proposes(row) and drawn[index] is not None:
                entries.append(_Entry(row, row.start + len(following) - 1, known))
                of_entries.append(places[-1])
                following, places = following[:-1], places[:-1]
            if following:
                rows.append(Row(following, row.start, row.blocks, None))
                sources.append(places)
        if rows:
            self._write(rows, sources, tapped)
        if entries:
            self._propose(entries, self._weights.fc(tapped[of_entries]))

    def _proposes(self, row: Row) -> bool:
        return self._most > 0 and row.draw is not None and len(row.token_ids) == 1

    def _write(self, rows: Sequence[Row], sources: Sequence[Sequence[int]], tapped: torch.Tensor) -> None:
        """Keys and values of entries; sources: where each has its hidden states, [N, T], row by row."""
        attention = self._bound()
        step = lay_out(rows, attention.shape, None, tapped.dtype)
        order = torch.empty(len(step.positions), dtype=torch.int64)
        for first, places in zip(step.firsts, sources, strict=True):
            order[first : first + len(places)] = torch.tensor(places)
        _, kv = self._project(self._input(step, self._weights.fc(tapped[order]))[0], step)
        attention.write(self._layer, kv, step)

    def _propose(self, entries: Sequence[_Entry], hidden: torch.Tensor) -> None:
        """The drafts behind the entries; hidden [entries, H]."""
        block_tokens = self._bound().shape.block_tokens
        drafts: list[list[int]] = [[] for _ in entries]
        going = list(range(len(entries)))
        for number in range(self._most):
            rows = []
            for index in going:
                row, place, token = entries[index]
                assert row.draw is not None, "rows that draw"
                free = replace(row.draw.sampling, grammar=None)  # masks are of the model's draws
                draw = row.draw._replace(sampling=free, num_generated=row.draw.num_generated + number + 1)
                rows.append(Row((drafts[index][-1] if number else token,), place + number, row.blocks, draw))
            tokens, hidden = self._advance(rows, hidden)
            for index, found in zip(going, tokens, strict=True):
                drafts[index].append(found)
            kept = [
                number_of
                for number_of, row in enumerate(rows)
                if row.start + 1 < len(row.blocks) * block_tokens  # the next entry has a block
            ]
            going, hidden = [going[each] for each in kept], hidden[kept]
            if not going:
                break
        for entry, chosen in zip(entries, drafts, strict=True):
            self._proposed[entry.row.slot] = _Proposed(entry.place + 1, entry.token, tuple(chosen))

    def _advance(self, rows: Sequence[Row], hidden: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """One more entry of each row, of its token and hidden [rows, H]: the token it proposes, and h [rows, H]."""
        attention, weights, eps = self._bound(), self._weights, self.config.rms_norm_eps
        step = lay_out(rows, attention.shape, None, hidden.dtype)
        places = torch.tensor(step.firsts)
        ordered = torch.empty_like(hidden)
        ordered[places] = hidden
        x, residual = self._input(step, ordered)
        query, kv = self._project(x, step)
        attended = weights.o(attention(self._layer, query, kv, step))
        normed, residual = kernels.add_rms_norm(attended, residual, weights.post_norm, eps)
        gated = kernels.silu_and_mul(weights.gate_up(normed))
        normed, residual = kernels.add_rms_norm(weights.down(gated), residual, weights.norm, eps)
        logits = torch.full((len(rows), self.config.vocab_size), float("-inf"))
        logits[:, weights.tokens] = weights.head(normed[places]).float()
        draws: list[Draw] = [row.draw for row in rows if row.draw is not None]
        drawn = draw_tokens(logits, draws, [row.start + 2 for row in rows], [])
        return [each.token_ids[0] for each in drawn], residual[places]

    def _input(self, step: StepBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's projections read, [N, 2 H], and the residual, [N, H]."""
        weights, eps = self._weights, self.config.rms_norm_eps
        embedded = kernels.rms_norm(weights.embedding[step.token_ids], weights.input_norm, eps)
        normed = kernels.rms_norm(hidden, weights.hidden_norm, eps)
        residual = normed if self.config.norm_before_residual else hidden
        return torch.cat((embedded, normed), -1), residual.clone()

    def _project(self, x: torch.Tensor, step: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, heads, head_dim], and keys and values [N, 2, key heads * head_dim]."""
        config = self.config
        qkv = self._weights.qkv(x)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        turns = rotations(step.positions, self._frequencies, config.rope.attention_factor, x.dtype)
        kernels.apply_rope(heads[:, : config.num_heads + config.num_kv_heads, : config.rope.rotary_dim], *turns)
        return heads[:, : config.num_heads], qkv[:, config.num_heads * config.head_dim :].view(len(qkv), 2, -1)

    def _bound(self) -> PagedAttention:
        if self._attention is None:
            raise InvariantBroken("no pool is bound")
        return self._attention


def _entries(step: StepBatch, verified: Verified, index: int, drawn: Drawn | None) -> tuple[tuple[int, ...], list[int]]:
    """Of a given row: the token behind each of its tokens and of its drafts that were accepted, and where these are in
    the step. The last token of a row has none if nothing is known or drawn behind it: then its own."""
    row, first = verified.rows[index], step.firsts[index]
    places = list(range(first, first + len(row.token_ids)))
    if drawn is None:
        following = row.token_ids[-1] if row.following is None else row.following
        return (*row.token_ids[1:], following), places
    if index in verified.drafts:
        first_draft = verified.drafts[index][0]
        places += [step.firsts[first_draft + number] for number in range(len(drawn.token_ids) - 1)]
    return (*row.token_ids[1:], *drawn.token_ids), places
