"""The next token of each row: the likeliest, or a draw by Gumbel-max (E. J. Gumbel, 1954).

    token = argmax_v( logits[v] / temperature - log(-log(1 - u[v])) ),  u of kernels.philox for (seed, position, v)

A temperature of 0 asks for the argmax of the logits. Two kernels: each program of the first finds the best of BLOCK
tokens, the second the best of those; of equals the lowest id wins, so the order of programs does not matter. u equals
that of kernels.philox bit for bit; the logarithms are the GPU's, so a draw can differ from the CPU's where two tokens
are within rounding of each other. A rank that has a part of the tokens draws over these, and the best of all ranks is
the token that one rank would draw. Bytes: the logits once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require
from baton.kernels.triton.rank_vocabulary import MOST_TOKENS, best_of_rows
from baton.kernels.triton.rank_words import RankInbox

BLOCK = 4096
ROUNDS = tl.constexpr(10)


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """The best of each block of tokens; made once, for the largest step."""

    values: torch.Tensor  # float32 [rows, blocks]
    tokens: torch.Tensor  # int32 [rows, blocks]

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device) -> SamplingScratch:
        shape = (num_rows, cdiv(vocab_size, BLOCK))
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)
        )


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four uint32 words for counters and keys of uint32; the rounds of kernels.philox.philox4x32."""
    for _ in tl.static_range(ROUNDS):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniforms(seed, position, first_token, COUNT: tl.constexpr):
    """u of the tokens first_token .. + COUNT - 1, float32 [COUNT]; seed and position scalars, first_token % 4 == 0."""
    lane = (first_token // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = tl.zeros_like(lane)
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(lane, zero + position.to(tl.uint32), zero, zero, k0, k1)
    bits = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([COUNT])  # token t has word t % 4 of lane t // 4
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33
    return tl.minimum(u, 0.999999940395355225)  # 1 - 2**-24


@triton.jit
def gumbel(u):
    """-log(-log(1 - u)). 1 - u loses the low bits of a small u; the quotient puts them back (W. Kahan's log1p)."""
    rest = 1.0 - u
    exponential = tl.where(rest == 1.0, u, tl.log(rest) * (u / (rest - 1.0)))
    return -tl.log(exponential)


@triton.jit
def _best_of_block_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, value_ptr, token_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, DRAWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # FIRST: token of the first logit; noise comes in fours.
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    begin = FIRST // 4 * 4 + block * BLOCK
    place = begin - FIRST + tl.arange(0, BLOCK)
    inside = (place >= 0) & (place < VOCAB)
    values = tl.load(logits_ptr + row * VOCAB + place, mask=inside, other=float("-inf")).to(tl.float32)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            noise = gumbel(uniforms(tl.load(seed_ptr + row), tl.load(position_ptr + row), begin, BLOCK))
            values = values / temperature + noise
    best, winner = tl.max(values, 0, return_indices=True)
    tl.store(value_ptr + row * tl.num_programs(1) + block, best)
    tl.store(token_ptr + row * tl.num_programs(1) + block, begin + winner)


@triton.jit
def _best_of_row_kernel(
    value_ptr, token_ptr, out_ptr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.arange(0, BLOCKS_PADDED)
    values = tl.load(value_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    _, place = tl.max(values, 0, return_indices=True)
    tl.store(out_ptr + row, tl.load(token_ptr + row * BLOCKS + place).to(out_ptr.dtype.element_ty))


def argmax(logits: torch.Tensor, scratch: SamplingScratch, out: torch.Tensor, *, pdl: bool = False) -> None:
    """out [rows], int32 or int64: the lowest id of the largest logit; logits [rows, V], contiguous, no NaN."""
    _launch(logits, None, scratch, out, pdl)


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    scratch: SamplingScratch,
    out: torch.Tensor,
    *,
    ranks: RankInbox | None = None,
    first_token: int = 0,
    pdl: bool = False,
) -> None:
    """out [rows]: a draw from softmax(logits / temperature), or the argmax where the temperature is 0.

    temperatures float32, seeds int64 (below 2**63), positions int32 or int64 (the index that the new token gets in its
    sequence): [rows] each. A filter before it (top_k and the like) leaves -inf where a token may not be drawn.

    ranks: the logits are a rank's part, those of the tokens from `first_token` on; the others call with theirs, and get
    the same. An inbox of single words.
    """
    for values in (temperatures, seeds, positions):
        require(values.shape == (logits.shape[0],), "temperatures, seeds and positions need one a row")
        require(values.is_contiguous(), "tensors must be contiguous")
    require(temperatures.dtype == torch.float32 and seeds.dtype == torch.int64, "float32 temperatures and int64 seeds")
    _launch(logits, (temperatures, seeds, positions), scratch, out, pdl, ranks, first_token)


def _launch(
    logits: torch.Tensor,
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scratch: SamplingScratch,
    out: torch.Tensor,
    pdl: bool,
    ranks: RankInbox | None = None,
    first_token: int = 0,
) -> None:
    num_rows, vocab_size = logits.shape
    blocks = cdiv(vocab_size + first_token % 4, BLOCK)
    require(logits.is_contiguous() and out.is_contiguous(), "tensors must be contiguous")
    require(out.shape == (num_rows,), f"out {tuple(out.shape)} is not [{num_rows}]")
    require(scratch.values.numel() >= num_rows * blocks, "the scratch is too small")
    require(ranks is None or first_token + vocab_size <= MOST_TOKENS, "a token has 24 bits")
    if num_rows == 0:
        return
    temperatures, seeds, positions = (logits, logits, logits) if drawn is None else drawn
    _best_of_block_kernel[(num_rows, blocks)](
        logits,
        temperatures,
        seeds,
        positions,
        scratch.values,
        scratch.tokens,
        VOCAB=vocab_size,
        BLOCK=BLOCK,
        FIRST=first_token,
        DRAWS=drawn is not None,
        PDL=pdl,
        **launch_options(8, pdl),
    )

    if ranks is not None:
        best_of_rows(scratch.values, scratch.tokens, blocks, ranks, out)
        return
    _best_of_row_kernel[(num_rows,)](
        scratch.values,
        scratch.tokens,
        out,
        BLOCKS=blocks,
        BLOCKS_PADDED=next_power_of_2(blocks),
        PDL=pdl,
        **launch_options(1, pdl),
    )
