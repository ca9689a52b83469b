"""Checks of the kernels of adapters that hold for any device; as kernel_checks, whose helpers they use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from baton.kernels import reference
from baton.kernels.triton import (
    adapter_rows,
    embedding_pairs,
    linear,
    linear_policy,
    low_rank,
    row_scales,
    whole_weights,
)
from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.low_rank import AdapterBank, AddedProduct, BankSite
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

SITES = 3
"""In a bank; the middle one is used."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Random adapters of one product, in a bank whose other numbers are NaN."""

    bank: AdapterBank
    site: BankSite
    a: list[list[torch.Tensor]]
    """By slot and part, float64 [rank, K]."""
    b: list[list[torch.Tensor]]

    def of_rows(self, adapters: torch.Tensor) -> torch.Tensor:
        """float64 [M, N]: what the product of each row is multiplied by."""
        scales = self.bank.scales_of(self.site)
        if scales is None:
            return torch.ones(len(adapters), self.site.ends[-1], dtype=torch.float64, device=adapters.device)
        return torch.where((adapters >= 0)[:, None], scales[adapters.clamp(min=0).long()].double(), 1.0)

    @classmethod
    def make(
        cls,
        ranks: list[int],
        max_rank: int,
        k: int,
        ends: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        scaled: bool = False,
    ) -> Adapters:
        """ranks: by slot; 0: the adapter leaves the product alone. scaled: adapters scale the product, too."""
        a_size, b_size = len(ends) * k, ends[-1]
        site, scales = BankSite(1, 32, 32 + a_size, k, ends, 48), None
        if scaled:
            scales = poison((len(ranks), 64 + b_size), torch.float32, device)
            scales[:, 48 : 48 + b_size] = 1 + randn((len(ranks), b_size), torch.float32, device, 90) / 4
        numbers = poison((len(ranks), max_rank * (32 + a_size + b_size)), dtype, device)
        of_sites = torch.zeros(len(ranks), SITES, dtype=torch.int32, device=device)
        of_sites[:, 1] = torch.tensor(ranks, device=device)
        sizes = [end - begin for begin, end in zip((0, *ends[:-1]), ends, strict=True)]
        a, b = [], []
        for slot, rank in enumerate(ranks):
            down = (randn((len(ends) * rank, k), torch.float32, device, 10 + slot) / k**0.5).to(dtype)
            up = randn((ends[-1], rank), dtype, device, 50 + slot)
            numbers[slot, rank * site.a_offset :][: down.numel()] = down.flatten()
            numbers[slot, rank * site.b_offset :][: up.numel()] = up.flatten()
            a.append(list(down.double().split(rank)) if rank else [down.double()] * len(ends))
            b.append(list(up.double().split(sizes)))
        return cls(AdapterBank(numbers, of_sites, max_rank, scales), site, a, b)

    def delta(self, x: torch.Tensor, adapters: torch.Tensor) -> torch.Tensor:
        """float64 [M, N]"""
        parts = range(len(self.site.ends))
        return torch.cat(
            [reference.low_rank_delta(x.double(), adapters, *zip(*self._of(part), strict=True)) for part in parts], 1
        )

    def _of(self, part: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(a[part], b[part]) for a, b in zip(self.a, self.b, strict=True)]


def group(adapters: torch.Tensor, num_slots: int) -> AdapterRows:
    """adapters int32 [M]"""
    device, count = str(adapters.device), len(adapters)
    rows = AdapterRows.make(count, num_slots, device)
    rows.items.fill_(7)  # what steps before left
    begins = torch.full((count,), -1, dtype=torch.int32, device=device)
    index = torch.arange(count, dtype=torch.int32, device=device).flip(0)
    adapter_rows.group_rows(index, adapters.flip(0).contiguous(), begins, rows)
    return rows


def some_adapters(rows: int, num_slots: int, device: str, seed: int = 0) -> torch.Tensor:
    """int32 [rows], base rows among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_slots, (rows,), dtype=torch.int32, generator=generator).to(device)


def check_group(adapters: torch.Tensor, num_slots: int) -> None:
    """By the host's arrays, and what they are for: each row with an adapter is in one item, of its own slot."""
    found = group(adapters, num_slots)
    host = adapters.cpu().numpy()
    expected = adapter_rows.laid_out(host, len(found.items))
    count = int((host >= 0).sum())
    assert np.array_equal(found.adapters.cpu(), host)
    assert np.array_equal(found.order.cpu()[:count], expected.order[:count])
    used = found.items.cpu()[found.items.cpu()[:, 2] > 0]
    assert np.array_equal(used[:, :3], expected.items[expected.items[:, 2] > 0][:, :3])
    assert len(used) == (expected.items[:, 2] > 0).sum() and (found.items[len(used) :, 2] == 0).all()
    assert int(found.items[0, 3]) == expected.items[0, 3] == len(used)
    covered = [(slot, row) for slot, start, size, _ in used.tolist() for row in expected.order[start : start + size]]
    assert sorted(covered) == sorted((slot, row) for row, slot in enumerate(host.tolist()) if slot >= 0)


