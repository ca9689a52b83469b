"""Log probabilities of prompts on a GPU: which tokens' logits are computed, some at a time, and where results lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from baton.kernels.triton.prompt_logprobs import PromptLogprobRows, prompt_logprobs
from baton.models.batch import Row
from baton.models.cuda.launched import ScoredPart
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.step_draws import WholeLogits

SCORED_ROWS = 128
"""Rows of logits at a time where a prompt's log probabilities are asked for."""


class PromptScorer:
    """Log probabilities of the targets of one step at a time."""

    def __init__(self, limits: StepLimits, vocab_size: int, device: str, whole: WholeLogits) -> None:
        self._vocab_size, self._whole = vocab_size, whole
        rows = min(SCORED_ROWS, limits.decode_tokens)  # their logits lie where those of rows that draw do
        self.found = PromptLogprobRows.make(limits.step_tokens, rows, vocab_size, device)

    def of(
        self, rows: Sequence[Row], targets: torch.Tensor
    ) -> tuple[list[tuple[int, int]], Callable[[torch.Tensor, int], None]]:
        """Parts of a step of these rows, and what makes `found` of the logits of each, by its number. targets: int32,
        of all rows."""
        pieces = pieces_of(rows, len(self.found.sums), self._vocab_size)

        def take(logits: torch.Tensor, number: int) -> None:
            piece = pieces[number]
            prompt_logprobs(self._whole(logits), targets, piece.place, piece.num_top, self.found)

        return [piece.tokens for piece in pieces], take


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
