"""The products of one model, each by the kernels that read its weight's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from baton.kernels import DenseLinear, Linear
from baton.kernels.triton import int4_policy
from baton.kernels.triton.activation import gelu_tanh_and_mul, silu_and_mul
from baton.kernels.triton.linear_8bit_policy import FORMATS
from baton.kernels.triton.linear_policy import ProductShape
from baton.kernels.triton.low_rank import AddedProduct
from baton.kernels.triton.quantise import CodedRows
from baton.kernels.triton.row_scales import add_in_place
from baton.models.cuda.products.dense import DenseProducts
from baton.models.cuda.products.dequantised import DequantisedProducts
from baton.models.cuda.products.grouped import GroupedProducts
from baton.models.cuda.products.policy import Policy
from baton.models.cuda.products.scaled import ScaledProducts
from baton.node.errors import InvariantBroken

Rows = torch.Tensor | CodedRows
"""[M, K]"""


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
        self._by_format[DenseLinear.weight_format] = self._dense = dense
        self._scaled = {
            each: ScaledProducts(policy, max_rows, of_format, dense, dequantised, dtype, device)
            for each in FORMATS
            if multiplies_bytes(device) and (of_format := [shape for shape in others if shape.weight_format == each])
        }

    def codes_for(self, reader: Linear, num_rows: int) -> CodedRows | None:
        """Where rows belong that `reader` multiplies next; None: it wants them plain."""
        products = self._scaled.get(reader.weight_format)
        return None if products is None else products.codes_for(reader, num_rows)

    def __call__(
        self, weights: Linear, x: Rows, out: torch.Tensor, added: AddedProduct | None = None, *, pdl: bool
    ) -> torch.Tensor:
        """As FormatProducts; x is what `codes_for` says, or plain. added: what adapters add."""
        if weights.weight_format == DenseLinear.weight_format:
            return self._dense(weights, plain(x), out, added, pdl=pdl)
        found = self._alone(weights, x, out, pdl)
        if added is not None:
            add_in_place(added, found, weights.bias, pdl=pdl)
        return found

    def _alone(self, weights: Linear, x: Rows, out: torch.Tensor, pdl: bool) -> torch.Tensor:
        if (products := self._scaled.get(weights.weight_format)) is not None:
            return products(weights, x, out, pdl=pdl)
        return self._by_format[weights.weight_format](weights, plain(x), out, pdl=pdl)

    def whole(self, weights: Linear, x: Rows, out: torch.Tensor, *, pdl: bool) -> None:
        """As FormatProducts; x is what `codes_for` says."""
        if (products := self._scaled.get(weights.weight_format)) is not None:
            products.whole(weights, x, out, pdl=pdl)
        else:
            self._by_format[weights.weight_format].whole(weights, plain(x), out, pdl=pdl)

    def gated(
        self,
        gate_up: Linear,
        x: Rows,
        out: torch.Tensor,
        reader: Linear | None = None,
        added: AddedProduct | None = None,
        *,
        pdl: bool,
    ) -> Rows:
        """silu(gate) * up as `reader` multiplies it next: `out`, or codes. Without a reader, and with what adapters
        add, always `out`."""
        if gate_up.weight_format == DenseLinear.weight_format:
            self._dense.gated(gate_up, plain(x), out, added, pdl=pdl)
            return out
        if added is not None:
            wide = self._dense.wide(len(out), gate_up.num_outputs)
            self.whole(gate_up, x, wide, pdl=pdl)
            add_in_place(added, wide, gate_up.bias, pdl=pdl)
            silu_and_mul(wide, out, pdl=pdl)
            return out
        if (products := self._scaled.get(gate_up.weight_format)) is not None:
            return products.gated(gate_up, x, out, reader, pdl=pdl)
        self._by_format[gate_up.weight_format].gated(gate_up, plain(x), out, pdl=pdl)
        return out

    def gelu_gated(
        self,
        gate_up: Linear,
        x: Rows,
        wide: torch.Tensor,
        out: torch.Tensor,
        reader: Linear,
        added: AddedProduct | None = None,
        *,
        pdl: bool,
    ) -> Rows:
        """gelu_tanh(gate) * up as `reader` multiplies it next: `out`, or codes; with what adapters add always `out`.
        wide: memory for gate and up."""
        codes = self.codes_for(reader, len(out)) if added is None else None
        dense = codes is None and gate_up.weight_format == DenseLinear.weight_format
        if dense and self._dense.gelu_gated(gate_up, plain(x), out, added, pdl=pdl):
            return out
        self.whole(gate_up, x, wide, pdl=pdl)
        if added is not None:
            add_in_place(added, wide, gate_up.bias, pdl=pdl)
        gated = out if codes is None else codes
        gelu_tanh_and_mul(wide, gated, pdl=pdl)
        return gated


def plain(x: Rows) -> torch.Tensor:
    """Rows that are not in codes."""
    if not isinstance(x, torch.Tensor):
        raise InvariantBroken("rows in codes were given to a product of plain ones")
    return x


def multiplies_bytes(device: str) -> bool:
    """Whether the kernels for bytes run: on Hopper and later, and in Triton's interpreter."""
    return not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (9, 0)