def added_to(
    adapters: Adapters,
    x: torch.Tensor,
    of_rows: torch.Tensor,
    *,
    pdl: bool = False,
    splits: int | None = None,
    ahead: bool = False,
    beside: bool = False,
) -> AddedProduct:
    site = adapters.site
    splits = splits or low_rank.splits_of(site.inputs, len(x), deterministic=not ahead)
    hidden = poison((splits, len(x), adapters.bank.rank_width(site)), torch.float32, str(x.device))
    rows = group(of_rows, len(adapters.bank.numbers))
    memory = poison((len(x) * site.ends[-1],), adapters.bank.numbers.dtype, str(x.device))
    return low_rank.shrink(x, adapters.bank, site, rows, hidden, memory, ahead=ahead, beside=beside, pdl=pdl)


def check_expand(
    device: str,
    dtype: torch.dtype,
    rows: int,
    ranks: list[int],
    max_rank: int,
    k: int,
    ends: tuple[int, ...],
    pdl: bool = False,
    few_programs: int = low_rank.EXPAND_ITEMS,
    ahead: bool = False,
) -> None:
    """Rows without an adapter keep their bits, and others have those that they have alone."""
    adapters = Adapters.make(ranks, max_rank, k, ends, dtype, device)
    x, of_rows = randn((rows, k), dtype, device), some_adapters(rows, len(ranks), device)
    before = randn((rows, ends[-1]), dtype, device, 3)
    out = before.clone()
    added = added_to(adapters, x, of_rows, ahead=ahead, pdl=pdl)
    low_rank.expand(added, out, few_programs=few_programs, pdl=pdl)
    exact = before.double() + adapters.delta(x, of_rows)
    assert error(out, exact) <= 4 * max(error(exact.to(dtype), exact), 1e-6)
    assert torch.equal(out[of_rows < 0], before[of_rows < 0])
    last = slice(rows - 1, rows)
    alone = before[last].clone()
    low_rank.expand(added_to(adapters, x[last], of_rows[last], ahead=ahead), alone)
    assert torch.equal(alone, out[last])


def check_embed(
    device: str, dtype: torch.dtype, rows: int, ranks: list[int], max_rank: int, vocab: int, hidden: int
) -> None:
    """As check_expand, for the embedding; the first tokens are the same of all adapters."""
    adapters = Adapters.make(ranks, max_rank, vocab, (hidden,), dtype, device)
    numbers, site = adapters.bank.numbers, adapters.site
    for slot, rank in enumerate(ranks):  # a slot has A by tokens
        of_tokens = numbers[slot, rank * site.a_offset :][: vocab * rank]
        of_tokens.copy_(adapters.a[slot][0][:rank].t().flatten())
    of_rows = some_adapters(rows, len(ranks), device)
    tokens = torch.arange(rows, device=device) * 7 % vocab
    before = randn((rows, hidden), dtype, device, 3)
    out, grouped = before.clone(), group(of_rows, len(ranks))
    embedding_pairs.embed_pairs(tokens.int(), adapters.bank, site, grouped, out)
    exact = before.double() + adapters.delta(F.one_hot(tokens, vocab), of_rows)
    assert error(out, exact) <= 4 * max(error(exact.to(dtype), exact), 1e-6)
    assert torch.equal(out[of_rows < 0], before[of_rows < 0])
    last = slice(rows - 1, rows)
    alone = before[last].clone()
    grouped = group(of_rows[last], len(ranks))
    embedding_pairs.embed_pairs(tokens[last].int(), adapters.bank, site, grouped, alone)
    assert torch.equal(alone, out[last])


def check_linear_added(
    device: str,
    dtype: torch.dtype,
    rows: int,
    ranks: list[int],
    max_rank: int,
    tiles: linear_policy.Tiles,
    ends: tuple[int, ...],
    k: int = 256,
    fused: bool = False,
    scaled: bool = False,
    pdl: bool = False,
) -> None:
    """Rows without an adapter have the bits of the product alone, and each row those that it has with others."""
    adapters = Adapters.make(ranks, max_rank, k, ends, dtype, device, scaled)
    n = ends[-1] // 2 if fused else ends[-1]
    x, of_rows = randn((rows, k), dtype, device), some_adapters(rows, len(ranks), device)
    weight = (randn((ends[-1], k), torch.float32, device, 1) / k**0.5).to(dtype)
    bias = None if fused else randn((n,), dtype, device, 2)
    exact = adapters.of_rows(of_rows) * F.linear(x.double(), weight.double()) + adapters.delta(x, of_rows)
    if bias is not None:
        exact += bias.double()
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    shape, kind = ((rows, n), dtype) if tiles.splits == 1 else ((tiles.splits, rows, n), torch.float32)
    out, alone = poison(shape, kind, device), poison(shape, kind, device)
    added = added_to(adapters, x, of_rows, beside=True, pdl=pdl).apart(pdl=pdl)
    linear.linear(x, weight, bias, tiles, out, fused=fused, added=added, pdl=pdl)
    linear.linear(x, weight, bias, tiles, alone, fused=fused, pdl=pdl)
    found = out.sum(0) if tiles.splits > 1 else out
    bound = 4 * max(error(exact.to(dtype), exact), 1e-5)  # of dtype is what lies between the two halves, too
    assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
    base = of_rows < 0
    assert torch.equal(out[..., base, :], alone[..., base, :])
    if rows > 1 and tiles.tile_m:
        kept = list(range(rows))[1::2]
        fewer = poison((*shape[:-2], len(kept), n), kind, device)
        some = x[kept].contiguous()
        linear.linear(
            some,
            weight,
            bias,
            tiles,
            fewer,
            fused=fused,
            added=added_to(adapters, some, of_rows[kept]).apart(pdl=False),
        )
        assert torch.equal(fewer, out[..., kept, :])


