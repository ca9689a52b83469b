"""The same projection of several experts, as one matrix: expert e's N outputs are rows e * N to (e + 1) * N - 1.

Kernels read the whole matrix and find an expert by its first row. For the CPU each expert is a product of its own.
"""

from __future__ import annotations

from baton.kernels.linear.dense import DenseLinear
from baton.kernels.linear.protocol import Linear
from baton.kernels.linear.scaled import ScaledLinear

STACKED_FORMATS = frozenset({"fp8_row", "fp8_block", "int8_row"})
"""Besides plain numbers, what a matrix of experts may consist of, if inputs are a multiple of STACKED_MULTIPLE."""
STACKED_MULTIPLE = 128


class ExpertLinears:
    """Fill `stacked`, then `pack` once, then take `expert(e)` and call it."""

    __slots__ = ("_packed", "num_experts", "num_inputs", "num_outputs", "stacked")

    def __init__(self, stacked: DenseLinear | ScaledLinear, num_experts: int) -> None:
        """stacked: [E * N, K]"""
        self.stacked, self.num_experts = stacked, num_experts
        self.num_outputs, self.num_inputs = stacked.num_outputs // num_experts, stacked.num_inputs
        self._packed: tuple[Linear, ...] = ()

    @property
    def weight_format(self) -> str:
        return self.stacked.weight_format

    @property
    def size_bytes(self) -> int:
        """Of all experts."""
        return self.stacked.size_bytes + sum(each.size_bytes for each in self._packed)

    def expert(self, index: int) -> Linear:
        """One expert's product, over this memory."""
        return self._packed[index] if self._packed else self._view(index)

    def pack(self, keep_weight: bool = False) -> None:
        """Prepare for the CPU's products; unless it is kept, the stacked weight is gone afterwards."""
        if not isinstance(self.stacked, DenseLinear):
            return
        packed = tuple(self._view(index) for index in range(self.num_experts))
        for each in packed:
            each.pack(keep_weight)
        self._packed = packed
        if not keep_weight:
            self.stacked.weight = self.stacked.weight.new_empty(0)

    def _view(self, index: int) -> Linear:
        rows = slice(index * self.num_outputs, (index + 1) * self.num_outputs)
        of = self.stacked
        bias = None if of.bias is None else of.bias[rows]
        if isinstance(of, DenseLinear):
            return DenseLinear(of.weight[rows], bias)
        scales = of.scales[rows.start // of.outputs_per_scale : -(-rows.stop // of.outputs_per_scale)]
        return ScaledLinear(of.codes[rows], scales, of.outputs_per_scale, of.inputs_per_scale, bias)
