"""Log probabilities of the tokens of prompts on the CPU, a few rows of logits at a time.

The logits of a whole prompt would be its length times the vocabulary: half a GB for 1,024 tokens of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton import kernels
from baton.models.cpu.step_batch import ScoredSpan
from baton.node.messages.control import PromptLogprob

SCORED_ROWS = 128
"""Rows of logits at a time."""


def score_prompts(
    hidden: torch.Tensor, head: Callable[[torch.Tensor, int], torch.Tensor], spans: Sequence[ScoredSpan]
) -> dict[int, tuple[PromptLogprob, ...]]:
    """The entries of each row; hidden [scored tokens, hidden] in the order of the spans, head: float32 logits of a part
    of it that belongs to the row of this number."""
    found: dict[int, tuple[PromptLogprob, ...]] = {}
    first = 0
    for span in spans:
        end = first + len(span.targets)
        entries: list[PromptLogprob] = []
        for part, targets in zip(hidden[first:end].split(SCORED_ROWS), span.targets.split(SCORED_ROWS), strict=True):
            entries += _entries(head(part, span.row), targets, span.num_top)
        found[span.row] = tuple(entries)
        first = end
    return found


def _entries(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> list[PromptLogprob]:
    values, ranks, top, top_ids = kernels.token_logprobs(logits, targets, num_top)
    return [
        PromptLogprob(value, rank, tuple(zip(ids, likeliest, strict=True)))
        for value, rank, likeliest, ids in zip(
            values.tolist(), ranks.tolist(), top.tolist(), top_ids.tolist(), strict=True
        )
    ]
