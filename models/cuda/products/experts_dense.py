"""Products of experts with plain weights: those of few rows, of one token, and on Hopper those of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from baton.kernels import DenseLinear, ExpertLinears
from baton.kernels.triton import experts_policy
from baton.kernels.triton.expert_pairs import ExpertPairs, MadePairs, add_experts
from baton.kernels.triton.experts import experts
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.route import Routes
from baton.kernels.triton.spread import spread
from baton.models.cuda.products.experts_sizes import ExpertsSizes
from baton.node.errors import InvariantBroken, SettingsError

PromptProduct = Callable[[torch.Tensor, torch.Tensor, Routes, torch.Tensor, bool], None]
"""product(x [P, K], weight [E, N, K], routes, out [P, N], gated)"""

NARROW = 1
"""Tiles for which products are narrow: those whose bits were compared."""


class DenseExperts:
    """For up to max_tokens tokens; not for two steps at a time."""

    def __init__(
        self,
        sizes: ExpertsSizes,
        max_tokens: int,
        deterministic: bool,
        dtype: torch.dtype,
        device: str,
        pair_width: int = 0,
    ) -> None:
        """deterministic: a token's bits do not depend on how many there are. pair_width: numbers of a choice between
        both halves of what adapters add; 0: they add nothing."""
        self._sizes, self._deterministic = sizes, deterministic
        shapes = ProductShape(sizes.width, sizes.hidden, fused=True), ProductShape(sizes.hidden, sizes.width)
        self._shapes, self._element_bytes = shapes, dtype.itemsize
        self._tiles_of_rows(experts_policy.ROW_TILES[0], NARROW)
        one = tuple(tiles for tiles in map(experts_policy.row_tiles, shapes) if tiles is not None)
        self._of_one_token = one if len(one) == len(shapes) and not deterministic else None
        self._by_gluon = None if deterministic else _gluon_product(sizes, dtype, device)
        self.room = room = sizes.room(max_tokens, self.tile_rows, partial(self.tile_rows, adapted=pair_width > 0))
        self._rows = torch.empty(room.rows, sizes.hidden, dtype=dtype, device=device)
        self._gated = torch.empty(room.rows, sizes.width, dtype=dtype, device=device)
        self._added = torch.empty(room.rows if pair_width else 0, 2 * sizes.width, dtype=dtype, device=device)
        self._hidden = torch.empty(max_tokens * sizes.routing.top_k * pair_width, dtype=torch.float32, device=device)

    def tile_rows(self, num_tokens: int, *, adapted: bool = False) -> int:
        """As ExpertProducts says. experts_gluon adds nothing."""
        if num_tokens == 1 and self._of_one_token is not None:
            return 1
        sizes = num_tokens, self._sizes.routing.num_experts, self._sizes.routing.top_k
        if self._by_gluon is not None and not adapted and experts_policy.as_prompts(*sizes):
            return experts_policy.PROMPT_ROWS
        return experts_policy.tile_rows(*sizes)

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
        """As ExpertProducts says."""
        count = routes.most_tiles * routes.tile_m
        rows, gated = self._rows[:count], self._gated[:count]
        first, second = _weight(gate_up), _weight(down)
        if pairs is None and routes.tile_m == experts_policy.PROMPT_ROWS and self._by_gluon is not None:
            spread(x, routes, rows)
            self._by_gluon(rows, first, routes, gated, True)
            self._by_gluon(gated, second, routes, rows, False)  # in the place of x, which is no longer needed
            return rows
        wide, narrow = self._tiles(routes)
        bias, clamped, added = gate_up.stacked.bias, self._sizes.clamped, None
        if pairs is not None:
            added = MadePairs(self._added[:count], pairs[0].adapters)
            add_experts(x, pairs[0], routes, self._hidden, added.values, gathered=True, add=False, pdl=pdl)
        experts(
            x, first, routes, wide, gated, bias=bias, clamped=clamped, fused=True, gathered=True, added=added, pdl=pdl
        )
        experts(gated, second, routes, narrow, rows, bias=down.stacked.bias, pdl=pdl)
        if pairs is not None:
            add_experts(gated, pairs[1], routes, self._hidden, rows, gathered=False, add=True, pdl=pdl)
        return rows

    def _tiles(self, routes: Routes) -> Sequence[Tiles]:
        """Of gate and up together, and of down."""
        if routes.tile_m == 1 and self._of_one_token is not None:
            return self._of_one_token
        return self._tiles_of_rows(routes.tile_m, NARROW if self._deterministic else routes.most_tiles)

    def _tiles_of_rows(self, tile_m: int, num_tiles: int) -> Sequence[Tiles]:
        found = [experts_policy.rows_tiles(shape, tile_m, num_tiles, self._element_bytes) for shape in self._shapes]
        tiles = [each for each in found if each is not None]
        if len(tiles) < len(found):
            raise SettingsError(
                f"no tiles fit experts of width {self._sizes.width} and hidden size {self._sizes.hidden}"
            )
        return tiles


def _weight(weights: ExpertLinears) -> torch.Tensor:
    """[E, N, K]"""
    if not isinstance(weights.stacked, DenseLinear):
        raise InvariantBroken(f"no kernel here reads experts of the format {weights.weight_format}")
    return weights.stacked.weight.view(weights.num_experts, weights.num_outputs, weights.num_inputs)


def _gluon_product(sizes: ExpertsSizes, dtype: torch.dtype, device: str) -> PromptProduct | None:
    """experts_gluon, where it runs. It adds no biases, which experts with a clamped gate have."""
    if sizes.clamped is not None:
        return None
    if not device.startswith("cuda") or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
    from baton.kernels.triton import experts_gluon, prefill_gluon

    narrowest = experts_gluon.STEP * experts_gluon.STAGES
    fits = all(size % experts_gluon.STEP == 0 and size >= narrowest for size in (sizes.hidden, sizes.width))
    if not fits or not prefill_gluon.is_available(torch.cuda.get_device_capability(device)):
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def product(x: torch.Tensor, weight: torch.Tensor, routes: Routes, out: torch.Tensor, gated: bool) -> None:
        experts_gluon.experts_product(x, weight, routes, num_sms, out, gated=gated)

    return product
