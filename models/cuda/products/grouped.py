"""Products with weights of 4-bit codes: few rows by the kernels that read codes, many after dequantising.

Where inputs are sorted by group (act-order), x is brought into that order first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from baton.kernels import GroupedLinear, Linear
from baton.kernels.triton import int4_policy
from baton.kernels.triton.gather import gather_columns
from baton.kernels.triton.linear_int4 import linear_int4
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.models.cuda.products.dequantised import DequantisedProducts
from baton.models.cuda.products.policy import TABLED_ROWS, Policy, shape_of
from baton.node.errors import InvariantBroken

Int4Product = Callable[..., None]
"""product(x [M, K], weight, tiles, out, fused=, pdl=)"""


class GroupedProducts:
    """For up to max_rows rows of bfloat16; not for two steps at a time."""

    def __init__(
        self,
        policy: Policy,
        dequantised: DequantisedProducts,
        max_rows: int,
        shapes: Sequence[ProductShape],
        device: str,
    ) -> None:
        """shapes: of all products that will be asked for, of these formats."""
        self._policy, self._dequantised = policy, dequantised
        self._product = _gluon_product(device) or _portable_product
        rows = {size for size in (*TABLED_ROWS, max_rows) if size <= max_rows}
        found = [(policy(m, shape), m * shape.outputs) for m in rows for shape in shapes]
        parts = max((tiles.splits * size for tiles, size in found if tiles and tiles.splits > 1), default=0)
        ordered = max(
            (shape.inputs for shape in shapes if shape.weight_format.endswith(GroupedLinear.ORDERED)), default=0
        )
        self._parts = torch.empty(parts, dtype=torch.float32, device=device)
        self._ordered = torch.empty(max_rows * ordered, dtype=torch.bfloat16, device=device)

    def __call__(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        m, shape = x.shape[0], shape_of(weights)
        tiles = self._policy(m, shape)
        weights, x = self._in_order(weights, x, pdl)
        if tiles is None:
            return self._dequantised(weights, x, out, pdl=pdl)
        if tiles.splits > 1:
            out = self._parts[: tiles.splits * m * shape.outputs].view(tiles.splits, m, shape.outputs)
        self._product(x, weights, tiles, out, fused=False, pdl=pdl)
        return out

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        tiles = self._policy(x.shape[0], shape_of(weights))
        weights, x = self._in_order(weights, x, pdl)
        if tiles is None:
            self._dequantised.whole(weights, x, out, pdl=pdl)
        else:
            self._product(x, weights, replace(tiles, splits=1), out, fused=False, pdl=pdl)

    def gated(self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        tiles = None if gate_up.bias is not None else self._policy(x.shape[0], shape_of(gate_up, fused=True))
        gate_up, x = self._in_order(gate_up, x, pdl)
        if tiles is None:
            self._dequantised.gated(gate_up, x, out, pdl=pdl)
        else:
            self._product(x, gate_up, tiles, out, fused=True, pdl=pdl)

    def _in_order(self, weights: Linear, x: torch.Tensor, pdl: bool) -> tuple[GroupedLinear, torch.Tensor]:
        """The weight without its order, and x in it."""
        if not isinstance(weights, GroupedLinear):
            raise InvariantBroken(f"no kernel here reads a weight of the format {weights.weight_format}")
        if weights.order is None:
            return weights, x
        ordered = self._ordered[: x.numel()].view(x.shape)
        gather_columns(x, weights.order, ordered, pdl=pdl)
        return weights.without_order(), ordered


def _portable_product(
    x: torch.Tensor, weight: GroupedLinear, tiles: Tiles, out: torch.Tensor, *, fused: bool, pdl: bool
) -> None:
    linear_int4(x, weight, int4_policy.portable(tiles), out, fused=fused, pdl=pdl)


def _gluon_product(device: str) -> Int4Product | None:
    """linear_int4_gluon, where it runs."""
    if not device.startswith("cuda"):
        return None
    # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
    from baton.kernels.triton import linear_int4_gluon, prefill_gluon

    if not prefill_gluon.is_available(torch.cuda.get_device_capability(device)):
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def product(
        x: torch.Tensor, weight: GroupedLinear, tiles: Tiles, out: torch.Tensor, *, fused: bool, pdl: bool
    ) -> None:
        linear_int4_gluon.linear_int4_gluon(x, weight, tiles, num_sms, out, fused=fused, pdl=pdl)

    return product
