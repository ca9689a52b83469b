"""The tensors over the bytes of a pool: its numbers, and the scales that lie between them where KV is quantised so.

Both are views: what writes them writes what is moved, stored and digested.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from baton.kvtransfer.blocks.layout import SCALE_BYTES, KVLayout


class KvTensors(NamedTuple):
    data: torch.Tensor
    """[num_blocks, num_units, num_layers, planes, block_tokens, head_dim], of the layout's dtype."""
    scales: torch.Tensor | None
    """float32 [num_blocks, num_units, num_layers, planes, block_tokens], if the layout has scales inside units."""


def kv_tensors(memory: torch.Tensor, layout: KVLayout, num_blocks: int) -> KvTensors:
    """memory: uint8 [num_blocks * layout.block_bytes]."""
    dtype: torch.dtype = getattr(torch, layout.dtype)  # a key of DTYPE_BYTES, never text of a peer
    data = memory.view(dtype).as_strided(layout.shape(num_blocks), layout.strides)
    if layout.scales != "token":
        return KvTensors(data, None)
    words = memory.view(torch.float32)
    first = words.storage_offset() + layout.data_bytes // SCALE_BYTES
    return KvTensors(data, words.as_strided(layout.scales_shape(num_blocks), layout.scales_strides, first))
