"""Products with weights of 8 bits, FP8 and INT8: bytes by bytes, with rows in codes, where that is fastest.

Few rows are linear_8bit_gluon's or linear_8bit's, by the policy's tiles, many those of `scaled_many`; for what neither
multiplies weights are dequantised. Rows that neither a norm nor an activation put into codes are put into codes here.
All rows in codes share memory, since each is read by the next product alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from baton.kernels import Linear, ScaledLinear
from baton.kernels.triton import linear_8bit_policy
from baton.kernels.triton.activation import silu_and_mul
from baton.kernels.triton.linear_8bit import linear_8bit
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantise import RUN, CodedRows, quantise
from baton.models.cuda.products.dense import DenseProducts
from baton.models.cuda.products.dequantised import DequantisedProducts
from baton.models.cuda.products.policy import PADDING, TABLED_ROWS, Policy, invariant, shape_of
from baton.models.cuda.products.scaled_many import ScaledManyRows
from baton.node.errors import InvariantBroken

Product8Bit = Callable[..., None]
"""product(x in codes, weight, tiles, out, fused=, pdl=)"""


class ScaledProducts:
    """With weights of one format, for up to max_rows rows; not for two steps at a time."""

    def __init__(
        self,
        policy: Policy,
        max_rows: int,
        shapes: Sequence[ProductShape],
        dense: DenseProducts,
        dequantised: DequantisedProducts,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """shapes: of all products that will be asked for, of one format."""
        self._policy, self._dense, self._dequantised = policy, dense, dequantised
        weight_format = shapes[0].weight_format
        self._code_type = torch.int8 if weight_format == "int8_row" else torch.float8_e4m3fn
        self._run = RUN if weight_format == "fp8_block" else 0
        self._gluon = _gluon_product(device)
        self._gluon_rows = max_rows if policy is invariant else linear_8bit_policy.GLUON_ROWS[weight_format]
        self._many = ScaledManyRows(weight_format, policy is invariant, dtype, device)
        self._fused = {(shape.outputs, shape.inputs) for shape in shapes if shape.fused}
        rows = {size for size in (*TABLED_ROWS, max_rows) if size <= max_rows}
        found = [(policy(m, shape), m * shape.outputs) for m in rows for shape in shapes]
        parts = max((tiles.splits * size for tiles, size in found if tiles and tiles.splits > 1), default=0)
        widest = max(shape.inputs for shape in shapes)
        padded = -(-max_rows // PADDING) * PADDING
        self._parts = torch.empty(parts, dtype=torch.float32, device=device)
        # Zeros: padding is multiplied too, and must be finite.
        self._codes = torch.zeros(padded * widest, dtype=torch.int8, device=device).view(self._code_type)
        self._scales = torch.zeros(padded * (widest // RUN if self._run else 1), device=device)

    def codes_for(self, reader: Linear, num_rows: int) -> CodedRows | None:
        """Where the rows belong that `reader` multiplies next; None: it wants them plain."""
        if self._tiles(reader, num_rows) is None and not self._many.fits(reader.num_outputs, reader.num_inputs):
            return None
        k = reader.num_inputs
        codes = self._codes[: num_rows * k].view(num_rows, k)
        if not self._run:
            return CodedRows(codes, self._scales[:num_rows])
        padded = -(-num_rows // PADDING) * PADDING
        return CodedRows(codes, self._scales[: padded * (k // self._run)].view(-1, padded))

    def __call__(self, weights: Linear, x: torch.Tensor | CodedRows, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        m, shape = len(out), shape_of(weights)
        tiles = self._policy(m, shape)
        if tiles is not None and tiles.splits > 1:
            out = self._parts[: tiles.splits * m * shape.outputs].view(tiles.splits, m, shape.outputs)
        self._multiply(weights, x, tiles, out, pdl)
        return out

    def whole(self, weights: Linear, x: torch.Tensor | CodedRows, out: torch.Tensor, *, pdl: bool) -> None:
        tiles = self._policy(len(out), shape_of(weights))
        self._multiply(weights, x, None if tiles is None else replace(tiles, splits=1), out, pdl)

    def gated(
        self,
        gate_up: Linear,
        x: torch.Tensor | CodedRows,
        out: torch.Tensor,
        reader: Linear | None = None,
        *,
        pdl: bool,
    ) -> torch.Tensor | CodedRows:
        """silu(gate) * up as `reader` wants it: in codes, or in `out`."""
        m, shape = len(out), shape_of(gate_up, fused=True)
        tiles = self._policy(m, shape) if gate_up.bias is None else None
        if tiles is not None:
            self._multiply(gate_up, x, tiles, out, pdl, fused=True)
            return out
        if isinstance(x, CodedRows) and self._many.gated(_scaled(gate_up), x, out):
            return out
        wide = self._dense.wide(m, 2 * shape.outputs)
        self.whole(gate_up, x, wide, pdl=pdl)
        codes = None
        if reader is not None and reader.weight_format == gate_up.weight_format:
            codes = self.codes_for(reader, m)
        gated = out if codes is None else codes
        silu_and_mul(wide, gated, pdl=pdl)
        return gated

    def _tiles(self, weights: Linear, num_rows: int) -> Tiles | None:
        """Of the product that is done, be it of gate and up together."""
        fused = (weights.num_outputs // 2, weights.num_inputs) in self._fused and weights.bias is None
        tiles = self._policy(num_rows, shape_of(weights, fused=True)) if fused else None
        return tiles or self._policy(num_rows, shape_of(weights))

    def _multiply(
        self,
        weights: Linear,
        x: torch.Tensor | CodedRows,
        tiles: Tiles | None,
        out: torch.Tensor,
        pdl: bool,
        fused: bool = False,
    ) -> None:
        if isinstance(x, torch.Tensor) and (codes := self.codes_for(weights, len(x))) is not None:
            quantise(x, codes, pdl=pdl)
            x = codes
        if tiles is not None and isinstance(x, CodedRows):
            fits = linear_8bit_policy.by_gluon(len(x.codes), tiles, fused, self._gluon_rows)
            product = self._gluon if self._gluon and fits else _portable_product
            product(x, _scaled(weights), tiles, out, fused=fused, pdl=pdl)
        elif isinstance(x, CodedRows):
            self._many(_scaled(weights), x, out)
        else:
            self._dequantised.whole(weights, x, out, pdl=pdl)


def _scaled(weights: Linear) -> ScaledLinear:
    """As the kernels here read it."""
    if not isinstance(weights, ScaledLinear):
        raise InvariantBroken(f"{weights.weight_format} is no format of 8 bits")
    return weights


def _portable_product(
    x: CodedRows, weight: ScaledLinear, tiles: Tiles, out: torch.Tensor, *, fused: bool, pdl: bool
) -> None:
    tiles = linear_8bit_policy.portable(len(x.codes), tiles, fused, weight.num_inputs)
    linear_8bit(x, weight.codes, weight.scales, weight.bias, tiles, out, fused=fused, pdl=pdl)


def _gluon_product(device: str) -> Product8Bit | None:
    """linear_8bit_gluon, where it runs."""
    if not device.startswith("cuda"):
        return None
    # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
    from baton.kernels.triton import linear_8bit_gluon, prefill_gluon

    if not prefill_gluon.is_available(torch.cuda.get_device_capability(device)):
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def product(x: CodedRows, weight: ScaledLinear, tiles: Tiles, out: torch.Tensor, *, fused: bool, pdl: bool) -> None:
        linear_8bit_gluon.linear_8bit_gluon(
            x, weight.codes, weight.scales, weight.bias, tiles, num_sms, out, fused=fused, pdl=pdl
        )

    return product
