"""Checks of the Triton kernels that hold for any device: small shapes in the interpreter, large ones on a GPU.

Each takes the device, makes random inputs, poisons the output with NaN and compares with `kernels.reference` in
float32: the error is at most twice that of the reference in the kernel's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.triton import activation, decode_attention, decode_plan, norm, rope_write

EPS = 1e-5
FLOAT32_ERROR = 1e-6


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


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
    device: str, dtype: torch.dtype, rows: int, width: int, partials: int, pdl: bool = False
) -> None:
    """partials 0: x is a plain matrix of the dtype."""
    shape = (partials, rows, width) if partials else (rows, width)
    x = randn(shape, torch.float32 if partials else dtype, device)
    residual, weight = randn((rows, width), dtype, device, 1), randn((width,), dtype, device, 2)
    added = (residual.float() + (x.sum(0) if partials else x.float())).to(dtype)
    out = poison((rows, width), dtype, device)
    norm.add_rms_norm(x, residual, weight, EPS, out, pdl=pdl)
    assert_close(residual, added.float(), added)
    exact = reference.rms_norm(residual.float(), weight.float(), EPS)
    assert_close(out, exact, reference.rms_norm(residual, weight, EPS))


def check_silu_and_mul(device: str, dtype: torch.dtype, rows: int, width: int, pdl: bool = False) -> None:
    gate_up = randn((rows, 2 * width), dtype, device)
    out = poison((rows, width), dtype, device)
    activation.silu_and_mul(gate_up, out, pdl=pdl)
    gate, up = gate_up.float().chunk(2, -1)
    assert_close(out, F.silu(gate) * up, reference.silu_and_mul(gate_up))


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of query and key heads, and head_dim."""

    query: int
    key: int
    dim: int


def rope_tables(head_dim: int, positions: int, device: str) -> rope_write.RopeTables:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
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
    reference.apply_rope(rotated, *halves)
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
) -> None:
    """The last row is padding, and the pool's other slots and layers keep their contents bit for bit."""
    layers, layer, num_blocks, max_positions = 3, 1, -(-rows // block_tokens) + 2, 2 * rows + 50
    width = (heads.query + 2 * heads.key) * heads.dim
    qkv = randn((partials, rows, width) if partials else (rows, width), torch.float32 if partials else dtype, device)
    weight = randn((heads.query + heads.key, heads.dim), dtype, device, 1)
    rope = rope_tables(heads.dim, max_positions, device)
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, max_positions, (rows,), generator=generator).to(device)
    slots = torch.randperm(num_blocks * block_tokens, generator=generator)[:rows].to(device)
    slots[-1] = -1
    pool = randn((num_blocks, layers, 2, block_tokens, heads.key, heads.dim), dtype, device, 4)
    before = pool.clone()
    query = poison((rows, heads.query, heads.dim), dtype, device)
    norms = rope_write.HeadNorms(weight, EPS) if normed else None
    rope_write.rope_and_write(qkv, positions.int(), slots, rope, norms, pool, layer, query, pdl=pdl)

    whole = qkv.sum(0) if partials else qkv
    exact = plain_rope_write(whole.float(), positions, rope, weight.float() if normed else None, heads)
    plain = plain_rope_write(whole.to(dtype), positions, rope, weight if normed else None, heads)
    kept = slots[:-1]
    found = pool[kept // block_tokens, layer, :, kept % block_tokens].flatten(1, 2)  # [rows - 1, 2 KH, D]
    assert_close(query, exact[:, : heads.query], plain[:, : heads.query])
    assert_close(found, exact[:-1, heads.query :], plain[:-1, heads.query :])
    pool[kept // block_tokens, layer, :, kept % block_tokens] = before[
        kept // block_tokens, layer, :, kept % block_tokens
    ]
    assert torch.equal(pool, before), "a slot that is not the step's was written"


@dataclass(frozen=True, slots=True)
class Paged:
    """A pool whose unused slots are large numbers, and the sequences in it."""

    pool: torch.Tensor  # [blocks, layers, 2, block_tokens, KH, D]
    tables: torch.Tensor  # int32 [B, blocks of the longest]; past a sequence's end some other sequence's block
    lengths: list[int]

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, heads: Heads, lengths: list[int], block_tokens: int) -> Paged:
        layers, width = 2, -(-max(lengths) // block_tokens)
        num_blocks = width * len(lengths) + 2
        pool = randn((num_blocks, layers, 2, block_tokens, heads.key, heads.dim), dtype, device, 1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2))
        tables = order[: width * len(lengths)].view(len(lengths), width)
        for row, length in enumerate(lengths):
            used = -(-length // block_tokens)
            if length % block_tokens:
                pool[tables[row, used - 1], :, :, length % block_tokens :] = 1000.0
            pool[tables[row, used:], :, :] = 1000.0
        return cls(pool, tables.int().to(device), lengths)


def paged_attention(
    paged: Paged, query: torch.Tensor, layer: int, query_lengths: list[int], window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """reference.paged_attention of ragged sequences in one dtype; float32 arithmetic, rounded at the end."""
    pieces = query.to(dtype).split(query_lengths)
    found = [
        reference.paged_attention(piece, paged.pool.to(dtype), layer, blocks.long(), length - len(piece), window)
        for piece, blocks, length in zip(pieces, paged.tables, paged.lengths, strict=True)
    ]
    return torch.cat(found)


def assert_attention(
    out: torch.Tensor, paged: Paged, query: torch.Tensor, lengths: list[int], window: int | None
) -> None:
    """The probabilities are rounded to the values' dtype before they meet, as in every flash attention: a step each."""
    exact = paged_attention(paged, query, 1, lengths, window, torch.float32)
    step = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[out.dtype]
    assert error(out, exact) <= step, f"error {error(out, exact):.2e}"


def check_decode_attention(
    device: str,
    dtype: torch.dtype,
    heads: Heads,
    lengths: list[int],
    block_tokens: int,
    plan: decode_plan.DecodePlan,
    window: int | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Runs twice: the second run finds what the first left in the scratch. Returns the output."""
    paged = Paged.make(device, dtype, heads, lengths, block_tokens)
    query = randn((len(lengths), heads.query, heads.dim), dtype, device)
    scratch = decode_attention.DecodeScratch.make(
        len(lengths), plan.num_splits, heads.query, heads.key, heads.dim, device
    )
    scratch.parts.fill_(float("nan"))
    scratch.softmax.fill_(float("nan"))
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    outs = [poison(tuple(query.shape), dtype, device) for _ in range(2)]
    for out in outs:
        decode_attention.decode_attention(
            query, paged.pool, 1, paged.tables, held, plan, scratch, out, window=window, pdl=pdl
        )
    assert_attention(outs[0], paged, query, [1] * len(lengths), window)
    assert torch.equal(outs[0], outs[1]), "the same inputs gave other bits"
    assert not bool(scratch.arrived.any()), "a counter was not set back"
    return outs[0]