def check_add_in_place(
    device: str,
    dtype: torch.dtype,
    rows: int,
    ranks: list[int],
    max_rank: int,
    k: int,
    ends: tuple[int, ...],
    splits: int = 1,
    pdl: bool = False,
) -> None:
    """To products with a bias, which are scaled, in parts that float32 holds; as check_expand."""
    adapters = Adapters.make(ranks, max_rank, k, ends, dtype, device, scaled=True)
    x, of_rows = randn((rows, k), dtype, device), some_adapters(rows, len(ranks), device)
    bias, shape = randn((ends[-1],), dtype, device, 2), (rows, ends[-1])
    before = randn(shape, dtype, device, 3) if splits == 1 else randn((splits, *shape), torch.float32, device, 3)
    out = before.clone()
    row_scales.add_in_place(added_to(adapters, x, of_rows, pdl=pdl), out, bias, pdl=pdl)
    whole, found = (before, out) if splits == 1 else (before.double().sum(0), out.double().sum(0))
    exact = (whole.double() - bias.double()) * adapters.of_rows(of_rows) + bias.double() + adapters.delta(x, of_rows)
    assert error(found, exact) <= 6 * max(error(exact.to(dtype), exact), 1e-6)
    assert torch.equal(out[..., of_rows < 0, :], before[..., of_rows < 0, :])
    last = slice(rows - 1, rows)
    alone = before[..., last, :].clone()
    row_scales.add_in_place(added_to(adapters, x[last], of_rows[last]), alone, bias)
    assert torch.equal(alone, out[..., last, :])


def check_whole_weights(device: str, dtype: torch.dtype, rows: int, num_slots: int, hidden: int, vocab: int) -> None:
    """Embedding, norm and head of rows whose slots have them; the others keep their bits, and a head's rows have those
    that they have alone. Slot 0 has nothing."""
    heads, norms, norm = vocab - 5, 3, 1
    numbers = randn((num_slots, (vocab + heads + norms) * hidden), dtype, device, 4)
    flags = torch.ones(num_slots, 2 + norms, dtype=torch.int32, device=device)
    flags[0] = 0
    numbers[0] = float("nan")
    weights = whole_weights.WholeWeights(numbers, flags, vocab, heads, hidden)
    of_rows = some_adapters(rows, num_slots, device)
    own = of_rows > 0
    tables = numbers[of_rows.clamp(min=0).long()].view(rows, -1, hidden)  # [rows, vocab | heads | norms, hidden]
    x, tokens = randn((rows, hidden), dtype, device), torch.arange(rows, dtype=torch.int32, device=device) * 7 % vocab

    before = randn((rows, hidden), dtype, device, 5)
    embedded, normed = before.clone(), before.clone()
    whole_weights.embed_own(tokens, of_rows, weights, embedded)
    expected = tables[torch.arange(rows, device=device), tokens.long()]
    assert torch.equal(embedded, torch.where(own[:, None], expected, before))
    whole_weights.norm_own(x, of_rows, weights, norm, 1e-5, normed)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact *= tables[:, vocab + heads + norm].double()
    assert error(normed[own], exact[own]) <= 2 * max(error(exact[own].to(dtype), exact[own]), 1e-6)
    assert torch.equal(normed[~own], before[~own])

    before = randn((rows, heads), dtype, device, 6)
    logits, alone = before.clone(), before.clone()
    whole_weights.head_own(x, of_rows, weights, logits)
    exact = torch.einsum("rh,rvh->rv", x.double(), tables[:, vocab : vocab + heads].double())
    assert error(logits[own], exact[own]) <= 2 * max(error(exact[own].to(dtype), exact[own]), 1e-5)
    assert torch.equal(logits[~own], before[~own])
    last = slice(rows - 1, rows)
    whole_weights.head_own(x[last], of_rows[last], weights, alone[last])
    assert torch.equal(alone[last], logits[last])
