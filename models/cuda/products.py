"""Which kernel does each matrix product of a step: a tuned one where a table has one, else cuBLAS.

Holds the memory of what does not outlive the next kernel: the parts of split sums, and gate and up before they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from baton.kernels import Linear
from baton.kernels.triton import linear_policy
from baton.kernels.triton.activation import silu_and_mul
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import Shape, Tiles
from baton.node.errors import SettingsError

Policy = Callable[[int, Shape], Tiles | None]
GatedProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""product(x [M, K], [gate; up] [2 N, K], out [M, N])"""

TABLED_ROWS = (1, 16, 32, 64, 128, 256)
"""The tables end at the last; more rows are cuBLAS's or, gate and up, product_gluon's. In a deterministic run they are
cut into tiles of so many."""


def fastest(num_rows: int, shape: Shape) -> Tiles | None:
    """The policy of speed."""
    return linear_policy.fastest(num_rows, shape)


def invariant(num_rows: int, shape: Shape) -> Tiles:
    """The policy whose bits do not depend on num_rows: one number of splits for every number of rows, never cuBLAS.

    Shapes that were not measured get tiles that fit; nobody has tuned those.
    """
    return linear_policy.invariant(min(num_rows, TABLED_ROWS[-1]), shape) or untuned(num_rows, shape)


def untuned(num_rows: int, shape: Shape) -> Tiles:
    """Tiles for any shape: the largest that divide it, and one split. SettingsError if none does."""
    n, k, _ = shape
    tile_n = next((size for size in (64, 32, 16) if n % size == 0), 0)
    tile_k = next((size for size in (64, 32, 16) if k % size == 0), 0)
    if not tile_n or not tile_k:
        raise SettingsError(f"--deterministic: no tiles fit a product of {k} inputs and {n} outputs")
    tile_m = next((size for size in (16, 32, 64) if num_rows <= size), 128)
    return Tiles(tile_n, tile_k, tile_m, 3, 1, prefetch=0)


class Products:
    """The products of one model for up to max_rows rows; not for two steps at a time."""

    def __init__(self, policy: Policy, max_rows: int, shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> None:
        """shapes: of all products that will be asked for."""
        self._policy = policy
        rows = {size for size in (*TABLED_ROWS, max_rows) if size <= max_rows}
        found = [(policy(m, shape), m * shape[0]) for m in rows for shape in shapes]
        parts = max((tiles.splits * size for tiles, size in found if tiles and tiles.splits > 1), default=0)
        inner = max((n for n, _, fused in shapes if fused), default=0)
        self._parts = torch.empty(parts, dtype=torch.float32, device=device)
        self._wide = torch.empty(max_rows * 2 * inner, dtype=dtype, device=device)
        self._by_gluon = _gluon_product(dtype, device)

    def __call__(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        """x W^T + b, [M, N]: `out`, or float32 parts of it [splits, M, N] which the reader sums; x is [M, K]."""
        (m, k), n = x.shape, weights.weight.shape[0]
        tiles = self._policy(m, (n, k, False))
        if tiles is None:
            self._plain(weights, x, out)
            return out
        if tiles.splits > 1:
            out = self._parts[: tiles.splits * m * n].view(tiles.splits, m, n)
        linear(x, weights.weight, weights.bias, tiles, out, pdl=pdl)
        return out

    def whole(self, weights: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        """The same into `out`, in one part."""
        (m, k), n = x.shape, weights.weight.shape[0]
        tiles = self._policy(m, (n, k, False))
        if tiles is None:
            self._plain(weights, x, out)
        else:
            linear(x, weights.weight, weights.bias, replace(tiles, splits=1), out, pdl=pdl)

    def gated(self, gate_up: Linear, x: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
        """out [M, inner] = silu(gate) * up, where x W^T + b is [gate, up]."""
        (m, k), n = x.shape, gate_up.weight.shape[0] // 2
        tiles = None if gate_up.bias is not None else self._policy(m, (n, k, True))
        if tiles is not None:
            linear(x, gate_up.weight, None, tiles, out, fused=True, pdl=pdl)
            return
        if self._by_gluon and gate_up.bias is None and linear_policy.gated_by_gluon(m, (n, k, True)):
            self._by_gluon(x, gate_up.weight, out)
            return
        wide = self._wide[: m * 2 * n].view(m, 2 * n)
        self.whole(gate_up, x, wide, pdl=pdl)
        silu_and_mul(wide, out, pdl=pdl)

    def _plain(self, weights: Linear, x: torch.Tensor, out: torch.Tensor) -> None:
        if weights.bias is None:
            torch.mm(x, weights.weight.t(), out=out)
        else:
            torch.addmm(weights.bias, x, weights.weight.t(), out=out)


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
