"""Products with quantised weights that no kernel reads: each weight becomes plain numbers before its product, in memory
that all share. For many rows that costs little beside the product; for few it is several times its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.kernels import DenseLinear, GroupedLinear, Linear, ScaledLinear
from baton.kernels.triton.dequantise import dequantise_groups, dequantise_scaled
from baton.kernels.triton.linear_policy import ProductShape
from baton.models.cuda.products.dense import DenseProducts
from baton.node.errors import InvariantBroken


class DequantisedProducts:
    """Not for two steps at a time."""

    def __init__(self, dense: DenseProducts, shapes: Sequence[ProductShape], dtype: torch.dtype, device: str) -> None:
        """shapes: of all products that will be asked for."""
        sizes = [shape.outputs * shape.inputs * (2 if shape.fused else 1) for shape in shapes]
        self._dense = dense
        self._weight = torch.empty(max(sizes, default=0), dtype=dtype, device=device)

    # The product is launched late: an early launch may read the weight before it is there.

    def __call__(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        return self._dense(self._dequantised(weights), x, out, pdl=False)

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        self._dense.whole(self._dequantised(weights), x, out, pdl=False)

    def gated(self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        self._dense.gated(self._dequantised(gate_up), x, out, pdl=False)

    def _dequantised(self, weights: Linear) -> DenseLinear:
        """Valid until the next one."""
        n, k = weights.num_outputs, weights.num_inputs
        out = self._weight[: n * k].view(n, k)
        match weights:
            case ScaledLinear():
                dequantise_scaled(
                    weights.codes, weights.scales, weights.outputs_per_scale, weights.inputs_per_scale, out
                )
            case GroupedLinear():
                dequantise_groups(weights.words, weights.scales, weights.zeros, weights.order, weights.block, out)
            case _:
                raise InvariantBroken(f"no kernel here reads a weight of the format {weights.weight_format}")
        return DenseLinear(out, weights.bias)
