"""A weight of 8-bit codes, FP8 or INT8, and float32 scales that blocks of it share.

    W[n, k] = codes[n, k] * scales[n // outputs_per_scale, k // inputs_per_scale]

Scales of rows are a block of one output and all inputs, and lie as a vector [N]. Other blocks have a grid of scales,
whose last row and column may stand for fewer outputs and inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
COMMON_BLOCK = 128, 128


class ScaledLinear:
    """Fill `codes`, `scales` and `bias`, then call."""

    __slots__ = ("bias", "codes", "inputs_per_scale", "num_inputs", "num_outputs", "outputs_per_scale", "scales")

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        outputs_per_scale: int,
        inputs_per_scale: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        """codes [N, K] float8_e4m3fn or int8; scales float32, [N] of rows, else
        [ceil(N / outputs_per_scale), ceil(K / inputs_per_scale)]; bias [N]."""
        self.codes, self.scales, self.bias = codes, scales, bias
        self.num_outputs, self.num_inputs = codes.shape
        self.outputs_per_scale, self.inputs_per_scale = outputs_per_scale, inputs_per_scale

    @property
    def weight_format(self) -> str:
        """fp8_row, int8_row; fp8_block of 128 x 128, and of other blocks fp8_block64x128 and the like."""
        block = self.outputs_per_scale, self.inputs_per_scale
        name = NAMES[self.codes.dtype]
        if block == (1, self.num_inputs):
            return f"{name}_row"
        return f"{name}_block" if block == COMMON_BLOCK else f"{name}_block{block[0]}x{block[1]}"

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.bias) if part is not None)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: computed in float32, rounded once."""
        grid = self.scales.view(-1, -(-self.num_inputs // self.inputs_per_scale))
        scales = grid.repeat_interleave(self.outputs_per_scale, 0)[: self.num_outputs]
        scales = scales.repeat_interleave(self.inputs_per_scale, 1)[:, : self.num_inputs]
        return (self.codes.to(torch.float32) * scales).to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]"""
        return F.linear(x, self.dequantised(x.dtype), self.bias)

    def pack(self, keep_weight: bool = False) -> None:
        """Nothing: a CPU's weights are dense."""
