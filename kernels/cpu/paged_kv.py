"""Keys and values in the paged pool of the CPU: how they are written, and gathered for attention, as plain numbers or
quantised.

The pool is [num_blocks, KH, layers, 2, block_tokens, D]. A piece is one head's keys or values of a block in one layer,
[block_tokens, D]: number ((block * KH + head) * layers + layer) * 2, and 1 more for values; token t of it is slot
piece * block_tokens + t. Attention gets pieces of numbers as it computes with, whatever the pool holds.
"""

from __future__ import annotations

from typing import Protocol

import torch

from baton.kernels.reference import kv_scales, quantise_kv, write_kv

KEPT_BITS = 0x87F00000 - (1 << 32)
"""Where a float32 has the sign of an 8-bit float, and its other 7 bits: low in the exponent, high in the mantissa."""


class PagedKv(Protocol):
    """One pool. One thread makes all calls."""

    def write(self, slot_ids: torch.Tensor, kv: torch.Tensor) -> None:
        """slot_ids int64 [N, 2, KH]; kv [N, 2, KH * D], keys and values."""
        ...

    def gather(self, piece_ids: torch.Tensor) -> torch.Tensor:
        """The pieces [len(piece_ids), block_tokens * D], int64 ids, valid until the next gather. The first half are
        keys, and the second half the values of the same blocks, heads and layers, in the same order."""
        ...


class _Workspace:
    """Memory that gathers reuse: a fresh allocation of megabytes a layer costs more in page faults than the copy."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, dtype=dtype)

    def gather(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.index_select(rows, 0, ids, out=self.take(len(ids), rows.shape[1]))

    def take(self, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=self._buffer.dtype)
        return self._buffer[:size].view(shape)


class PlainKv:
    """A pool of the numbers that attention computes with, contiguous."""

    def __init__(self, pool: torch.Tensor) -> None:
        block_tokens, head_dim = pool.shape[4:]
        self._slots = pool.view(-1, head_dim)
        self._pieces = pool.view(-1, block_tokens * head_dim)
        self._workspace = _Workspace(pool.dtype)

    def write(self, slot_ids: torch.Tensor, kv: torch.Tensor) -> None:
        write_kv(self._slots, slot_ids, kv)

    def gather(self, piece_ids: torch.Tensor) -> torch.Tensor:
        return self._workspace.gather(self._pieces, piece_ids)


class QuantisedKv:
    """A pool of 8-bit floats. With scales in it, those of a layer follow its data; else `static` are all that there
    are. Attention computes with the numbers in the pool, also of the tokens of its own step."""

    def __init__(
        self, pool: torch.Tensor, scales: torch.Tensor | None, static: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """scales: float32 [num_blocks, KH, layers, 2, block_tokens], in the same memory as the pool; or static float32
        [layers, 2, KH]. dtype: of what `gather` gives. A (block, head, layer) is contiguous, and no gap behind it."""
        num_blocks, kv_heads, layers, _, self._block_tokens, self._head_dim = pool.shape
        self._num_parts, self._part_bytes = num_blocks * kv_heads * layers, pool.stride(2)
        raw = pool.view(torch.uint8)
        self._parts = raw.as_strided((self._num_parts, self._part_bytes), (self._part_bytes, 1))
        rows, words = 2 * self._block_tokens, self._head_dim // 4  # words of four numbers: the copy counts elements
        shape, strides = (self._num_parts, rows, words), (self._part_bytes // 4, words, 1)
        self._rows = pool.view(torch.int32).as_strided(shape, strides)
        self._scales = None
        if scales is not None:
            self._scales = scales.as_strided((self._num_parts, 2 * self._block_tokens), (scales.stride(2), 1))
        # of a head in a layer, keys and values: [KH * layers, 2]
        self._static = None if static is None else static.permute(2, 0, 1).reshape(-1, 2).contiguous()
        self._raw, self._wide = _Workspace(torch.uint8), _Workspace(torch.float32)
        self._dtype = dtype

    def write(self, slot_ids: torch.Tensor, kv: torch.Tensor) -> None:
        parts, rows = slot_ids // (2 * self._block_tokens), slot_ids % (2 * self._block_tokens)
        heads = kv.float().unflatten(-1, (-1, self._head_dim))  # [N, 2, KH, D]
        if self._static is None:
            assert self._scales is not None, "there are scales in the pool or static ones"
            scales = kv_scales(heads)
            self._scales[parts, rows] = scales
        else:
            scales = self._static[parts % len(self._static), rows // self._block_tokens]
        self._rows[parts, rows] = quantise_kv(heads, scales).view(torch.int32)

    def gather(self, piece_ids: torch.Tensor) -> torch.Tensor:
        parts = piece_ids[: len(piece_ids) // 2] // 2
        count, tokens, size = len(parts), self._block_tokens, 2 * self._block_tokens * self._head_dim
        raw = self._raw.gather(self._parts, parts)
        data = raw[:, :size].view(torch.int8).view(count, 2, tokens, self._head_dim)
        if self._static is None:
            scales = raw[:, size : size + 8 * tokens].view(torch.float32).view(count, 2, tokens)
        else:
            scales = self._static[parts % len(self._static), :, None].expand(-1, -1, tokens)
        wide = self._wide.take(2, count, tokens, self._head_dim)
        _widen(data.transpose(0, 1), wide)
        wide.mul_(scales.transpose(0, 1)[..., None])
        return wide.view(2 * count, -1).to(self._dtype)


def _widen(data: torch.Tensor, out: torch.Tensor) -> None:
    """out float32: the 8-bit floats (e4m3) with these bits, int8; ten times as fast as torch's conversion and exact.

    The bits are those of a float32 whose exponent is too small by the difference of the biases, 127 - 7.
    """
    bits = out.view(torch.int32)
    bits.copy_(data).bitwise_left_shift_(20).bitwise_and_(KEPT_BITS)
    out.mul_(2.0**120)
