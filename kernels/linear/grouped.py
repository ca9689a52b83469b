"""A weight of 4-bit codes, with scales and perhaps zero points that groups of inputs share.

    W[n, order[k]] = (code[n, k] - zeros[k // inputs_per_scale, n]) * scales[k // inputs_per_scale, n]

Codes are 0 to 15; without zero points each is 8. `order` sorts inputs by group where groups are no runs of inputs
(act-order): x[:, order] is what the codes multiply.

A word of 16 bits holds four codes of a row, lowest bits first. They are a quarter of a block of inputs apart, not
neighbours: of a block that begins at input b, word c holds inputs b + c, b + c + block/4, b + c + block/2 and
b + c + 3 block/4. So a fixed place of neighbouring words is a run of neighbouring inputs, and two words in a register
become two operands of a matrix instruction by one shift and one mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIDDLE = 8
"""The zero point of a weight that has none."""
CODES_PER_WORD = 4
BLOCKS = 256, 128, 64, 32
PART_BYTES = 64 << 20
"""Of the int32 numbers that packing makes at a time."""


def block_size(num_inputs: int, inputs_per_scale: int) -> int | None:
    """Inputs of a block: the most that divide K and are a part of a group, or two or four groups. None: none are."""
    few_groups = inputs_per_scale * 2, inputs_per_scale * 4
    fitting = (size for size in BLOCKS if inputs_per_scale % size == 0 or size in few_groups)
    return next((size for size in fitting if num_inputs % size == 0), None)


def pack_codes(codes: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """Fills out [N, K / 4] int16; codes [N, K] uint8, 0 to 15."""
    num_outputs, num_inputs = codes.shape
    step = max(1, PART_BYTES // (4 * num_inputs))
    for first in range(0, num_outputs, step):
        part = codes[first : first + step]
        places = part.reshape(len(part), num_inputs // block, CODES_PER_WORD, block // CODES_PER_WORD).to(torch.int32)
        words = places[:, :, 0] | places[:, :, 1] << 4 | places[:, :, 2] << 8 | places[:, :, 3] << 12
        out[first : first + step] = words.to(torch.int16).view(len(part), -1)  # the upper half is cut off


def unpack_codes(words: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K / 4] int16 -> [N, K] uint8"""
    blocks = words.view(len(words), -1, 1, block // CODES_PER_WORD).to(torch.int32)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)[:, None]
    return (blocks >> shifts & 15).to(torch.uint8).view(len(words), -1)


class GroupedLinear:
    """Fill `words`, `scales`, `zeros` and `bias`, then `finish`, then call."""

    ORDERED = "_ordered"
    """Ends the name of a format with an order."""

    __slots__ = (
        "bias",
        "block",
        "inputs_per_scale",
        "num_inputs",
        "num_outputs",
        "order",
        "scales",
        "words",
        "zeros",
    )

    def __init__(
        self,
        words: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        block: int,
        order: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """words [N, K / 4] int16, scales [G, N] floating point, zeros [G, N] int8, order [K] int32, bias [N]; G groups
        of K / G inputs."""
        self.words, self.scales, self.zeros, self.block = words, scales, zeros, block
        self.order, self.bias = order, bias
        self.num_outputs, self.num_inputs = words.shape[0], CODES_PER_WORD * words.shape[1]
        self.inputs_per_scale = self.num_inputs // scales.shape[0]

    @property
    def weight_format(self) -> str:
        """int4_g128, int4_g128_zeros, int4_g32_ordered and the like."""
        zeros, order = "" if self.zeros is None else "_zeros", "" if self.order is None else self.ORDERED
        return f"int4_g{self.inputs_per_scale}{zeros}{order}"

    def without_order(self) -> GroupedLinear:
        """The same product, of x[:, order]."""
        return GroupedLinear(self.words, self.scales, self.zeros, self.block, None, self.bias)

    @property
    def size_bytes(self) -> int:
        parts = (self.words, self.scales, self.zeros, self.order, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def finish(self) -> None:
        """Once it is filled: zero points that say nothing are dropped, as symmetric files of some formats have them."""
        if self.zeros is not None and bool((self.zeros == MIDDLE).all()):
            self.zeros = None

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: computed in float32, rounded once."""
        codes = unpack_codes(self.words, self.block).to(torch.float32)
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
        """[G, N] -> [N, K]"""
        return of_groups.t().to(torch.float32).repeat_interleave(self.inputs_per_scale, 1)
