"""What attention does with the products of queries and keys before the softmax. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Scores(NamedTuple):
    """score = softcap * tanh(scale * q k / softcap), or scale * q k."""

    scale: float
    softcap: float | None = None
    """None: scores are not bounded."""
