"""Latent attention around the products of queries and latents: what is cached of a token, queries that fit it, and
values of what was attended. For prompts and decoding alike: on a CPU attention is a small part of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton import kernels
from baton.kernels import Linear
from baton.models.cpu.adapters import PlacedPair
from baton.models.latent_config import LATENT_NORM_EPS
from baton.models.layer_weights import LatentWeights
from baton.models.layers import LatentAttention

Pairs = Sequence[tuple[torch.Tensor, PlacedPair]]
"""Of adapters, what they change of the weight that makes keys and values, and their rows."""
Product = Callable[[str, Linear, torch.Tensor], torch.Tensor]
"""product(name, linear, x): of x, with what adapters change of it."""


def absorbed(
    shape: LatentAttention,
    weights: LatentWeights,
    x: torch.Tensor,
    rotations: tuple[torch.Tensor, torch.Tensor],
    product: Product,
    pairs: Pairs = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [N, num_heads, latent_dim + rotated_dim], and what is cached, [N, 1, latent_dim + rotated_dim]; x
    [N, hidden]."""
    dims, joined = shape.dims, product("qkv", weights.qkv, x)
    query, latent, key = joined.split((joined.shape[1] - dims.row_dim, dims.latent_dim, dims.rotated_dim), -1)
    if weights.query is not None and weights.query_norm is not None:
        query = product("query", weights.query, kernels.rms_norm(query, weights.query_norm, LATENT_NORM_EPS))
    heads = query.unflatten(-1, (shape.num_heads, dims.query_dim))
    latent = kernels.rms_norm(latent, weights.latent_norm, LATENT_NORM_EPS)
    row = torch.cat((latent[:, None], _rotated(key[:, None], dims.interleaved, rotations)), -1)
    key_up = weights.kv_up[:, : dims.plain_dim]  # [num_heads, plain_dim, latent_dim]
    plain = heads[..., : dims.plain_dim].transpose(0, 1)
    products = plain @ key_up
    for rows, pair in pairs:
        b, scale = _of_heads(pair, shape.num_heads, slice(dims.plain_dim))
        if scale is not None:
            products[:, rows] = (plain[:, rows] * scale) @ key_up
        products[:, rows] += (plain[:, rows] @ b) @ pair.a
    turned = _rotated(heads[..., dims.plain_dim :], dims.interleaved, rotations)
    return torch.cat((products.transpose(0, 1), turned), -1), row


def raised(shape: LatentAttention, weights: LatentWeights, attended: torch.Tensor, pairs: Pairs = ()) -> torch.Tensor:
    """[N, num_heads * value_dim] of what was attended, [N, num_heads * latent_dim]."""
    value_up = weights.kv_up[:, shape.dims.plain_dim :]  # [num_heads, value_dim, latent_dim]
    heads = attended.unflatten(-1, (shape.num_heads, -1)).transpose(0, 1)
    values = heads @ value_up.transpose(1, 2)
    for rows, pair in pairs:
        b, scale = _of_heads(pair, shape.num_heads, slice(shape.dims.plain_dim, None))
        if scale is not None:
            values[:, rows] *= scale
        values[:, rows] += (heads[:, rows] @ pair.a.t()) @ b.transpose(1, 2)
    return values.transpose(0, 1).flatten(1)


def _of_heads(pair: PlacedPair, num_heads: int, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A part of the outputs of each head: b [num_heads, part, rank], and row_scale [num_heads, 1, part]."""
    scale = None if pair.row_scale is None else pair.row_scale.view(num_heads, 1, -1)[..., part]
    return pair.b.unflatten(0, (num_heads, -1))[:, part], scale


def _rotated(x: torch.Tensor, interleaved: bool, rotations: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [N, heads, rotated_dim]; the first elements of all pairs come first in what is returned."""
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1) if interleaved else x.contiguous()
    kernels.apply_rope(halves, *rotations)
    return halves
