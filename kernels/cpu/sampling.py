"""Filtering and drawing for the CPU: the results of `reference`, without sorting or hashing what cannot be drawn.

Sorting a vocabulary costs more than the rest of a small model's step, and the likeliest few hundred tokens nearly
always hold all of the probability that a top_p asks for.
"""

from __future__ import annotations

import torch

from baton.kernels.philox import uniform, uniform_of
from baton.kernels.reference import NEGATIVE_INFINITY, gumbel_argmax, gumbel_noise, nucleus_floor

LIKELY = 256


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> None:
    """As reference.keep_top_k."""
    largest = logits.topk(int(top_k.max()), dim=-1).values
    logits.masked_fill_(logits < largest.gather(-1, top_k - 1), NEGATIVE_INFINITY)


def keep_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """As reference.keep_top_p."""
    total = logits.logsumexp(-1, keepdim=True)
    count = min(LIKELY, logits.shape[-1])
    likely = logits.topk(count, dim=-1).values
    floor = nucleus_floor(likely, total, top_p)
    # Where the last of the likely ones is still inside, the nucleus may go on behind it.
    unsure = (floor <= likely[:, -1:]).squeeze(-1).nonzero().squeeze(-1)
    if count < logits.shape[-1] and len(unsure):
        ordered = logits[unsure].sort(-1, descending=True).values
        floor[unsure] = nucleus_floor(ordered, total[unsure], top_p[unsure])
    logits.masked_fill_(logits < floor, NEGATIVE_INFINITY)


def draw(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gumbel-max draws [rows] from float32 logits [rows, V] with the numbers that `philox` defines.

    Where filters left few tokens, numbers are made for those only.
    """
    most = int((logits > NEGATIVE_INFINITY).sum(-1).max())
    if most * 4 > logits.shape[-1] or most == 0:
        return gumbel_argmax(logits, uniform(seeds, positions, logits.shape[-1]))
    token_ids = logits.topk(most, dim=-1).indices.sort(-1).values  # in order of id, so that a tie goes to the lowest
    chosen = gumbel_argmax(logits.gather(-1, token_ids), uniform_of(seeds, positions, token_ids))
    return token_ids.gather(-1, chosen[:, None]).squeeze(-1)


def with_noise(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, first_token: int) -> torch.Tensor:
    """Logits [rows, n] of the tokens from the first on, plus the noise that `draw` takes the argmax with."""
    return logits + gumbel_noise(uniform(seeds, positions, logits.shape[-1], first_token))
