"""Products of experts with weights of 8 bits, FP8 and INT8: bytes by bytes, with rows in codes.

Tokens are put into codes once, with scales as the weight has them, of rows or of runs of 128 values; what gate and up
make always has scales of runs, which the product itself can tell. One token is multiplied as it
is.
"""

from __future__ import annotations

import torch

from baton.kernels import ExpertLinears, ScaledLinear
from baton.kernels.triton import experts_policy
from baton.kernels.triton.expert_pairs import ExpertPairs
from baton.kernels.triton.experts_8bit import experts_8bit
from baton.kernels.triton.experts_8bit_row import experts_8bit_row
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantise import RUN, CodedRows, quantise
from baton.kernels.triton.route import Routes
from baton.models.cuda.products.experts_sizes import ExpertsSizes
from baton.models.cuda.products.policy import PADDING
from baton.node.errors import InvariantBroken, SettingsError


class ScaledExperts:
    """With weights of one format, for up to max_tokens tokens; not for two steps at a time."""

    def __init__(
        self,
        sizes: ExpertsSizes,
        weight_format: str,
        max_tokens: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """weight_format: one of linear_8bit_policy.FORMATS."""
        self._sizes = sizes
        hidden, width = sizes.hidden, sizes.width
        self._shapes = ProductShape(width, hidden, fused=True), ProductShape(hidden, width)
        self._tiles(experts_policy.ROW_TILES[0], 1)
        code_type = torch.int8 if weight_format == "int8_row" else torch.float8_e4m3fn
        self._run = RUN if weight_format == "fp8_block" else 0
        self._of_one_token = [experts_policy.row_tiles_8bit(shape, self._run > 0) for shape in self._shapes]
        self.room = room = sizes.room(max_tokens, self.tile_rows)
        padded = -(-max_tokens // PADDING) * PADDING

        def codes(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=torch.int8, device=device).view(code_type)

        self._x_codes = codes(padded, hidden)
        self._x_scales = torch.zeros(padded * (hidden // RUN if self._run else 1), device=device)
        self._gated_codes = codes(room.rows, width)
        self._gated_scales = torch.zeros(room.rows * (width // RUN), device=device)
        self._rows = torch.empty(room.rows, hidden, dtype=dtype, device=device)
        self._gated = torch.empty(sizes.routing.top_k, width, dtype=dtype, device=device)

    def tile_rows(self, num_tokens: int, *, adapted: bool = False) -> int:
        """As ExpertProducts says."""
        if num_tokens == 1:
            return 1
        return experts_policy.tile_rows(num_tokens, self._sizes.routing.num_experts, self._sizes.routing.top_k)

    def __call__(
        self,
        gate_up: ExpertLinears,
        down: ExpertLinears,
        x: torch.Tensor,
        routes: Routes,
        pairs: tuple[ExpertPairs, ExpertPairs] | None = None,
        *,
        pdl: bool,
    ) -> torch.Tensor:
        """As ExpertProducts says, but without pairs."""
        if pairs is not None:
            raise InvariantBroken("adapters of experts in 8 bits")
        count, width = routes.most_tiles * routes.tile_m, self._sizes.width
        first, second = _scaled(gate_up), _scaled(down)
        of_gate_up = first.codes.view(gate_up.num_experts, gate_up.num_outputs, -1)
        of_down = second.codes.view(down.num_experts, down.num_outputs, -1)
        if routes.tile_m == 1:
            wide, narrow = self._of_one_token
            plain, rows = self._gated[:count], self._rows[:count]
            experts_8bit_row(x, of_gate_up, first.scales, routes, wide, plain, fused=True, gathered=True, pdl=pdl)
            experts_8bit_row(plain, of_down, second.scales, routes, narrow, rows, pdl=pdl)
            return rows
        wide, narrow = self._tiles(routes.tile_m, routes.most_tiles)
        coded = self._coded(x)
        quantise(x, coded, pdl=pdl)
        scales = self._gated_scales[: count * (width // RUN)].view(-1, count)
        gated, rows = CodedRows(self._gated_codes[:count], scales), self._rows[:count]
        experts_8bit(coded, of_gate_up, first.scales, routes, wide, gated, fused=True, gathered=True, pdl=pdl)
        experts_8bit(gated, of_down, second.scales, routes, narrow, rows, pdl=pdl)
        return rows

    def _tiles(self, tile_m: int, num_tiles: int) -> tuple[Tiles, Tiles]:
        """Of gate and up together, and of down."""
        gate_up, down = self._shapes
        wide = experts_policy.rows_tiles_8bit(gate_up, tile_m, num_tiles)
        narrow = experts_policy.rows_tiles_8bit(down, tile_m, num_tiles)
        if wide is None or narrow is None:
            raise SettingsError(
                f"experts of width {self._sizes.width} and hidden size {self._sizes.hidden}: in 8 bits the GPU takes "
                f"multiples of {experts_policy.BLOCK}; load them in the model's dtype"
            )
        return wide, narrow

    def _coded(self, x: torch.Tensor) -> CodedRows:
        """Where x belongs in codes."""
        num_rows, hidden = x.shape
        if not self._run:
            return CodedRows(self._x_codes[:num_rows], self._x_scales[:num_rows])
        padded = -(-num_rows // PADDING) * PADDING
        return CodedRows(self._x_codes[:num_rows], self._x_scales[: padded * (hidden // RUN)].view(-1, padded))


def _scaled(weights: ExpertLinears) -> ScaledLinear:
    if not isinstance(weights.stacked, ScaledLinear):
        raise InvariantBroken(f"{weights.weight_format} is no format of 8 bits")
    return weights.stacked
