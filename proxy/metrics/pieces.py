"""A long text made piece by piece, so that between two pieces the event loop does what else there is to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

PIECE_S = 0.001
"""The loop is held so long, and for the part that was begun last."""


async def join_in_pieces(parts: Iterable[bytes]) -> bytes:
    """All parts as one; each should take less than a few milliseconds to make."""
    made: list[bytes] = []
    until = time.perf_counter() + PIECE_S
    for part in parts:
        made.append(part)
        if time.perf_counter() >= until:
            await asyncio.sleep(0)
            until = time.perf_counter() + PIECE_S
    return b"".join(made)
