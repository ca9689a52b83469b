"""Log probabilities of prompts on a GPU: which tokens' logits are computed, some at a time, and where results lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from baton.models.batch import Row
from baton.models.cuda.launched import ScoredPart


class ScoredPiece(NamedTuple):
    """Tokens of a step whose logits are computed together."""

    tokens: tuple[int, int]
    """The first of the step's, and one past the last."""
    place: int
    """Of the first result."""
    num_top: int


def targets_of(rows: Sequence[Row]) -> np.ndarray:
    """int32 [T]: of all rows, in order."""
    return np.array([token for row in rows if row.targets is not None for token in row.targets.token_ids], np.int32)


def pieces_of(rows: Sequence[Row], most: int, vocab_size: int) -> list[ScoredPiece]:
    """The rows' targets, up to `most` a piece."""
    pieces: list[ScoredPiece] = []
    begin = place = 0
    for row in rows:
        if row.targets is not None:
            first, count = begin + row.targets.offset, len(row.targets.token_ids)
            num_top = min(row.targets.num_top, vocab_size)
            for done in range(0, count, most):
                tokens = first + done, first + min(done + most, count)
                pieces.append(ScoredPiece(tokens, place + done, num_top))
            place += count
        begin += row.num_new
    return pieces


def scored_parts(rows: Sequence[Row], chunks: Sequence[int]) -> tuple[ScoredPart, ...]:
    """Where the results of rows with targets are; `chunks`: numbers of the rows that are parts of prompts."""
    found: list[ScoredPart] = []
    for index in chunks:
        if (targets := rows[index].targets) is not None:
            first = found[-1].first + found[-1].size if found else 0
            found.append(ScoredPart(index, first, len(targets.token_ids), targets.num_top))
    return tuple(found)
