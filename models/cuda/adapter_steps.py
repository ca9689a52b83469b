"""What the steps of a GPU need of adapters: which row has which, and memory between the two halves of what they add.

Rows that decode are grouped on the device by what it keeps for their slots, so that captured steps serve any adapters;
rows of other steps by the host, which knows them. The adapters themselves are in `adapter_bank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.kernels.triton.adapter_rows import AdapterArrays, AdapterRows, group_rows, laid_out, most_items
from baton.kernels.triton.embedding_pairs import embed_pairs
from baton.kernels.triton.expert_pairs import ExpertPairs
from baton.kernels.triton.latent_pairs import LatentPairs
from baton.kernels.triton.low_rank import (
    AHEAD_ROWS,
    FEW_ROWS,
    HEAD_ITEMS,
    SPLIT_ROWS,
    AddedProduct,
    BankSite,
    is_ahead,
    shrink,
    splits_of,
)
from baton.kernels.triton.row_scales import add_in_place
from baton.kernels.triton.step_inputs import set_entries
from baton.kernels.triton.whole_weights import embed_own, head_own, norm_own
from baton.models.adapters.adapter import LATENT_PRODUCTS
from baton.models.batch import Row
from baton.models.cuda.adapter_bank import BankSlots
from baton.models.cuda.adapter_layout import BankLayout
from baton.models.cuda.queue import Queue, Upload, aligned

NONE = -1
"""In the place of a slot."""


class AdapterSteps:
    """For steps of up to most_tokens tokens, of which up to row_tokens are of rows that decode; one at a time."""

    def __init__(
        self,
        queue: Queue,
        slots: BankSlots,
        layout: BankLayout,
        num_rows: int,
        row_tokens: int,
        most_tokens: int,
        *,
        deterministic: bool,
    ) -> None:
        """num_rows: sequences that run, each with a slot of its own."""
        self._queue, self._slots, self._layout, self._deterministic = queue, slots, layout, deterministic
        count, device = slots.num_slots, queue.device
        self._table = torch.full((num_rows + 1,), NONE, dtype=torch.int32, device=device)
        self._known = [NONE] * num_rows  # what the device has in its table
        self._upload = Upload(queue, 2 * aligned(num_rows))
        self._rows = AdapterRows.make(row_tokens, count, device)
        self._kept = AdapterRows.make(row_tokens, count, device)
        self._span = torch.zeros(row_tokens, dtype=torch.int32, device=device)
        self._begins = torch.zeros(row_tokens, dtype=torch.int32, device=device)
        of_layers = [
            site for of_layer in layout.sites for name, site in of_layer.items() if name not in LATENT_PRODUCTS
        ]
        multiplied = of_layers if layout.vocabulary is None else [*of_layers, layout.vocabulary.head]
        sites = {(site.inputs, slots.bank.rank_width(site)) for site in multiplied}
        sizes = [
            self._splits(k, rows) * rows * width
            for k, width in sites
            for rows in {min(most, most_tokens) for most in (AHEAD_ROWS, SPLIT_ROWS, most_tokens)}
        ]
        self._hidden = torch.zeros(max(sizes, default=0), dtype=torch.float32, device=device)
        widest = max((site.ends[-1] for site in of_layers), default=0)
        rows = most_tokens if deterministic else min(FEW_ROWS, most_tokens)  # more are cuBLAS's
        self._apart = torch.zeros(rows * widest, dtype=slots.bank.numbers.dtype, device=device)

    def update(self, rows: Sequence[Row]) -> None:
        """Enqueue what the device must know before a step in which these rows decode."""
        changed = {row.slot: of_row for row in rows if self._known[row.slot] != (of_row := adapter_of(row))}
        if not changed:
            return
        for slot, adapter in changed.items():
            self._known[slot] = adapter
        arrays = np.array(list(changed), dtype=np.int32), np.array(list(changed.values()), dtype=np.int32)
        places, adapters = self._upload.send(arrays)
        self._queue.enqueue(lambda: set_entries(self._table, places, adapters))

    def group(self, slots: torch.Tensor) -> AdapterRows:
        """Launches the grouping of tokens of sequences with these slots, int32 [N]."""
        rows = self._rows.first(len(slots), self._slots.num_slots)
        group_rows(slots, self._table, self._begins, rows)
        return rows

    def keep(self, rows: AdapterRows, kept: torch.Tensor) -> AdapterRows:
        """Launches the grouping of some of the rows, by number, int32."""
        fewer = self._kept.first(len(kept), self._slots.num_slots)
        group_rows(kept, rows.adapters, self._begins, fewer)
        return fewer

    def lay_out(self, adapters: Sequence[int], counts: Sequence[int]) -> AdapterArrays:
        """For a step of parts with these slots, or NONE, and so many tokens each."""
        tokens, num_slots = np.repeat(np.array(adapters, dtype=np.int32), counts), self._slots.num_slots
        return laid_out(tokens, most_items(len(tokens), num_slots))

    def capacity(self, num_tokens: int) -> int:
        """Numbers that lay_out makes for so many tokens, at most."""
        num_slots = self._slots.num_slots
        return 2 * num_tokens + 4 * most_items(num_tokens, num_slots)

    def added(
        self, layer: int, name: str, x: torch.Tensor, rows: AdapterRows, *, beside: bool, pdl: bool
    ) -> AddedProduct | None:
        """Launches the first half of what adapters add to a product of x [M, K], valid until the next call; None: the
        model has no such product. beside: as AddedProduct."""
        site = self._layout.sites[layer].get(name)
        return None if site is None else self._shrink(site, x, rows, beside=beside, pdl=pdl)

    def _shrink(self, site: BankSite, x: torch.Tensor, rows: AdapterRows, *, beside: bool, pdl: bool) -> AddedProduct:
        num_rows, width = len(x), self._slots.bank.rank_width(site)
        splits = self._splits(site.inputs, num_rows)
        hidden = self._hidden[: splits * num_rows * width].view(splits, num_rows, width)
        ahead = is_ahead(site.inputs, num_rows, deterministic=self._deterministic)
        return shrink(x, self._slots.bank, site, rows, hidden, self._apart, ahead=ahead, beside=beside, pdl=pdl)

    def latent_pairs(self, rows: AdapterRows, first: int = 0) -> LatentPairs | None:
        """What adapters change of what makes keys and values of latents, from row `first` on; None: slots have no room
        for it."""
        sites = [of_layer["kv_up"] for of_layer in self._layout.sites if "kv_up" in of_layer]
        return LatentPairs(self._slots.bank, sites, rows.adapters, first) if sites else None

    @property
    def expert_width(self) -> int:
        """Numbers of a token's choice between both halves of what adapters add to experts; 0: they adapt none."""
        sites = (site for of_layer in self._layout.experts for site in of_layer.values())
        return max(map(self._slots.bank.rank_width, sites), default=0)

    def expert_pairs(self, layer: int, name: str, rows: AdapterRows) -> ExpertPairs | None:
        """What adapters add to a product of a layer's experts; None: slots have no room for it."""
        site = self._layout.experts[layer].get(name)
        return None if site is None else ExpertPairs(self._slots.bank, site, rows.adapters)

    def embed(self, tokens: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> None:
        """Launches what adapters have in place of the model's embedding of tokens, int32 [N], and what they add to it,
        over out [N, hidden]."""
        if self._slots.wholes is not None:
            embed_own(tokens, rows.adapters, self._slots.wholes, out)
        if (sites := self._layout.vocabulary) is not None:
            embed_pairs(tokens, self._slots.bank, sites.embedding, rows, out)

    def norm(self, number: int, residual: torch.Tensor, rows: AdapterRows, eps: float, out: torch.Tensor) -> None:
        """The same of norm `number` of a step, in its order."""
        if self._slots.wholes is not None:
            norm_own(residual, rows.adapters, self._slots.wholes, number, eps, out)

    def head(self, normed: torch.Tensor, rows: AdapterRows, logits: torch.Tensor) -> None:
        """The same of the head, and what adapters add to it; normed [N, hidden]."""
        if self._slots.wholes is not None:
            head_own(normed, rows.adapters, self._slots.wholes, logits)
        if (sites := self._layout.vocabulary) is not None:
            added = self._shrink(sites.head, normed, rows, beside=False, pdl=False)
            add_in_place(added, logits, None, few_programs=HEAD_ITEMS)

    def head_rows(self, rows: AdapterRows, drawn: torch.Tensor) -> AdapterRows | None:
        """For the head of some of the rows, by number, int32; None: no adapter changes it."""
        changed = self._slots.wholes is not None or self._layout.vocabulary is not None
        return self.keep(rows, drawn) if changed else None

    def head_span(self, rows: AdapterRows, begin: int, end: int) -> AdapterRows | None:
        """The same of rows begin .. end - 1."""
        span = torch.arange(begin, end, out=self._span[: end - begin])  # at one address, for which kernels are compiled
        return self.head_rows(rows, span)

    def _splits(self, num_inputs: int, num_rows: int) -> int:
        return splits_of(num_inputs, num_rows, deterministic=self._deterministic)


def adapter_of(row: Row) -> int:
    """Its slot, or NONE."""
    return NONE if row.adapter is None else row.adapter


def rows_of(sent: Sequence[torch.Tensor]) -> AdapterRows:
    """Of the three arrays of lay_out on the device, flat."""
    adapters, order, items = sent
    return AdapterRows(adapters, order, items.view(-1, 4))


def arrays_of(
    steps: AdapterSteps | None, rows: Sequence[Row], padded: int, num_tokens: int, before: int
) -> Sequence[np.ndarray]:
    """Of the adapters of a step, none if no row has one: of `before` rows of one token, which are padded to `padded`
    tokens, and of parts of prompts behind them, padded to num_tokens in all."""
    if all(row.adapter is None for row in rows):
        return ()
    assert steps is not None, "a row with an adapter, and no slots"
    adapters, counts = [adapter_of(row) for row in rows], [row.num_new for row in rows]
    adapters[before:before], counts[before:before] = [NONE], [padded - before]
    behind_them = num_tokens - sum(counts)
    return steps.lay_out([*adapters, NONE], [*counts, behind_them])
