"""A weight of 4-bit codes, with scales and perhaps zero points that groups of inputs share.

    W[n, order[k]] = (code[n, k] - zeros[n, k // inputs_per_scale]) * scales[n, k // inputs_per_scale]

Codes are 0 to 15, two a byte, of which the earlier is in the low bits. Without zero points each is 8. `order` sorts
inputs by group where groups are no runs of inputs (act-order): x[:, order] is what the codes multiply.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIDDLE = 8
"""The zero point of a weight that has none."""


class GroupedLinear:
    """Fill `codes`, `scales`, `zeros` and `bias`, then `finish`, then call."""

    __slots__ = ("bias", "codes", "inputs_per_scale", "num_inputs", "num_outputs", "order", "scales", "zeros")

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        inputs_per_scale: int,
        order: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """codes [N, K / 2] uint8, scales [N, G] floating point, zeros [N, G] uint8, order [K] int32, bias [N]; G groups
        of K / G inputs."""
        self.codes, self.scales, self.zeros, self.order, self.bias = codes, scales, zeros, order, bias
        self.num_outputs, self.num_inputs = codes.shape[0], 2 * codes.shape[1]
        self.inputs_per_scale = inputs_per_scale

    @property
    def weight_format(self) -> str:
        """int4_g128, int4_g128_zeros and the like. With an order or without."""
        return f"int4_g{self.inputs_per_scale}" + ("" if self.zeros is None else "_zeros")

    @property
    def size_bytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros, self.order, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def finish(self) -> None:
        """Once it is filled: zero points that say nothing are dropped, as symmetric files of some formats have them."""
        if self.zeros is not None and bool((self.zeros == MIDDLE).all()):
            self.zeros = None

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: computed in float32, rounded once."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), 2).flatten(1).to(torch.float32)
        zeros: torch.Tensor | int = MIDDLE if self.zeros is None else self._spread(self.zeros)
        weight = ((codes - zeros) * self._spread(self.scales)).to(dtype)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]"""
        return F.linear(x, self.dequantised(x.dtype), self.bias)

    def pack(self, keep_weight: bool = False) -> None:
        """Nothing: a CPU's weights are dense."""

    def _spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[N, G] -> [N, K]"""
        return of_groups.to(torch.float32).repeat_interleave(self.inputs_per_scale, 1)
