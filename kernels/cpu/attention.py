"""Attention over the paged pool for the CPU: gather the blocks of several rows, then one scaled_dot_product_attention.

The gather costs one copy of the keys and values, in pieces of a block; it is what a contiguous view over a paged pool
costs without a kernel of our own. Decode rows come in groups of similar length (see `models.attention`), so that a
group's copy stays in the core's cache until it is used and little of it is padding. Bytes moved a layer: twice the KV
of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baton.kernels.cpu.paged_kv import PagedKv
from baton.kernels.scores import Scores

QUERY_SLICE = 256  # queries that share a mask: bounds the mask to 256 rows however long the context is


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Consecutive decode rows first_row .. first_row + num_rows - 1 of a step, padded to one number of tokens T."""

    first_row: int
    num_rows: int
    first_id: int
    """Where its pieces begin in the step's piece ids: row by row and head by head its key blocks, then its value
    blocks."""
    num_ids: int
    mask: torch.Tensor
    """Added to the scores, [num_rows, 1, 1, T]: 0 or -inf."""
    window_mask: torch.Tensor
    """The same for layers with a sliding window; the same tensor where there is none."""


def decode_attention(
    query: torch.Tensor,
    kv: PagedKv,
    piece_ids: torch.Tensor,
    group: DecodeGroup,
    windowed: bool,
    scores: Scores,
    num_kv_heads: int,
    out: torch.Tensor,
    num_planes: int = 2,
    sinks: torch.Tensor | None = None,
) -> None:
    """Writes the group's rows of out; one query token a row.

    query and out [N, H, D]; piece_ids: this layer's, int64. The heads that share a key head stand as if they were query
    tokens: all of them read the same keys, so nothing has to be repeated. With one plane the values are the first
    elements of the keys, as many as out [N, H, V] has. sinks [H]: a score of each head for which there is no value.
    """
    rows = slice(group.first_row, group.first_row + group.num_rows)
    gathered = kv.gather(piece_ids[group.first_id : group.first_id + group.num_ids])
    mask = group.window_mask if windowed else group.mask
    heads = query[rows].view(group.num_rows, num_kv_heads, -1, query.shape[2])  # [rows, KH, group size, D]
    planes = gathered.view(num_planes, group.num_rows, num_kv_heads, -1, heads.shape[-1])
    keys, values = planes[0], planes[-1, ..., : out.shape[2]]
    target = out[rows].view(*heads.shape[:3], -1)
    of_heads = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
    target.copy_(_attend(heads, keys, values, mask, scores, of_heads))


def chunk_attention(
    query: torch.Tensor,
    kv: PagedKv,
    piece_ids: torch.Tensor,
    start: int,
    window: int | None,
    scores: Scores,
    num_kv_heads: int,
    out: torch.Tensor,
    num_planes: int = 2,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one sequence's tokens start .. start + n - 1 over all up to each; query and out [n, H, D].

    piece_ids: this layer's key blocks of the sequence, head by head, and then value blocks, if there are two planes. A
    window hides all but the last `window` tokens, the own one included. sinks: as of `decode_attention`.
    """
    num_new, num_heads, head_dim = query.shape
    gathered = kv.gather(piece_ids).view(num_planes, num_kv_heads, 1, -1, head_dim)
    # As a batch of key heads, each with its query heads: [KH, group size, tokens, D]. The expansion copies nothing.
    heads = query.view(num_new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    planes = gathered.expand(-1, -1, num_heads // num_kv_heads, -1, -1)
    keys, values = planes[0], planes[-1, ..., : out.shape[2]]
    target = out.view(num_new, num_kv_heads, -1, out.shape[2]).permute(1, 2, 0, 3)
    of_heads = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)
    plain = scores.softcap is None and sinks is None
    if start == 0 and (window is None or num_new <= window) and plain:
        keys, values = keys[:, :, :num_new], values[:, :, :num_new]
        target.copy_(F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scores.scale))
        return
    for first in range(0, num_new, QUERY_SLICE):
        part = slice(first, min(first + QUERY_SLICE, num_new))
        oldest = 0 if window is None else max(0, start + part.start - window + 1)
        seen = slice(oldest, start + part.stop)
        mask = _causal_mask(start + part.start, start + part.stop, oldest, window, query)
        target[:, :, part] = _attend(heads[:, :, part], keys[:, :, seen], values[:, :, seen], mask, scores, of_heads)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scores: Scores,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[..., n, D] of query [..., n, D] over keys and values [..., T, D]; the mask is added to the scores. sinks: one
    more score a query, broadcast to [..., n, 1], whose weight goes nowhere."""
    if scores.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scores.scale)
    products = query @ keys.transpose(-1, -2)
    if scores.softcap is None:
        products.mul_(scores.scale)
    else:
        products.mul_(scores.scale / scores.softcap).tanh_().mul_(scores.softcap)
    products = products + mask
    if sinks is not None:
        products = torch.cat((products, sinks.to(products.dtype).expand(*products.shape[:-1], 1)), -1)
    weights = products.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[-2]] @ values


def _causal_mask(first: int, end: int, oldest: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """0 where token i in first .. end - 1 sees token j in oldest .. end - 1, else -inf; [end - first, end - oldest]."""
    mask = like.new_full((end - first, end - oldest), float("-inf")).triu_(first - oldest + 1)
    if window is not None:
        mask += like.new_full(mask.shape, float("-inf")).tril_(first - oldest - window)
    return mask
