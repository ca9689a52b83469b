"""Checks of the kernels of latent attention that hold for any device, against float32 torch; see kernel_checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baton.kernels import reference
from baton.kernels.triton import decode_work, latent_decode, latent_prefill, latent_products, latent_write
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.latent_pairs import LatentPairs, absorb_pairs, raise_pairs
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.prefill_attention import work_list
from baton.kernels.triton.rope_write import RopeTables
from baton.tests.unit.kernels.adapter_checks import Adapters
from baton.tests.unit.kernels.kernel_checks import EPS, assert_close, error, poison, randn

LAYERS, LAYER, SCALE = 2, 1, 0.11


@dataclass(frozen=True, slots=True)
class Latent:
    """Heads, and elements of the parts of a query, of a latent and of a value."""

    heads: int
    plain: int
    rotated: int
    latent: int
    value: int

    @property
    def row(self) -> int:
        return self.latent + self.rotated


TINY = Latent(4, 16, 16, 32, 16)
LITE, V3 = Latent(16, 128, 64, 512, 128), Latent(128, 128, 64, 512, 128)


@dataclass(frozen=True, slots=True)
class Step:
    """Some sequences in a pool of which a layer's room behind each block is NaN."""

    pool: PagedPool
    tables: torch.Tensor  # int32 [S, blocks of the longest]
    lengths: torch.Tensor  # int32 [S]
    kv_up: torch.Tensor  # [H, P + V, L]

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, shape: Latent, lengths: list[int], block_tokens: int) -> Step:
        width = -(-max(lengths) // block_tokens)
        memory = randn((len(lengths) * width + 1, 1, LAYERS + 1, 1, block_tokens, shape.row), dtype, device, 3)
        memory[:, :, LAYERS] = float("nan")
        tables = torch.randperm(len(memory) - 1, generator=torch.Generator().manual_seed(4)).int() + 1
        return cls(
            PagedPool.of(memory[:, :, :LAYERS], planes=1),
            tables.view(len(lengths), width).to(device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            randn((shape.heads, shape.plain + shape.value, shape.latent), dtype, device, 5) * shape.latent**-0.5,
        )

    def expected(self, row: int, query: torch.Tensor, start: int) -> torch.Tensor:
        """[n, H, V] of query [n, H, P + R] at start .., rounded as its dtype says."""
        rows = self.pool.tensor[self.tables[row].long(), 0, LAYER, 0].flatten(0, 1)[: start + len(query)]
        return reference.latent_attention(query, rows, self.kv_up, start, SCALE)


def check_latent_write(
    device: str, dtype: torch.dtype, shape: Latent, query_rank: int, partials: int, interleaved: bool, pdl: bool = False
) -> None:
    """query_rank 0: queries have no latent. partials 0: x is a plain matrix."""
    tokens, block_tokens, dim = 5, 16, shape.plain + shape.rotated
    width = query_rank or shape.heads * dim
    total = width + shape.row
    x = randn((partials, tokens, total) if partials else (tokens, total), torch.float32 if partials else dtype, device)
    norms = [randn((size,), dtype, device, seed) for seed, size in ((1, shape.latent), (2, max(1, query_rank)))]
    angles = torch.arange(40)[:, None] * torch.rand(shape.rotated // 2, generator=torch.Generator().manual_seed(6))
    rope = RopeTables(angles.cos().to(device), angles.sin().to(device))
    positions = torch.tensor([0, 7, 3, 39, 5], dtype=torch.int32, device=device)
    slots = torch.tensor([3, 40, -1, 17, 0], dtype=torch.int32, device=device)
    pool = PagedPool.of(poison((4, 1, LAYERS, 1, block_tokens, shape.row), dtype, device), planes=1)
    out = poison((tokens, query_rank) if query_rank else (tokens, shape.heads, dim), dtype, device)
    latent_write.latent_write(
        x, norms[0], norms[1] if query_rank else None, EPS, positions, slots, rope, pool, LAYER, out,
        interleaved=interleaved, pdl=pdl,
    )  # fmt: skip
    summed = x.sum(0) if partials else x.float()

    def rotate(part: torch.Tensor) -> torch.Tensor:
        low, high = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
        cos, sin = (
            table[positions.long()].view(tokens, *(1,) * (part.dim() - 2), -1) for table in (rope.cos, rope.sin)
        )
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    latent = reference.rms_norm(summed[:, width : width + shape.latent], norms[0].float(), EPS)
    rows = torch.cat((latent, rotate(summed[:, width + shape.latent :])), -1)
    written = pool.tensor[:, 0, LAYER, 0].flatten(0, 1)
    kept = slots >= 0
    found = written[slots[kept].long()]
    assert_close(found, rows[kept], rows[kept].to(dtype))
    untouched = torch.ones(len(written), dtype=torch.bool, device=device).index_fill_(0, slots[kept].long(), False)
    assert bool(written[untouched].isnan().all()) and bool(pool.tensor[:, 0, 0].isnan().all())
    if query_rank:
        exact = reference.rms_norm(summed[:, :query_rank], norms[1].float(), EPS)
    else:
        exact = summed[:, :width].view(tokens, shape.heads, dim)
        exact = torch.cat((exact[..., : shape.plain], rotate(exact[..., shape.plain :])), -1)
        turned, given = poison((tokens, shape.heads, dim), dtype, device), x[..., :width].contiguous()
        latent_write.rotate_queries(given, positions, rope, turned, interleaved=interleaved, pdl=pdl)
        assert torch.equal(turned, out)
    assert_close(out, exact, exact.to(dtype))


def decode(
    step: Step, shape: Latent, query: torch.Tensor, plan: DecodePlan, pdl: bool = False,
    pairs: LatentPairs | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, H, V] of query [B, H, P + R], by the three kernels; a row of padding stays NaN."""
    device, dtype, rows = str(query.device), query.dtype, len(query)
    scratch = DecodeScratch.make(rows, plan.num_chunks, shape.heads, 1, shape.latent, device)
    scratch.parts.fill_(float("nan"))
    decode_work.share_out(step.lengths, plan, scratch.work)
    absorbed = poison((rows, shape.heads, shape.row), dtype, device)
    latent_products.absorb(query, step.kv_up, absorbed, pdl=pdl)
    if pairs is not None:
        absorb_pairs(query, step.kv_up, absorbed, pairs, LAYER, pdl=pdl)
    latent_decode.latent_decode_attention(
        absorbed, step.pool, LAYER, step.tables, plan, scratch, scale=SCALE, pdl=pdl
    )  # fmt: skip
    out = poison((rows, shape.heads, shape.value), dtype, device)
    latent_products.raise_merged(scratch, plan, step.kv_up, out, pdl=pdl)
    if pairs is not None:
        raise_pairs(scratch, plan, step.kv_up, out, pairs, LAYER, pdl=pdl)
    return out


def check_latent_decode(
    device: str, dtype: torch.dtype, shape: Latent, lengths: list[int], block_tokens: int, plan: DecodePlan,
    pdl: bool = False,
) -> None:  # fmt: skip
    step = Step.make(device, dtype, shape, lengths, block_tokens)
    query = randn((len(lengths), shape.heads, shape.plain + shape.rotated), dtype, device)
    out = decode(step, shape, query, plan, pdl)
    for row, length in enumerate(lengths):
        if not length:
            assert bool(out[row].isnan().all()), "a row of length 0 is padding and stays as it was"
            continue
        own = query[row : row + 1]
        # Absorbed, queries are rounded instead of keys: to the dtype, as in a plain computation.
        exact, plain = (step.expected(row, each, length - 1) for each in (own.float(), own))
        assert_close(out[row : row + 1], exact, plain)


def prefill(
    step: Step, shape: Latent, query: torch.Tensor, new: list[int], slice_tokens: int,
    pairs: LatentPairs | None = None,
) -> torch.Tensor:  # fmt: skip
    device, lengths = str(query.device), step.lengths.tolist()
    sizes = (shape.heads, shape.plain, shape.value, shape.rotated)
    expanded = latent_prefill.Expanded.make(slice_tokens, len(query), *sizes, query.dtype, device)
    starts = torch.tensor([0, *new]).cumsum(0).int().to(device)
    work = work_list(new, lengths, shape.heads, latent_prefill.BLOCK_M).to(device)
    out = poison((len(query), shape.heads, shape.value), query.dtype, device)
    latent_prefill.latent_prefill_attention(
        query, step.pool, LAYER, step.tables, starts, step.lengths, work, step.kv_up, expanded, 4, out, scale=SCALE,
        pairs=pairs,
    )  # fmt: skip
    return out


def check_latent_pairs(
    device: str, dtype: torch.dtype, shape: Latent, lengths: list[int], new: list[int], block_tokens: int,
    slice_tokens: int, plan: DecodePlan, ranks: list[int], max_rank: int, scaled: bool, pdl: bool = False,
) -> None:  # fmt: skip
    """Rows that decode, and prompts, with what adapters change of kv_up: against kv_up with the change in it. Sequences
    without an adapter keep their bits."""
    step = Step.make(device, dtype, shape, lengths, block_tokens)
    outputs = shape.heads * (shape.plain + shape.value)
    adapters = Adapters.make(ranks, max_rank, shape.latent, (outputs,), dtype, device, scaled)
    slots = torch.arange(len(lengths), dtype=torch.int32, device=device) % (len(ranks) + 1) - 1
    sites, scales = [adapters.site] * LAYERS, adapters.bank.scales_of(adapters.site)

    def changed(slot: int) -> torch.Tensor:
        weight = step.kv_up.double().flatten(0, 1)
        if ranks[slot] and scales is not None:
            weight = weight * scales[slot].double()[:, None]
        return (weight + adapters.b[slot][0] @ adapters.a[slot][0]).view_as(step.kv_up)

    def check(found: torch.Tensor, without: torch.Tensor, query: torch.Tensor, row: int, start: int) -> None:
        slot = int(slots[row])
        if slot < 0:
            assert torch.equal(found, without)
            return
        of_slot = changed(slot)
        exact, plain = (
            replace(step, kv_up=of_slot.to(each.dtype)).expected(row, each, start) for each in (query.float(), query)
        )
        assert error(found, exact) <= 4 * max(error(plain, exact), 1e-5)

    query = randn((len(lengths), shape.heads, shape.plain + shape.rotated), dtype, device) / 4
    pairs = LatentPairs(adapters.bank, sites, slots)
    out, without = decode(step, shape, query, plan, pdl, pairs), decode(step, shape, query, plan, pdl)
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        check(out[own], without[own], query[own], row, length - 1)

    query = randn((sum(new), shape.heads, shape.plain + shape.rotated), dtype, device) / 4
    before = torch.full((5,), len(ranks) - 1, dtype=torch.int32, device=device)
    of_tokens = torch.cat((before, slots.repeat_interleave(torch.tensor(new, device=device))))
    pairs = LatentPairs(adapters.bank, sites, of_tokens, len(before))
    out = prefill(step, shape, query, new, slice_tokens, pairs)
    without, first = prefill(step, shape, query, new, slice_tokens), 0
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        part = slice(first, first + count)
        check(out[part], without[part], query[part], row, length - count)
        first += count


def check_latent_prefill(
    device: str, dtype: torch.dtype, shape: Latent, lengths: list[int], new: list[int], block_tokens: int,
    slice_tokens: int,
) -> torch.Tensor:  # fmt: skip
    step = Step.make(device, dtype, shape, lengths, block_tokens)
    query = randn((sum(new), shape.heads, shape.plain + shape.rotated), dtype, device)
    out = prefill(step, shape, query, new, slice_tokens)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        part = slice(first, first + count)
        exact, plain = (step.expected(row, each, length - count) for each in (query[part].float(), query[part]))
        assert_close(out[part], exact, plain)
        first += count
    return out
