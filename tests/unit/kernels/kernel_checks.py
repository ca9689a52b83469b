"""Checks of the Triton kernels that hold for any device: small shapes in the interpreter, large ones on a GPU.

Each takes the device, makes random inputs, poisons the output with NaN and compares with `kernels.reference` in
float32: the error is at most twice that of the reference in the kernel's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from baton.kernels import GroupedLinear, ScaledLinear, philox, reference
from baton.kernels import Scores as ScoreRule
from baton.kernels.linear.grouped import block_size
from baton.kernels.triton import (
    activation,
    blocks,
    decode_attention,
    decode_plan,
    decode_work,
    dequantise,
    linear,
    linear_policy,
    norm,
    prefill_attention,
    rope_write,
    sampling,
    step_inputs,
    widen,
)
from baton.kernels.triton.pool import PagedPool
from baton.kvtransfer.blocks import checksum
from baton.kvtransfer.blocks.layout import KVLayout, Scales
from baton.kvtransfer.blocks.views import kv_tensors

EPS = 1e-5
FLOAT32_ERROR = 1e-6


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def make_pool(
    num_blocks: int, layers: int, block_tokens: int, heads: Heads, dtype: torch.dtype, device: str, seed: int
) -> PagedPool:
    """Random, with a layer's room of NaN behind each unit, which no kernel may touch."""
    pool = randn((num_blocks, heads.key, layers + 1, 2, block_tokens, heads.dim), dtype, device, seed)
    pool[:, :, layers] = float("nan")
    return PagedPool.of(pool[:, :, :layers])


@dataclass(frozen=True, slots=True)
class QuantisedPool:
    """A pool of 8-bit floats in memory of which every other byte is NaN or a huge scale."""

    memory: torch.Tensor
    pool: PagedPool
    scales: torch.Tensor
    """float32 [num_blocks, KH, layers, 2, block_tokens]"""

    @classmethod
    def make(
        cls, num_blocks: int, layers: int, block_tokens: int, heads: Heads, scales: Scales, device: str, seed: int
    ) -> QuantisedPool:
        digest = "some" if scales == "static" else ""
        layout = KVLayout(
            layers, 0, heads.key, heads.key, heads.dim, block_tokens, "float8_e4m3fn", 2 * heads.dim, scales, digest
        )
        memory = torch.full((num_blocks * layout.block_bytes,), 0x7F, dtype=torch.uint8, device=device)
        tensors = kv_tensors(memory, layout, num_blocks)
        numbers = randn(layout.shape(num_blocks), torch.float32, "cpu", seed)
        # of very different sizes: a scale that is left out, or another's, is seen
        sizes = 10.0 ** randn(layout.scales_shape(num_blocks), torch.float32, "cpu", seed + 1).clamp(-2, 2)
        if scales == "static":
            sizes = sizes[0, :, :, :, 0].permute(1, 2, 0).contiguous()  # [layers, 2, KH]
            each = sizes.permute(2, 0, 1)[None, :, :, :, None].expand(layout.scales_shape(num_blocks))
        else:
            each = sizes
        tensors.data.copy_(reference.quantise_kv(numbers * each[..., None], each))
        if tensors.scales is not None:
            tensors.scales.copy_(sizes)
        pool = PagedPool.of(tensors.data, sizes.to(device) if tensors.scales is None else tensors.scales)
        return cls(memory, pool, each.to(device) if tensors.scales is None else tensors.scales)

    def dequantised(self) -> torch.Tensor:
        return reference.dequantise_kv(self.pool.tensor, self.scales)


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact||; NaN, which no bound admits, where an element was not written."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def assert_close(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """plain: what torch gives in the kernel's dtype."""
    bound = max(2 * error(plain, exact), FLOAT32_ERROR)
    assert error(out, exact) <= bound, f"error {error(out, exact):.2e}, allowed {bound:.2e}"


def check_rms_norm(device: str, dtype: torch.dtype, rows: int, width: int, pdl: bool = False) -> None:
    x, weight = randn((rows, width), dtype, device), randn((width,), dtype, device, 1)
    out = poison((rows, width), dtype, device)
    norm.rms_norm(x, weight, EPS, out, pdl=pdl)
    exact = reference.rms_norm(x.float(), weight.float(), EPS)
    assert_close(out, exact, reference.rms_norm(x, weight, EPS))


