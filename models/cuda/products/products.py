"""The products of one model, each by the kernels that read its weight's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from baton.kernels import DenseLinear, Linear
from baton.kernels.triton import int4_policy
from baton.kernels.triton.linear_policy import ProductShape
from baton.models.cuda.products.dense import DenseProducts
from baton.models.cuda.products.dequantised import DequantisedProducts
from baton.models.cuda.products.grouped import GroupedProducts
from baton.models.cuda.products.policy import Policy


class FormatProducts(Protocol):
    """Products with the weights of some formats, captured in graphs: nothing is allocated and nothing waits."""

    def __call__(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        """x W^T + b, [M, N]: `out`, or float32 parts of it [splits, M, N] which the reader sums; x is [M, K]."""
        ...

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        """The same into `out`, in one part."""
        ...

    def gated(self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        """out [M, inner] = silu(gate) * up, where x W^T + b is [gate, up]."""
        ...


class Products:
    """For up to max_rows rows; not for two steps at a time. A FormatProducts of every format."""

    def __init__(
        self, policy: Policy, max_rows: int, shapes: Sequence[ProductShape], dtype: torch.dtype, device: str
    ) -> None:
        """shapes: of all products that will be asked for."""
        as_dense = [shape._replace(weight_format=DenseLinear.weight_format) for shape in shapes]
        dense = DenseProducts(policy, max_rows, as_dense, dtype, device)
        others = [shape for shape in shapes if shape.weight_format != DenseLinear.weight_format]
        dequantised = DequantisedProducts(dense, others, dtype, device)
        self._by_format: dict[str, FormatProducts] = {shape.weight_format: dequantised for shape in others}
        of_4_bits = [shape for shape in others if int4_policy.block_of(shape) is not None]
        if dtype == torch.bfloat16 and of_4_bits:
            grouped = GroupedProducts(policy, dequantised, max_rows, of_4_bits, device)
            self._by_format |= {shape.weight_format: grouped for shape in of_4_bits}
        self._by_format[DenseLinear.weight_format] = dense

    def __call__(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        return self._by_format[weights.weight_format](weights, x, out, pdl=pdl)

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        self._by_format[weights.weight_format].whole(weights, x, out, pdl=pdl)

    def gated(self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        self._by_format[gate_up.weight_format].gated(gate_up, x, out, pdl=pdl)
