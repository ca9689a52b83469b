"""A quantised weight in one form, whatever wrote it, and the numbers that it stands for. It knows no name of a tensor.

A weight of N outputs and K inputs is a matrix of codes with scales, and often zero points, that runs of outputs and
groups of inputs share:

    W[n, k] = (codes[n, k] - zeros[r, g]) * scales[r, g]     r = n // outputs a scale,  g = the group of input k

It is computed in float32, where it is exact for all that is read here but blocks of FP8, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PART_ELEMENTS = 1 << 20
"""Of the float32 numbers that are made at a time: 4 MiB, which stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """See the formula above."""

    codes: torch.Tensor  # [N, K] uint8, int8 or float8_e4m3fn
    scales: torch.Tensor  # [ceil(N / outputs_per_scale), G] floating point
    outputs_per_scale: int
    inputs_per_scale: int
    """The group of input k is number k // inputs_per_scale, unless `group_of_input` says otherwise."""
    zeros: torch.Tensor | None = None  # as `scales`, int16; None: 0
    group_of_input: torch.Tensor | None = None  # [K] int64
    bits: int = 8
    """Of a code."""
    scale_dtype: torch.dtype = torch.float32
    """Of the file, in which the scales are exact."""

    def dequantise(self, target: torch.Tensor, outputs: range, inputs: range) -> None:
        """Fills target [len(outputs), len(inputs)] with this part of W; all on one device."""
        columns = slice(inputs.start, inputs.stop)
        step = max(1, PART_ELEMENTS // max(1, len(inputs)))
        for first in range(outputs.start, outputs.stop, step):
            end = min(first + step, outputs.stop)
            rows = torch.arange(first, end, device=self.codes.device) // self.outputs_per_scale
            values = self.codes[first:end, columns].to(torch.float32)
            if self.zeros is not None:
                values -= self._spread(self.zeros[rows], inputs)
            values *= self._spread(self.scales[rows], inputs)
            target[first - outputs.start : end - outputs.start].copy_(values)

    def _spread(self, of_groups: torch.Tensor, inputs: range) -> torch.Tensor:
        """[R, G] -> [R, len(inputs)]: what the group of each of these inputs has."""
        if self.group_of_input is not None:
            return of_groups[:, self.group_of_input[inputs.start : inputs.stop]]
        width = self.inputs_per_scale
        first, end = inputs.start // width, -(-inputs.stop // width)
        spread = of_groups[:, first:end].repeat_interleave(width, 1)
        return spread[:, inputs.start - first * width :][:, : len(inputs)]


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[R, W] int32 -> [R, count] uint8: the unsigned integers of a row whose bits follow one another, lowest first, as
    if its words were one long number. Needs W = ceil(count * bits / 32)."""
    words_as_bytes = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        return ((words_as_bytes[..., None] >> shifts) & (1 << bits) - 1).flatten(-2)[:, :count]
    first_bit = torch.arange(count, device=words.device) * bits
    low = words_as_bytes[:, first_bit // 8].to(torch.int32)
    high = words_as_bytes[:, (first_bit + bits - 1) // 8].to(torch.int32)  # the same byte, or the next one
    both = torch.where((first_bit + bits - 1) // 8 == first_bit // 8, low, low | high << 8)
    return (both >> (first_bit % 8).to(torch.int32) & (1 << bits) - 1).to(torch.uint8)
