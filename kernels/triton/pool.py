"""The paged pool as the kernels see it: rows of head_dim elements, at equal distances from unit to unit.

    tensor [num_blocks, units, layers, 2, block_tokens, head_dim], a unit (a KV head of a block) contiguous
    row of token t of block b, unit u, layer l, plane p (0: key, 1: value):
        (b * units + u) * unit_rows + (l * 2 + p) * block_tokens + t % block_tokens

unit_rows may be more than the rows of a unit: what lies behind it is padding, which no kernel touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels.triton.launch import require


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
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> PagedPool:
        """Raises ValueError for a tensor that is no such pool."""
        require(
            tensor.dim() == 6 and tensor.shape[3] == 2, f"a pool of {tuple(tensor.shape)} is not [., ., ., 2, ., .]"
        )
        num_blocks, num_units, num_layers, _, block_tokens, head_dim = tensor.shape
        plane = block_tokens * head_dim
        unit = tensor.stride(0) // num_units
        require(tensor.stride()[2:] == (2 * plane, plane, head_dim, 1), "a unit of the pool must be contiguous")
        require(tensor.stride()[:2] == (num_units * unit, unit), "the units of a pool must lie equally far apart")
        require(unit % head_dim == 0 and unit >= num_layers * 2 * plane, f"units lie {unit} elements apart")
        unit_rows = unit // head_dim
        num_rows = (num_blocks * num_units - 1) * unit_rows + num_layers * 2 * block_tokens
        require(num_rows < 2**31, f"the pool has {num_rows} rows, more than int32 counts")
        rows = tensor.as_strided((num_rows, head_dim), (head_dim, 1))
        return cls(tensor, rows, num_units, num_layers, block_tokens, head_dim, unit_rows, tensor.dtype)

    def require_layer(self, layer: int) -> None:
        require(0 <= layer < self.num_layers, f"layer {layer} of {self.num_layers}")