def check_add_rms_norm(
    device: str, dtype: torch.dtype, rows: int, width: int, partials: int, pdl: bool = False, output: bool = False
) -> None:
    """partials 0: x is a plain matrix of the dtype. output: a norm of x is added."""
    shape = (partials, rows, width) if partials else (rows, width)
    x = randn(shape, torch.float32 if partials else dtype, device)
    residual, weight = randn((rows, width), dtype, device, 1), randn((width,), dtype, device, 2)
    sums, own = x.sum(0) if partials else x.float(), randn((width,), dtype, device, 3) if output else None
    if own is not None:
        sums = reference.rms_norm(sums, own.float(), EPS).to(dtype).float()
    added = (residual.float() + sums).to(dtype)
    out = poison((rows, width), dtype, device)
    norm.add_rms_norm(x, residual, weight, EPS, out, output_norm=own, pdl=pdl)
    if own is None:
        assert_close(residual, added.float(), added)
    else:  # a sum of two roundings, either of which may fall the other way
        torch.testing.assert_close(residual, added)
    exact = reference.rms_norm(residual.float(), weight.float(), EPS)
    assert_close(out, exact, reference.rms_norm(residual, weight, EPS))


def check_dequantise_scaled(device: str, codes_dtype: torch.dtype, dtype: torch.dtype, block: tuple[int, int]) -> None:
    n, k = 20, 2100
    scales = randn((-(-n // block[0]), -(-k // block[1])), torch.float32, device, 1)
    codes = (40 * randn((n, k), torch.float32, "cpu")).clamp(-128, 127).to(codes_dtype).to(device)
    exact = ScaledLinear(codes, scales, *block).dequantised(dtype)
    out = poison((n, k), dtype, device)
    dequantise.dequantise_scaled(codes, scales, *block, out)
    assert torch.equal(out, exact)


def check_dequantise_groups(device: str, dtype: torch.dtype, inputs_per_scale: int, zeros: bool, order: bool) -> None:
    n, k = 5, 2112
    groups, chance, block = (
        (k // inputs_per_scale, n),
        torch.Generator().manual_seed(1),
        block_size(k, inputs_per_scale),
    )
    assert block is not None
    linear = GroupedLinear(
        torch.randint(-(1 << 15), 1 << 15, (n, k // 4), generator=chance).to(device, torch.int16),
        randn(groups, torch.float16, device),
        torch.randint(0, 17, groups, generator=chance).to(device, torch.int8) if zeros else None,
        block,
        torch.randperm(k, generator=chance).to(device, torch.int32) if order else None,
    )
    out = poison((n, k), dtype, device)
    dequantise.dequantise_groups(linear.words, linear.scales, linear.zeros, linear.order, block, out)
    assert torch.equal(out, linear.dequantised(dtype))


def check_silu_and_mul(device: str, dtype: torch.dtype, rows: int, width: int, pdl: bool = False) -> None:
    gate_up = randn((rows, 2 * width), dtype, device)
    out = poison((rows, width), dtype, device)
    activation.silu_and_mul(gate_up, out, pdl=pdl)
    gate, up = gate_up.float().chunk(2, -1)
    assert_close(out, F.silu(gate) * up, reference.silu_and_mul(gate_up))
    activation.gelu_tanh_and_mul(gate_up, out, pdl=pdl)
    assert_close(out, F.gelu(gate, approximate="tanh") * up, reference.gelu_tanh_and_mul(gate_up))


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of query and key heads, and head_dim."""

    query: int
    key: int
    dim: int


def rope_tables(rotary_dim: int, positions: int, device: str) -> rope_write.RopeTables:
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return rope_write.RopeTables(angles.cos().to(device), angles.sin().to(device))


def plain_rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: rope_write.RopeTables,
    norm_weight: torch.Tensor | None,
    heads: Heads,
) -> torch.Tensor:
    """[N, H + 2 KH, D]: query, key and value heads by the reference's operations, in qkv's dtype."""
    split = qkv.clone().view(len(qkv), -1, heads.dim)
    turned = split[:, : heads.query + heads.key]
    if norm_weight is not None:
        turned.copy_(reference.rms_norm(turned, norm_weight, EPS))
    cos, sin = rope.cos[positions].to(qkv.dtype), rope.sin[positions].to(qkv.dtype)
    halves = torch.stack((cos, cos), 1)[:, None], torch.stack((-sin, sin), 1)[:, None]
    rotated = turned.contiguous()
    reference.apply_rope(rotated[..., : 2 * rope.cos.shape[1]], *halves)
    return torch.cat((rotated, split[:, heads.query + heads.key :]), 1)


def check_rope_and_write(
    device: str,
    dtype: torch.dtype,
    heads: Heads,
    rows: int,
    block_tokens: int,
    partials: int = 0,
    normed: bool = False,
    pdl: bool = False,
    rotary_dim: int | None = None,
) -> None:
    """rotary_dim: of each head so many elements are rotated; None: all.

    The last row is padding, and the pool's other slots and layers keep their contents bit for bit."""
    layers, layer, num_blocks, max_positions = 3, 1, -(-rows // block_tokens) + 2, 2 * rows + 50
    width = (heads.query + 2 * heads.key) * heads.dim
    qkv = randn((partials, rows, width) if partials else (rows, width), torch.float32 if partials else dtype, device)
    weight = randn((heads.query + heads.key, heads.dim), dtype, device, 1)
    rope = rope_tables(rotary_dim or heads.dim, max_positions, device)
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, max_positions, (rows,), generator=generator).to(device)
    slots = torch.randperm(num_blocks * block_tokens, generator=generator)[:rows].to(device)
    slots[-1] = -1
    paged = make_pool(num_blocks, layers, block_tokens, heads, dtype, device, 4)
    pool, before = paged.tensor, paged.tensor.clone()
    query = poison((rows, heads.query, heads.dim), dtype, device)
    norms = rope_write.HeadNorms(weight, EPS) if normed else None
    rope_write.rope_and_write(qkv, positions.int(), slots, rope, norms, paged, layer, query, pdl=pdl)

    whole = qkv.sum(0) if partials else qkv
    exact = plain_rope_write(whole.float(), positions, rope, weight.float() if normed else None, heads)
    plain = plain_rope_write(whole.to(dtype), positions, rope, weight if normed else None, heads)
    kept = slots[:-1]
    written = (kept // block_tokens, slice(None), layer, slice(None), kept % block_tokens)
    found = pool[written].transpose(1, 2).flatten(1, 2)  # [rows - 1, 2 KH, D]
    assert_close(query, exact[:, : heads.query], plain[:, : heads.query])
    assert_close(found, exact[:-1, heads.query :], plain[:-1, heads.query :])
    pool[written] = before[written]
    assert torch.equal(pool, before), "a slot that is not the step's was written"


def check_quantised_write(
    device: str, dtype: torch.dtype, heads: Heads, rows: int, block_tokens: int, scales: Scales, pdl: bool = False
) -> None:
    """Values to the bit, keys, which are rotated before, within a step; and all other bytes of the memory are kept."""
    layers, layer, num_blocks = 3, 1, -(-rows // block_tokens) + 2
    qkv = randn((rows, (heads.query + 2 * heads.key) * heads.dim), dtype, device)
    qkv[0] = 0.0  # zeros have a scale too
    qkv[1] *= 1e4  # beyond what static scales can say
    rope = rope_tables(heads.dim, rows + 5, device)
    positions = torch.arange(5, rows + 5, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(num_blocks * block_tokens, generator=generator)[:rows].to(device)
    slots[-1] = -1
    made = QuantisedPool.make(num_blocks, layers, block_tokens, heads, scales, device, 4)
    pool, before = made.pool.tensor, made.memory.clone()
    query = poison((rows, heads.query, heads.dim), dtype, device)
    rope_write.rope_and_write(qkv, positions, slots, rope, None, made.pool, layer, query, pdl=pdl)

    exact = plain_rope_write(qkv.float(), positions, rope, None, heads)
    assert_close(query, exact[:, : heads.query], plain_rope_write(qkv, positions, rope, None, heads)[:, : heads.query])
    kept = slots[:-1]
    written = (kept // block_tokens, slice(None), layer, slice(None), kept % block_tokens)
    expected = exact[:-1, heads.query :].unflatten(1, (2, heads.key)).transpose(1, 2)  # [rows - 1, KH, 2, D]
    amax = expected.abs().amax(-1)
    used = made.scales[written]
    if scales == "token":
        torch.testing.assert_close(used, reference.kv_scales(expected), rtol=1e-5, atol=0)
    data = reference.quantise_kv(expected, used)
    assert torch.equal(pool[written][:, :, 1].float(), data[:, :, 1].float()), "values"
    step = torch.maximum(data.float().abs() / 8, torch.tensor(2.0**-9, device=device)) * used[..., None]
    clipped = expected.clamp(-448.0 * used[..., None], 448.0 * used[..., None])
    assert bool(((pool[written].float() * used[..., None] - clipped).abs() <= step + 1e-5 * amax[..., None]).all())
    was = before.as_strided(pool.shape, pool.stride())
    pool.view(torch.uint8)[written] = was[written]
    if scales == "token":
        words = before.view(torch.float32)
        shape, strides, first = made.scales.shape, made.scales.stride(), made.scales.storage_offset()
        made.scales[written] = words.as_strided(shape, strides, first)[written]
    assert torch.equal(made.memory, before), "a byte that is not the step's was written"


@dataclass(frozen=True, slots=True)
class Paged:
    """A pool whose unused slots are large numbers, and the sequences in it."""

    pool: PagedPool
    tables: torch.Tensor  # int32 [B, blocks of the longest]; past a sequence's end some other sequence's block
    lengths: list[int]
    numbers: torch.Tensor
    """What the pool holds: itself unless it is quantised."""

    @classmethod
    def make(
        cls,
        device: str,
        dtype: torch.dtype,
        heads: Heads,
        lengths: list[int],
        block_tokens: int,
        scales: Scales = "none",
    ) -> Paged:
        layers, width = 2, -(-max(lengths) // block_tokens)
        num_blocks = width * len(lengths) + 2
        if scales != "none":
            return cls._quantised(device, heads, lengths, block_tokens, num_blocks, scales)
        paged = make_pool(num_blocks, layers, block_tokens, heads, dtype, device, 1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2))
        tables = order[: width * len(lengths)].view(len(lengths), width)
        for row, length in enumerate(lengths):
            used = -(-length // block_tokens)
            if length % block_tokens:
                paged.tensor[tables[row, used - 1], ..., length % block_tokens :, :] = 1000.0
            paged.tensor[tables[row, used:]] = 1000.0
        return cls(paged, tables.int().to(device), lengths, paged.tensor)

    @classmethod
    def _quantised(
        cls, device: str, heads: Heads, lengths: list[int], block_tokens: int, num_blocks: int, scales: Scales
    ) -> Paged:
        made = QuantisedPool.make(num_blocks, 2, block_tokens, heads, scales, device, 1)
        width = (num_blocks - 2) // len(lengths)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2))
        tables = order[: width * len(lengths)].view(len(lengths), width)
        largest = torch.full((), 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
        raw = made.pool.tensor.view(torch.uint8)
        for row, length in enumerate(lengths):
            used = -(-length // block_tokens)
            if length % block_tokens:
                raw[tables[row, used - 1], ..., length % block_tokens :, :] = largest
            raw[tables[row, used:]] = largest
        return cls(made.pool, tables.int().to(device), lengths, made.dequantised())


def paged_attention(
    paged: Paged,
    query: torch.Tensor,
    layer: int,
    query_lengths: list[int],
    window: int | None,
    dtype: torch.dtype,
    scores: ScoreRule | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """reference.paged_attention of ragged sequences in one dtype; float32 arithmetic, rounded at the end."""
    pieces = query.to(dtype).split(query_lengths)
    pool = paged.numbers.to(dtype)
    with query.device:  # where the reference makes its masks
        found = [
            reference.paged_attention(piece, pool, layer, table.long(), length - len(piece), window, scores, sinks)
            for piece, table, length in zip(pieces, paged.tables, paged.lengths, strict=True)
        ]
    return torch.cat(found)


def assert_attention(
    out: torch.Tensor,
    paged: Paged,
    query: torch.Tensor,
    lengths: list[int],
    window: int | None,
    scores: ScoreRule | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """The probabilities are rounded to the values' dtype before they meet, as in every flash attention: a step each."""
    exact = paged_attention(paged, query, 1, lengths, window, torch.float32, scores, sinks)
    step = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[out.dtype]
    assert error(out, exact) <= step, f"error {error(out, exact):.2e}"


def some_sinks(num_heads: int, device: str) -> torch.Tensor:
    """From one that hardly counts to one beside which nothing does."""
    return torch.linspace(-40.0, 12.0, num_heads).to(device)


def check_decode_attention(
    device: str,
    dtype: torch.dtype,
    heads: Heads,
    lengths: list[int],
    block_tokens: int,
    plan: decode_plan.DecodePlan,
    window: int | None = None,
    pdl: bool = False,
    scales: Scales = "none",
    scores: ScoreRule | None = None,
    with_sinks: bool = False,
) -> torch.Tensor:
    """Runs twice: the second run finds what the first left in the scratch. Returns the output."""
    rule = {} if scores is None else scores._asdict()
    paged = Paged.make(device, dtype, heads, lengths, block_tokens, scales)
    query = randn((len(lengths), heads.query, heads.dim), dtype, device)
    scratch = decode_attention.DecodeScratch.make(
        len(lengths), plan.num_chunks, heads.query, heads.key, heads.dim, device
    )
    scratch.parts.fill_(float("nan"))
    scratch.softmax.fill_(float("nan"))
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    decode_work.share_out(held, plan, scratch.work)
    outs = [poison(tuple(query.shape), dtype, device) for _ in range(2)]
    sinks = some_sinks(heads.query, device) if with_sinks else None
    for out in outs:
        decode_attention.decode_attention(
            query, paged.pool, 1, paged.tables, held, plan, scratch, out, window=window, sinks=sinks, pdl=pdl, **rule
        )
    assert_attention(outs[0], paged, query, [1] * len(lengths), window, scores, sinks)
    assert torch.equal(outs[0], outs[1]), "the same inputs gave other bits"
    assert not bool(scratch.arrived.any()), "a counter was not set back"
    return outs[0]


def check_queries_together(
    device: str,
    dtype: torch.dtype,
    heads: Heads,
    sequences: list[tuple[int, int]],
    block_tokens: int,
    plan: decode_plan.DecodePlan,
    window: int | None = None,
    scales: Scales = "none",
) -> None:
    """The last 1 + drafts tokens of sequences, given as length and drafts, laid out as draft_inputs does, are right and
    have the bits of queries that read alone. A plan without fixed chunks is only checked for being right."""
    lengths, drafts = [length for length, _ in sequences], [count for _, count in sequences]
    together, count = plan.queries, sum(drafts) + len(sequences)
    paged = Paged.make(device, dtype, heads, lengths, block_tokens, scales)
    places = [(row, 0) for row in range(len(lengths))]
    places += [(row, number) for row, more in enumerate(drafts) for number in range(1, more + 1)]
    queries = [0 if number % together else min(together, drafts[row] + 1 - number) for row, number in places]
    following = [
        len(lengths) + sum(drafts[:row]) if number == 0 else place + 1 for place, (row, number) in enumerate(places)
    ]
    seen = [lengths[row] - drafts[row] + number for row, number in places]
    query = randn((count, heads.query, heads.dim), dtype, device)
    scratch = decode_attention.DecodeScratch.make(count, plan.num_parts, heads.query, heads.key, heads.dim, device)
    held = torch.tensor(seen, dtype=torch.int32, device=device)
    tables = torch.stack([paged.tables[row] for row, _ in places])
    grouped = [torch.tensor(values, dtype=torch.int32, device=device) for values in (queries, following)]
    outs = []
    for given in ((), grouped, grouped):
        scratch.parts.fill_(float("nan"))
        scratch.softmax.fill_(float("nan"))
        out = poison(tuple(query.shape), dtype, device)
        decode_work.share_out(held, plan, scratch.work, *given)
        read = torch.where(grouped[0][:, None] > 0, tables, -1) if given else tables
        decode_attention.decode_attention(query, paged.pool, 1, read, held, plan, scratch, out, window=window)
        outs.append(out)
    order = sorted(range(count), key=lambda place: places[place])
    assert_attention(outs[1][order], paged, query[order], [more + 1 for more in drafts], window, None)
    assert torch.equal(outs[1], outs[2]), "the same inputs gave other bits"
    assert not plan.chunk_tokens or torch.equal(outs[0], outs[1]), "bits depend on what is read together"
    assert not bool(scratch.arrived.any()), "a counter was not set back"


def check_prefill_attention(
    device: str,
    dtype: torch.dtype,
    heads: Heads,
    new_and_cached: list[tuple[int, int]],
    block_tokens: int,
    tokens: int,
    window: int | None = None,
    pdl: bool = False,
    scales: Scales = "none",
    scores: ScoreRule | None = None,
    with_sinks: bool = False,
) -> None:
    """tokens: the tile of the work list."""
    new = [num_new for num_new, _ in new_and_cached]
    lengths = [num_new + cached for num_new, cached in new_and_cached]
    paged = Paged.make(device, dtype, heads, lengths, block_tokens, scales)
    query = randn((sum(new), heads.query, heads.dim), dtype, device)
    sinks = some_sinks(heads.query, device) if with_sinks else None
    out = run_prefill_attention(paged, query, new, lengths, tokens, window, pdl, scores, sinks)
    assert_attention(out, paged, query, new, window, scores, sinks)


def check_chunks_do_not_matter(
    device: str, dtype: torch.dtype, heads: Heads, block_tokens: int, tokens: int, scales: Scales = "none"
) -> None:
    """One prompt in a piece and in three gives the same bits."""
    cuts = [0, 37, 37 + 64, 150]
    paged = Paged.make(device, dtype, heads, [cuts[-1]], block_tokens, scales)
    query = randn((cuts[-1], heads.query, heads.dim), dtype, device)
    whole = run_prefill_attention(paged, query, [cuts[-1]], [cuts[-1]], tokens)
    for first, end in pairwise(cuts):
        part = run_prefill_attention(paged, query[first:end], [end - first], [end], tokens)
        assert torch.equal(part, whole[first:end]), (first, end)


def check_widened_context(
    device: str, dtype: torch.dtype, heads: Heads, lengths: list[int], block_tokens: int, scales: Scales
) -> None:
    """All blocks of all sequences, rounded to the dtype, and nothing behind them; a sequence of no tokens between."""
    paged = Paged.make(device, dtype, heads, [max(length, 1) for length in lengths], block_tokens, scales)
    counts = [-(-length // block_tokens) for length in lengths]
    memory = poison((sum(counts) + 1, heads.key, 1, 2, block_tokens, heads.dim), dtype, device)
    tables = torch.full_like(paged.tables, -1)
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    widen.widen_context(paged.pool, 1, paged.tables, held, PagedPool.of(memory), tables, 3)
    exact = paged.numbers.to(dtype)
    number = 0
    for row, count in enumerate(counts):
        assert tables[row].tolist() == [*range(number, number + count), *[-1] * (tables.shape[1] - count)]
        for place in range(count):
            assert torch.equal(memory[number, :, 0], exact[paged.tables[row, place], :, 1]), (row, place)
            number += 1
    assert bool(memory[number].isnan().all())


def check_prefill_gluon(
    heads: Heads,
    new_and_cached: list[tuple[int, int]],
    block_tokens: int,
    persistent: bool,
) -> None:
    """On a GPU only. Twice with one counter: the second launch finds what the first left."""
    from baton.kernels.triton import prefill_gluon

    new = [num_new for num_new, _ in new_and_cached]
    lengths = [num_new + cached for num_new, cached in new_and_cached]
    paged = Paged.make("cuda", torch.bfloat16, heads, lengths, block_tokens)
    query = randn((sum(new), heads.query, heads.dim), torch.bfloat16, "cuda")
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    work = prefill_attention.work_list(new, lengths, heads.query, prefill_gluon.BLOCK_M).cuda()
    counter = torch.zeros(2, dtype=torch.int32, device="cuda")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for _ in range(2):
        out = poison(tuple(query.shape), torch.bfloat16, "cuda")
        prefill_gluon.prefill_attention(
            query, paged.pool, 1, paged.tables, starts, held, work, num_sms, counter if persistent else None, out
        )
        assert_attention(out, paged, query, new, None)
        assert not bool(counter.any()), "the counters were not set back"


def run_prefill_attention(
    paged: Paged,
    query: torch.Tensor,
    new: list[int],
    lengths: list[int],
    tokens: int,
    window: int | None = None,
    pdl: bool = False,
    scores: ScoreRule | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    device = str(query.device)
    rule = {} if scores is None else scores._asdict()
    out = poison(tuple(query.shape), query.dtype, device)
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    work = prefill_attention.work_list(new, lengths, query.shape[1], tokens).to(device)
    prefill_attention.prefill_attention(
        query, paged.pool, 1, paged.tables, starts, held, work, tokens, out, window=window, sinks=sinks, pdl=pdl, **rule
    )
    return out


def check_blocks(device: str, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    """Checksums against the definition; a gather and a scatter move every bit, NaN included, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    size_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (shape[0], size_bytes), dtype=torch.uint8, generator=generator)
    pool = raw.view(dtype).view(shape).to(device)
    ids = torch.randperm(shape[0], generator=generator)[:count].to(device)
    checks = torch.zeros(count, dtype=torch.int64, device=device)
    blocks.block_checksums(pool, ids.int(), blocks.checksum_scratch(count, pool), checks)
    expected = checksum.unit_checksums(raw[ids.cpu()].numpy())
    assert checks.cpu().numpy().view("uint64").tolist() == expected.tolist()

    staging = torch.zeros_like(pool[:count])
    blocks.gather_blocks(pool, ids, staging)
    assert torch.equal(staging.flatten(1).view(torch.uint8).cpu(), raw[ids.cpu()])
    target = torch.zeros_like(pool)
    blocks.scatter_blocks(staging, ids, target)
    moved = torch.zeros_like(raw)
    moved[ids.cpu()] = raw[ids.cpu()]
    assert torch.equal(target.flatten(1).view(torch.uint8).cpu(), moved)


def check_rows(device: str, step_words: int, row_words: int) -> None:
    """Checksums of rows that are longer or shorter than the distance of the places at which they may begin."""
    raw = torch.randint(0, 256, (40, step_words * 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool, places = raw.to(device), torch.tensor([0, 5, 3], device=device)
    checks, size = torch.zeros(3, dtype=torch.int64, device=device), row_words * 8
    blocks.block_checksums(pool, places, blocks.checksum_scratch(3, pool, size), checks, size)
    rows = torch.stack([raw.flatten()[place * step_words * 8 :][:size] for place in places.tolist()])
    assert checks.cpu().numpy().view("uint64").tolist() == checksum.unit_checksums(rows.numpy()).tolist()
    for first_byte in (0, 8 * 1001):
        blocks.block_checksums(pool, places, blocks.checksum_scratch(3, pool, size), checks, size, first_byte)
        expected = checksum.part_sums(rows.numpy(), first_byte)
        assert checks.cpu().numpy().view("uint64").tolist() == expected.tolist()


def check_step_inputs(device: str, num_rows: int, width: int, block_tokens: int) -> None:
    """Rows in slots of any order, the last two padding; tables longer than a program copies at a time count too."""
    generator = torch.Generator().manual_seed(0)
    num_slots = num_rows + 3
    tables = torch.randint(0, 1000, (num_slots, width), generator=generator, dtype=torch.int32)
    last = torch.randint(0, 500, (num_slots,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(num_slots, generator=generator)[:num_rows].int()
    positions = torch.randint(0, width * block_tokens, (num_rows,), generator=generator, dtype=torch.int32)
    positions[0], positions[1], positions[-2:] = 0, width * block_tokens - 1, -1
    given = torch.where(torch.arange(num_rows) % 2 == 0, 600 + slots, -1).int()
    out = step_inputs.StepInputs.make(num_rows, width, device)
    arrays = [tensor.to(device) for tensor in (slots, positions, given, last, tables)]
    step_inputs.gather_inputs(*arrays, block_tokens, out)
    for row in range(num_rows):
        slot, position = int(slots[row]), int(positions[row])
        padding = position < 0
        token = 0 if padding else int(given[row]) if given[row] >= 0 else int(last[slot])
        block = int(tables[slot, max(position, 0) // block_tokens])
        kv_slot = -1 if padding else block * block_tokens + position % block_tokens
        found = (out.tokens[row], out.positions[row], out.lengths[row], out.kv_slots[row])
        assert [int(value) for value in found] == [token, max(position, 0), position + 1, kv_slot]
        used = -(-(position + 1) // block_tokens)
        assert torch.equal(out.tables[row, :used].cpu(), tables[slot, :used])

    target = torch.zeros(1000, dtype=torch.int32, device=device)
    index = torch.randperm(1000, generator=generator)[:600].int().to(device)
    step_inputs.set_entries(target, index, index + 1)
    expected = torch.zeros(1000, dtype=torch.int32)
    expected[index.long().cpu()] = index.cpu() + 1
    assert torch.equal(target.cpu(), expected)


def check_argmax(device: str, dtype: torch.dtype, rows: int, vocab_size: int, pdl: bool = False) -> None:
    """Rounded logits have many equals: the lowest id of the largest wins."""
    logits = (randn((rows, vocab_size), torch.float32, device) * 2).round().to(dtype)
    out = torch.full((rows,), -1, dtype=torch.int64, device=device)
    sampling.argmax(logits, sampling.SamplingScratch.make(rows, vocab_size, device), out, pdl=pdl)
    ids = torch.arange(vocab_size, device=device).expand(rows, -1)
    lowest = torch.where(logits == logits.max(-1, keepdim=True).values, ids, vocab_size).min(-1).values
    assert torch.equal(out, lowest)


@triton.jit
def _uniforms_kernel(seed_ptr, position_ptr, out_ptr, COUNT: tl.constexpr):
    row = tl.program_id(0)
    u = sampling.uniforms(tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.program_id(1) * COUNT, COUNT)
    tl.store(out_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * COUNT + tl.arange(0, COUNT), u)


def check_uniforms(device: str, blocks_of_row: int) -> None:
    """Bit for bit those of kernels.philox."""
    seeds, positions = seeds_and_positions(6)
    count = 512
    out = poison((6, blocks_of_row * count), torch.float32, device)
    _uniforms_kernel[(6, blocks_of_row)](seeds.to(device), positions.to(device), out, COUNT=count)
    assert torch.equal(out.cpu(), philox.uniform(seeds, positions, blocks_of_row * count))


def seeds_and_positions(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows] each; the first seeds are the extremes."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(0, 2**63 - 1, (rows,), generator=generator)
    seeds[: min(rows, 3)] = torch.tensor([0, 2**63 - 1, 2**32])[:rows]
    return seeds, torch.randint(0, 200_000, (rows,), generator=generator)


def check_draw(device: str, dtype: torch.dtype, rows: int, vocab_size: int, pdl: bool = False) -> None:
    """The reference's draws; every third row is greedy, and half of the tokens are filtered away."""
    logits = randn((rows, vocab_size), dtype, device) * 3
    logits[:, ::2] = float("-inf")
    seeds, positions = seeds_and_positions(rows)
    temperatures = torch.linspace(0.5, 1.5, rows)
    temperatures[::3] = 0.0
    out = torch.full((rows,), -1, dtype=torch.int64, device=device)
    scratch = sampling.SamplingScratch.make(rows, vocab_size, device)
    sampling.draw(logits, temperatures.to(device), seeds.to(device), positions.to(device), scratch, out, pdl=pdl)
    values = logits.float().cpu()
    random = temperatures > 0
    expected = values.argmax(-1)
    u = philox.uniform(seeds[random], positions[random], vocab_size)
    expected[random] = reference.gumbel_argmax(values[random] / temperatures[random][:, None], u)
    assert out.tolist() == expected.tolist()


def check_small_uniforms(device: str) -> None:
    """The noise of the smallest u is finite and right: a naive log(1 - u) is 0 below 2**-25, and its noise infinite."""
    u = torch.tensor([2.0**-33, 2.0**-30, 3.0e-8, 6.0e-8, 1e-6, 1e-3, 0.3, 0.9, 1 - 2.0**-24] * 8)[:64]
    out = poison((64,), torch.float32, device)
    _gumbel_kernel[(1,)](u.to(device), out)
    exact = -torch.log(-torch.log1p(-u.double()))
    assert float((out.cpu() - exact).abs().max()) < 4e-6, (out.cpu() - exact).abs()


@triton.jit
def _gumbel_kernel(u_ptr, out_ptr):
    tl.store(out_ptr + tl.arange(0, 64), sampling.gumbel(tl.load(u_ptr + tl.arange(0, 64))))


def check_gated_product(rows: int, n: int, k: int) -> None:
    """On a GPU only. The error is at most twice that of rounding the result; run twice over poison."""
    from baton.kernels.triton import product_gluon

    x = randn((rows, k), torch.bfloat16, "cuda")
    weight = (randn((2 * n, k), torch.float32, "cuda", 1) / k**0.5).to(torch.bfloat16)
    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    exact = F.silu(gate) * up
    bound = 2 * error(exact.to(torch.bfloat16), exact)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for _ in range(2):
        out = poison((rows, n), torch.bfloat16, "cuda")
        product_gluon.gated_product(x, weight, num_sms, out)
        assert error(out, exact) <= bound, f"error {error(out, exact):.2e}, allowed {bound:.2e}"


def check_linear(
    device: str,
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    tiles: linear_policy.Tiles,
    fused: bool = False,
    biased: bool = False,
    pdl: bool = False,
    gelu: bool = False,
) -> None:
    """The error is at most that of rounding the result, or float32's where parts are left unrounded."""
    x = randn((rows, k), dtype, device)
    weight = (randn(((2 if fused else 1) * n, k), torch.float32, device, 1) / k**0.5).to(dtype)
    bias = randn((n,), dtype, device, 2) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    out = poison((rows, n), dtype, device)
    if tiles.splits > 1:
        out = poison((tiles.splits, rows, n), torch.float32, device)
    linear.linear(x, weight, bias, tiles, out, fused=fused, gelu=gelu, pdl=pdl)
    found = out.sum(0) if tiles.splits > 1 else out
    bound = max(2 * error(exact.to(out.dtype), exact), 1e-5)
    assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
