"""Weights of 4 bits as the kernels of `triton.linear_int4` read them, and what they stand for.

    W[n, k] = (codes[n, k] - zeros[k // group, n]) * scales[k // group, n]      codes 0 .. 15

A word of 16 bits holds four codes of a row, lowest bits first. They are a quarter of a block of inputs apart, not
neighbours: of a block that begins at input b, word c holds inputs b + c, b + c + block/4, b + c + block/2 and
b + c + 3 block/4. So a fixed place of neighbouring words is a run of neighbouring inputs, and two words in a register
become two operands of a matrix instruction by one shift and one mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CODES_PER_WORD = 4
SYMMETRIC_ZERO = 8
PART_BYTES = 64 << 20
"""Of the int32 numbers that packing makes at a time."""


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """See the formula above. N outputs, K inputs, G = K / group."""

    words: torch.Tensor  # [N, K / 4] int16
    scales: torch.Tensor  # [G, N] float16, bfloat16 or float32
    zeros: torch.Tensor | None  # [G, N] int8, 0 .. 16; None: all 8
    block: int
    """Inputs of a block; a multiple of the group, or the group one of it."""

    @property
    def num_outputs(self) -> int:
        return self.words.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.words.shape[1] * CODES_PER_WORD

    @property
    def group(self) -> int:
        return self.num_inputs // self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def dequantised(self) -> torch.Tensor:
        """[N, K] float32."""
        codes = unpack_codes(self.words, self.block).float()
        zeros = SYMMETRIC_ZERO if self.zeros is None else self._spread(self.zeros)
        return (codes - zeros) * self._spread(self.scales)

    def _spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[G, N] -> [N, K] float32"""
        return of_groups.t().float().repeat_interleave(self.group, 1)


def block_size(num_inputs: int, group: int) -> int | None:
    """Inputs of a block for K inputs in groups: 256, unless K or small groups need less. None: no kernel reads such."""
    return next(
        (
            size
            for size in (256, 128, 64)
            if num_inputs % size == 0 and (group % size == 0 or size in (group * 2, group * 4))
        ),
        None,
    )


def pack_codes(codes: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """Fills out [N, K / 4] int16; codes [N, K] uint8, 0 .. 15."""
    num_outputs, num_inputs = codes.shape
    step = max(1, PART_BYTES // (4 * num_inputs))
    for first in range(0, num_outputs, step):
        part = codes[first : first + step]
        places = part.view(len(part), num_inputs // block, CODES_PER_WORD, block // CODES_PER_WORD).to(torch.int32)
        words = places[:, :, 0] | places[:, :, 1] << 4 | places[:, :, 2] << 8 | places[:, :, 3] << 12
        out[first : first + step] = words.to(torch.int16).view(len(part), -1)  # the upper half is cut off


def unpack_codes(words: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K / 4] int16 -> [N, K] uint8"""
    blocks = words.view(len(words), -1, 1, block // CODES_PER_WORD).to(torch.int32)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)[:, None]
    return (blocks >> shifts & 15).to(torch.uint8).view(len(words), -1)
