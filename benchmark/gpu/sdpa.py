"""torch's fused attention beside ours: cuDNN's and FlashAttention 2, through scaled_dot_product_attention.

They read keys and values that lie together, [B, KH, L, D]; ours reads pages of a pool through a table. So theirs is the
easier task, and what a cache of pages costs is within the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

TensorCall = Callable[[], torch.Tensor]

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MOST_OFF = 0.01
"""Relative error against ours: the probabilities of both were rounded to bfloat16."""


@dataclass(frozen=True, slots=True)
class CheckedCall:
    """torch's attention of one case, whose result was compared with ours."""

    call: TensorCall
    expanded: bool
    """Each key head was copied for its query heads beforehand; else the backend shares them."""


class Unsupported(Exception):
    """The backend does not compute this, or not correctly; the message says why."""


def contiguous(pool: torch.Tensor, layer: int, tables: torch.Tensor) -> torch.Tensor:
    """[2, B, KH, L, D]: keys and values of pages; pool [blocks, KH, layers, 2, block_tokens, D], tables [B, pages]."""
    pages = pool[:, :, layer][tables.long()]  # [B, pages, KH, 2, block_tokens, D]
    return pages.permute(3, 0, 2, 1, 4, 5).flatten(3, 4).contiguous()


def attend(backend: SDPBackend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] of the last N of L tokens: query [B, H, N, D], keys and values [B, KH, L, D]."""
    num_new, length = query.shape[2], keys.shape[2]
    square = num_new == length
    mask = None if square or num_new == 1 else causal_lower_right(num_new, length)
    if mask is not None and backend == SDPBackend.CUDNN_ATTENTION:
        raise Unsupported("torch lets cuDNN's causal mask begin at the top left only")
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=square and num_new > 1,
            enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip


def checked_call(
    backend: SDPBackend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ours: torch.Tensor
) -> CheckedCall:
    """Checked against ours, [B, H, N, D]; with heads that are shared if the backend can, else with copies."""
    try:
        return CheckedCall(_checked(partial(attend, backend, query, keys, values), ours), False)
    except Unsupported as error:
        refused = str(error)
    group = query.shape[1] // keys.shape[1]
    copies = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    try:
        return CheckedCall(_checked(partial(attend, backend, query, *copies), ours), True)
    except Unsupported as again:
        if str(again) == refused:
            raise
        raise Unsupported(f"{refused}; with copied heads: {again}") from again


def _checked(call: TensorCall, ours: torch.Tensor) -> TensorCall:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = call()
        except RuntimeError as error:
            raise Unsupported(_reason(error, [str(each.message) for each in caught])) from error
    off = float((found - ours).float().norm() / ours.float().norm())
    if not off <= MOST_OFF:
        raise Unsupported(f"differs from ours by {off:.3g}")
    return call


def _reason(error: RuntimeError, messages: list[str]) -> str:
    """torch first warns of what each backend lacks, then raises."""
    reasons = [text.partition(" (Triggered")[0] for text in messages]
    reasons = [text for text in reasons if "not used because" not in text and "runtime disabled" not in text]
    return " ".join([*reasons, str(error).partition("\n")[0]])
