"""Slow, obvious torch versions of every op: the oracle in tests, and what the CPU runs where nothing faster is needed.

Shapes: N tokens of a step, H query heads, KH key heads (H a multiple of KH), D head_dim, V vocabulary. The pool is
[num_blocks, KH, layers, 2, block_tokens, D], key before value; token t of a sequence lies in block `blocks[t //
block_tokens]` at `t % block_tokens`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from baton.kernels.scores import Scores

NEGATIVE_INFINITY = float("-inf")
LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-30
"""What the largest number of a key or value counts at least as, so that zeros have a scale too."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, the quotient in float32 and rounded to x's dtype.

    weight: the last dimension of x, or its last two (a weight of its own for each head). Where it is float32 and x is
    not, the quotient is multiplied before it is rounded.
    """
    if x.dtype == torch.float32 and weight.dim() == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    quotient = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return (quotient * weight).to(x.dtype) if weight.dtype == torch.float32 else quotient.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(residual + x), residual + x); the sum is written to `residual`."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates x [N, heads, D] in place, pairing element i with i + D/2 as Hugging Face weights want it; where only a
    part of a head is rotated, x is that part.

    cos and sin are [N, 1, 2, D/2] as `models.rope.rotations` makes them: the first half of sin negated.
    """
    halves = x.view(*x.shape[:-1], 2, -1)  # [N, heads, 2, D/2]
    swapped = halves.flip(2)
    halves.mul_(cos).addcmul_(swapped, sin)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; gate_up is [N, 2 * intermediate], gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with the tanh approximation of gelu; as `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def quantise(x: torch.Tensor, code_type: torch.dtype, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x [N, K], and float32 scales [K / width, N] of runs of `width` values: x is about codes * scales.

    The largest of a run gets the largest code; a run of zeros the scale 0.
    """
    runs = x.float().unflatten(1, (-1, width))
    most = runs.abs().amax(-1, keepdim=True)
    largest = torch.full_like(most, LARGEST_CODE[code_type])  # torch divides by a number, or it, by way of a reciprocal
    scaled = runs * (largest / most.clamp(min=2.0**-100))
    codes = scaled.round() if code_type == torch.int8 else scaled.clamp(-448.0, 448.0)
    return codes.to(code_type).view(x.shape), (most / largest)[..., 0].t().contiguous()


def write_kv(slots: torch.Tensor, slot_ids: torch.Tensor, kv: torch.Tensor) -> None:
    """Puts keys and values into the pool: slots[slot_ids[n, i]] = kv[n, i].

    slots: the pool as [num_blocks * KH * layers * 2 * block_tokens, D]; slot_ids int64 [N, 2, KH] and kv
    [N, 2, KH * D], keys and values; or one of each where the pool has one plane.
    """
    slots[slot_ids] = kv.to(slots.dtype).unflatten(-1, slot_ids.shape[2:] + slots.shape[1:])


def kv_scales(x: torch.Tensor) -> torch.Tensor:
    """The scale of each key or value, float32 [...]: the largest of |x| over its D elements, [..., D], becomes 448."""
    return x.float().abs().amax(-1).clamp(min=SMALLEST_AMAX) / FP8_MAX


def quantise_kv(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [..., D] in multiples of its scales [...], rounded to the nearest 8-bit floats (e4m3); what is larger than 448
    becomes 448."""
    return (x.float() / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def dequantise_kv(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers, float32, that data [..., D] with scales [...] stands for."""
    return data.float() * scales[..., None]


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    blocks: torch.Tensor,
    start: int,
    window: int | None,
    scores: Scores | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence's new tokens over all its tokens in the pool, in float32 throughout; [n, H, D].

    query [n, H, D] belongs to the tokens start .. start + n - 1, whose keys and values are already in the pool. Token i
    sees j when j <= i and, with a window, j > i - window. scores: None is the scale 1 / sqrt(D). sinks [H]: a
    score more of each head, for which there is no value.
    """
    num_new, num_heads, head_dim = query.shape
    total = start + num_new
    keys, values = (  # [total, KH, D]
        pool[blocks, :, layer, i].transpose(1, 2).flatten(0, 1)[:total].float() for i in (0, 1)
    )
    group = num_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scale, softcap = scores or (head_dim**-0.5, None)
    products = torch.einsum("nhd,thd->hnt", query.float(), keys) * scale
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    here, there = torch.arange(start, total)[:, None], torch.arange(total)[None, :]
    seen = there <= here if window is None else (there <= here) & (there > here - window)
    products = products.masked_fill(~seen, NEGATIVE_INFINITY)
    if sinks is not None:
        products = torch.cat((products, sinks.float()[:, None, None].expand(-1, num_new, 1)), -1)
    weights = products.softmax(-1)[..., :total]
    return torch.einsum("hnt,thd->nhd", weights, values).to(query.dtype)


def latent_attention(
    query: torch.Tensor, rows: torch.Tensor, kv_up: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """Latent attention of one sequence's new tokens, with keys and values made in full; [n, H, V].

    query [n, H, P + R] belongs to the tokens start .. start + n - 1; rows [start + n, L + R] are the latents and the
    rotated keys of all; kv_up [H, P + V, L] makes the other part of a head's keys, and its values. Keys, values and
    weights are rounded to the query's dtype, all else is float32.
    """
    latents, rotated = rows.float().split((kv_up.shape[2], rows.shape[1] - kv_up.shape[2]), -1)
    plain_dim = query.shape[2] - rotated.shape[1]
    made = torch.einsum("hdl,tl->thd", kv_up.float(), latents).to(query.dtype).float()
    keys, values = made.split((plain_dim, made.shape[2] - plain_dim), -1)
    products = torch.einsum("nhd,thd->hnt", query[..., :plain_dim].float(), keys)
    products += torch.einsum("nhd,td->hnt", query[..., plain_dim:].float(), rotated)
    hidden = torch.arange(start, len(rows))[:, None] < torch.arange(len(rows))[None, :]
    weights = (products * scale).masked_fill(hidden.to(query.device), NEGATIVE_INFINITY).softmax(-1)
    return torch.einsum("hnt,thv->nhv", weights.to(query.dtype).float(), values).to(query.dtype)


# ---- log probabilities: logits [rows, V] ---------------------------------------------------------------------------


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of targets int64 [rows]: log probabilities [rows], and ranks [rows], 1 where no token is likelier; of the num_top
    likeliest tokens of each row: log probabilities [rows, n] in falling order, and ids. n is at most V."""
    logprobs = logits.float().log_softmax(-1)
    own = logits.gather(-1, targets[:, None])
    top = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    ranks = (logits > own).sum(-1) + 1
    return logprobs.gather(-1, targets[:, None])[:, 0], ranks, top.values, top.indices


# ---- sampling: float32 logits [rows, V], changed in place ---------------------------------------------------------


def keep_tokens(logits: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Drops all tokens of one row [V] but these, int64."""
    kept = logits[token_ids]
    logits.fill_(NEGATIVE_INFINITY)
    logits[token_ids] = kept


def keep_masked(logits: torch.Tensor, mask: torch.Tensor) -> None:
    """Drops the tokens of one row [V] whose bit is 0: token v is bit v % 32 of word v // 32; int32 [ceil(V / 32)]."""
    bits = (mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    logits.masked_fill_(bits.view(-1)[: len(logits)] == 0, NEGATIVE_INFINITY)


def apply_penalties(
    logits: torch.Tensor,
    prompt_counts: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Penalties as vLLM defines them; counts [rows, V] of each token in prompt and output, the others [rows, 1].

    Repetition divides a positive and multiplies a negative logit of each token seen anywhere (Keskar et al., CTRL,
    2019); frequency subtracts for each time, presence once, of tokens in the output only.
    """
    seen = (prompt_counts > 0) | (output_counts > 0)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits.copy_(torch.where(seen, scaled, logits))
    logits.sub_(frequency * output_counts)
    logits.sub_(presence * (output_counts > 0))


def keep_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> None:
    """Drops tokens less likely than min_p [rows, 1] times the likeliest."""
    floor = logits.max(-1, keepdim=True).values + min_p.log()
    logits.masked_fill_(logits < floor, NEGATIVE_INFINITY)


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> None:
    """Keeps the top_k [rows, 1] largest, int64 in 1..V, and those equal to the last of them."""
    ordered = logits.sort(-1, descending=True).values
    logits.masked_fill_(logits < ordered.gather(-1, top_k - 1), NEGATIVE_INFINITY)


def keep_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Keeps the fewest likeliest tokens that sum to top_p [rows, 1] or more, and those equal to the last of them."""
    ordered = logits.sort(-1, descending=True).values
    floor = nucleus_floor(ordered, logits.logsumexp(-1, keepdim=True), top_p)
    logits.masked_fill_(logits < floor, NEGATIVE_INFINITY)


def nucleus_floor(ordered: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit [rows, 1] that top_p keeps, of the largest logits in falling order [rows, n].

    total: log of the sum of exp over all logits of the row, [rows, 1]. A token stays while those before it sum to less
    than top_p, so the first always does.
    """
    probabilities = (ordered - total).exp()
    before = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
    kept = (before < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, kept - 1)


def gumbel_argmax(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A draw from softmax(logits), [rows]: argmax of logits + Gumbel noise -log(-log(1 - u)), lowest id first."""
    return (logits + gumbel_noise(u)).argmax(-1)


def gumbel_noise(u: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log1p(-u))


def low_rank_delta(
    x: torch.Tensor, adapters: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What adapters add to a product of x [N, K]: B (A x) of each row's own, [N, outputs]; 0 where adapters [N] < 0.

    a and b: by slot, [rank, K] and [outputs, rank]; A x is rounded to x's dtype.
    """
    delta = x.new_zeros(len(x), b[0].shape[0])
    for slot, (down, up) in enumerate(zip(a, b, strict=True)):
        rows = (adapters == slot).nonzero()[:, 0]
        delta[rows] = x[rows] @ down.T @ up.T
    return delta
