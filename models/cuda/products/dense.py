"""Products with plain weights: by a tuned kernel where a table has one, else by cuBLAS.

Holds the memory of what does not outlive the next kernel: the parts of split sums, and gate and up before they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from baton.kernels import DenseLinear, Linear
from baton.kernels.triton import linear_policy
from baton.kernels.triton.activation import silu_and_mul
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import ProductShape
from baton.kernels.triton.low_rank import AddedProduct
from baton.kernels.triton.row_scales import add_in_place
from baton.models.cuda.products.policy import PADDING, TABLED_ROWS, Policy, shape_of
from baton.node.errors import InvariantBroken

GatedProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""product(x [M, K], [gate; up] [2 N, K], out [M, N])"""


class DenseProducts:
    """For up to max_rows rows; not for two steps at a time."""

    def __init__(
        self, policy: Policy, max_rows: int, shapes: Sequence[ProductShape], dtype: torch.dtype, device: str
    ) -> None:
        """shapes: of all products that will be asked for, by the dense format."""
        self._policy = policy
        rows = {size for size in (*TABLED_ROWS, max_rows) if size <= max_rows}
        found = [(policy(m, shape), m * shape.outputs) for m in rows for shape in shapes]
        parts = max((tiles.splits * size for tiles, size in found if tiles and tiles.splits > 1), default=0)
        inner = max((shape.outputs for shape in shapes if shape.fused), default=0)
        self._parts = torch.empty(parts, dtype=torch.float32, device=device)
        self._wide = torch.empty((max_rows + PADDING) * 2 * inner, dtype=dtype, device=device)
        self._by_gluon = _gluon_product(dtype, device)

    def __call__(
        self, weights: Linear, x: torch.Tensor, out: torch.Tensor, added: AddedProduct | None = None, *, pdl: bool
    ) -> torch.Tensor:
        """x W^T + b, [M, N]: `out`, or float32 parts of it [splits, M, N] which the reader sums; x is [M, K]. added:
        what adapters add to it."""
        m, shape = x.shape[0], shape_of(weights)
        tiles = self._policy(m, shape)
        if tiles is None:
            self._plain(weights, x, out)
        else:
            if tiles.splits > 1:
                out = self._parts[: tiles.splits * m * shape.outputs].view(tiles.splits, m, shape.outputs)
            apart = added.apart(pdl=pdl) if added is not None and added.fits_apart else None
            linear(x, _dense(weights), weights.bias, tiles, out, added=apart, pdl=pdl)
            if apart is not None:
                return out
        if added is not None:
            add_in_place(added, out, weights.bias, pdl=pdl and tiles is not None)
        return out

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        """The same into `out`, in one part."""
        tiles = self._policy(x.shape[0], shape_of(weights))
        if tiles is None:
            self._plain(weights, x, out)
        else:
            linear(x, _dense(weights), weights.bias, replace(tiles, splits=1), out, pdl=pdl)

    def gelu_gated(
        self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, added: AddedProduct | None = None, *, pdl: bool
    ) -> bool:
        """out [M, inner] = gelu_tanh(gate) * up, where x W^T is [gate, up]; False where no table has the product."""
        tiles = None if gate_up.bias is not None else self._policy(x.shape[0], shape_of(gate_up, fused=True))
        if tiles is None or (added is not None and not added.fits_apart):
            return False
        apart = None if added is None else added.apart(pdl=pdl)
        linear(x, _dense(gate_up), None, tiles, out, fused=True, gelu=True, added=apart, pdl=pdl)
        return True

    def gated(
        self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, added: AddedProduct | None = None, *, pdl: bool
    ) -> None:
        """out [M, inner] = silu(gate) * up, where x W^T + b is [gate, up]."""
        m, shape = x.shape[0], shape_of(gate_up, fused=True)
        tiles = None if gate_up.bias is not None else self._policy(m, shape)
        if tiles is not None and (added is None or added.fits_apart):
            apart = None if added is None else added.apart(pdl=pdl)
            linear(x, _dense(gate_up), None, tiles, out, fused=True, added=apart, pdl=pdl)
            return
        if added is None and self._by_gluon and gate_up.bias is None and linear_policy.gated_by_gluon(m, shape):
            self._by_gluon(x, _dense(gate_up), out)
            return
        wide = self.wide(m, 2 * shape.outputs)
        self.whole(gate_up, x, wide, pdl=pdl)
        if added is not None:
            add_in_place(added, wide, gate_up.bias, pdl=pdl)
        silu_and_mul(wide, out, pdl=pdl)

    def wide(self, num_rows: int, width: int) -> torch.Tensor:
        """[num_rows, width] for gate and up, valid until the next asks; with memory for PADDING more rows behind it."""
        return self._wide[: num_rows * width].view(num_rows, width)

    def _plain(self, weights: Linear, x: torch.Tensor, out: torch.Tensor) -> None:
        if weights.bias is None:
            torch.mm(x, _dense(weights).t(), out=out)
        else:
            torch.addmm(weights.bias, x, _dense(weights).t(), out=out)


def _dense(weights: Linear) -> torch.Tensor:
    """[N, K], as the kernels here read it."""
    if not isinstance(weights, DenseLinear):
        raise InvariantBroken(f"no kernel here reads a weight of the format {weights.weight_format}")
    return weights.weight


def _gluon_product(dtype: torch.dtype, device: str) -> GatedProduct | None:
    """product_gluon, where it runs."""
    if not device.startswith("cuda") or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
    from baton.kernels.triton import prefill_gluon, product_gluon

    if not prefill_gluon.is_available(torch.cuda.get_device_capability(device)):
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return lambda x, weight, out: product_gluon.gated_product(x, weight, num_sms, out)
