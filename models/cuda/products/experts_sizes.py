"""The sizes of the blocks of experts of one model, and how much memory rows of experts need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from baton.kernels import ClampedGate, Routing
from baton.kernels.triton.route import most_tiles


class Room(NamedTuple):
    """For all numbers of tokens."""

    tiles: int
    rows: int
    """Of all tiles."""


class ExpertsSizes(NamedTuple):
    """All blocks of a model have these."""

    routing: Routing
    held: range
    """The experts that are computed here."""
    hidden: int
    width: int
    clamped: ClampedGate | None = None
    """The gate of the experts; None: silu."""

    def room(self, max_tokens: int, *tile_rows: Callable[[int], int]) -> Room:
        """tile_rows: of the tiles for so many tokens, in each way in which they may be multiplied."""
        largest = {of_tokens(tokens): tokens for of_tokens in tile_rows for tokens in range(1, max_tokens + 1)}
        found = [(most_tiles(tokens, self.routing, tile_m), tile_m) for tile_m, tokens in largest.items()]
        return Room(max(tiles for tiles, _ in found), max(tiles * tile_m for tiles, tile_m in found))
