"""The paged pool as the kernels see it: rows of head_dim elements, at equal distances from unit to unit.

    tensor [num_blocks, units, layers, 2, block_tokens, head_dim], a unit (a KV head of a block) contiguous
    row of token t of block b, unit u, layer l, plane p (0: key, 1: value):
        (b * units + u) * unit_rows + l * layer_rows + p * block_tokens + t % block_tokens

unit_rows may be more than the rows of a unit: what lies behind it is padding, which no kernel touches. Of 8-bit floats
the scales, float32, are either in the pool, [2, block_tokens] behind the rows of their layer, or one for all tokens:

    word of token t, counted from the first scale of the pool:
        ((b * units + u) * unit_rows + l * layer_rows) * (head_dim / 4) + p * block_tokens + t % block_tokens
    word of a table [layers, 2, units]:  (l * 2 + p) * units + u

The pool of latent attention has one unit of one plane (`of(..., planes=1)`): a row is a token's latent and rotated key.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import require

NO_SCALES = tl.constexpr(0)
TOKEN_SCALES = tl.constexpr(1)
STATIC_SCALES = tl.constexpr(2)
FP8_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(1e-30)  # as in kernels.reference


@triton.jit
def quantise(x, scale):
    """x in multiples of its scale, within what an 8-bit float (e4m3) can say; rounded when it is stored."""
    return tl.clamp(tl.div_rn(x, scale), -FP8_MAX, FP8_MAX)


@dataclass(frozen=True, slots=True)
class PagedPool:
    """A pool and its measures; checked once, so that launches need not."""

    tensor: torch.Tensor
    rows: torch.Tensor
    """The same memory as [rows, head_dim], the padding behind the last unit left out."""
    num_units: int
    num_layers: int
    block_tokens: int
    head_dim: int
    unit_rows: int
    layer_rows: int
    dtype: torch.dtype
    scales: torch.Tensor | None
    scale_mode: int
    """What `scales` are: NO_SCALES, TOKEN_SCALES or STATIC_SCALES."""

    @classmethod
    def of(cls, tensor: torch.Tensor, scales: torch.Tensor | None = None, planes: int = 2) -> PagedPool:
        """Raises ValueError for a tensor that is no such pool. scales: float32 [num_blocks, units, layers, 2,
        block_tokens] in the same memory, or [layers, 2, units]; of two planes only."""
        expected = f"[., ., ., {planes}, ., .]"
        require(tensor.dim() == 6 and tensor.shape[3] == planes, f"a pool of {tuple(tensor.shape)} is not {expected}")
        require(planes == 2 or scales is None, "scales belong to keys and to values")
        num_blocks, num_units, num_layers, _, block_tokens, head_dim = tensor.shape
        plane = block_tokens * head_dim
        unit = tensor.stride(0) // num_units
        layer = tensor.stride(2)
        require(tensor.stride()[3:] == (plane, head_dim, 1), "a layer of the pool must be contiguous")
        require(tensor.stride()[:2] == (num_units * unit, unit), "the units of a pool must lie equally far apart")
        mode = _scale_mode(tensor, scales)
        room = 2 * block_tokens * 4 if mode == TOKEN_SCALES.value else 0
        require(layer == -(-(planes * plane + room) // head_dim) * head_dim, f"layers lie {layer} elements apart")
        require(unit % head_dim == 0 and unit >= num_layers * layer, f"units lie {unit} elements apart")
        unit_rows, layer_rows = unit // head_dim, layer // head_dim
        num_rows = (num_blocks * num_units - 1) * unit_rows + (num_layers - 1) * layer_rows + planes * block_tokens
        require(num_rows < 2**31, f"the pool has {num_rows} rows, more than int32 counts")
        rows = tensor.as_strided((num_rows, head_dim), (head_dim, 1))
        return cls(
            tensor,
            rows,
            num_units,
            num_layers,
            block_tokens,
            head_dim,
            unit_rows,
            layer_rows,
            tensor.dtype,
            scales,
            mode,
        )

    def require_reads(self, query: torch.Tensor) -> None:
        """Raises ValueError unless attention of this query can be computed: 8-bit floats become the query's."""
        require(self.scales is not None or query.dtype == self.dtype, f"query is {query.dtype}, the pool {self.dtype}")

    def require_layer(self, layer: int) -> None:
        require(0 <= layer < self.num_layers, f"layer {layer} of {self.num_layers}")


def _scale_mode(tensor: torch.Tensor, scales: torch.Tensor | None) -> int:
    """Raises ValueError for scales that do not fit the pool."""
    require((scales is not None) == (tensor.dtype == torch.float8_e4m3fn), f"{tensor.dtype} and scales do not fit")
    if scales is None:
        return NO_SCALES.value
    require(scales.dtype == torch.float32, f"scales are {scales.dtype}")
    _, num_units, num_layers, planes, block_tokens, head_dim = tensor.shape
    require(head_dim % 4 == 0, f"rows of {head_dim} bytes are not made of words")
    if scales.dim() == 3:
        require(scales.shape == (num_layers, planes, num_units), f"scales are {list(scales.shape)}")
        require(scales.is_contiguous(), "static scales must be contiguous")
        return STATIC_SCALES.value
    strides = tuple(stride // 4 for stride in tensor.stride()[:3])
    require(scales.shape == tensor.shape[:5], f"scales are {list(scales.shape)}")
    require(scales.stride() == (*strides, block_tokens, 1), "scales do not lie where the pool's layers do")
    return TOKEN_SCALES.value
