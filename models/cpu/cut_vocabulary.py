"""Draws over a vocabulary that the ranks of a group share.

Greedy and plainly random rows are drawn by all: each rank finds the best of its own tokens, logit and noise together,
and 8 bytes a row and rank are exchanged. Noise is a function of seed, position and token, so the best of the best is
the token that one rank would draw. Rows with more (filters, penalties, masks, log probabilities) need all their logits
at one rank, which are gathered for these rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from baton import kernels
from baton.models.batch import Draw
from baton.models.cpu.peers import RankPeers
from baton.models.partition import Rank
from baton.models.sampling_rules import rules_of


class PlainDraw(NamedTuple):
    """A draw by the logits alone: greedy with temperature 0."""

    temperature: float
    seed: int


def plain_draw(draw: Draw, vocab_size: int) -> PlainDraw | None:
    """None: the draw needs more than logits, temperature and noise."""
    rules = rules_of(draw.sampling, vocab_size)
    if rules.needs_more_than_temperature or rules.num_top is not None:
        return None
    return PlainDraw(rules.temperature, rules.seed)


class CutVocabulary:
    """One rank's part of the draws of its group. All ranks make the same calls."""

    def __init__(self, peers: RankPeers, vocab_size: int) -> None:
        self._peers, self._vocab_size = peers, vocab_size
        count = peers.rank.count
        self._shares = [Rank(index, count).vocabulary(vocab_size) for index in range(count)]

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """All logits of some rows, float32 [n, vocab], of this rank's share of them."""
        if not len(logits):
            return logits.new_empty(0, self._vocab_size)
        return self._peers.gather(logits, [len(share) for share in self._shares])

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Mapping[int, int]:
        """The tokens of plain draws, by row; logits: this rank's share of all rows. A rank that is alone draws none."""
        if len(self._shares) == 1:
            return {}
        found = {row: plain_draw(draw, self._vocab_size) for row, draw in enumerate(draws)}
        plain = {row: draw for row, draw in found.items() if draw is not None}
        if not plain:
            return {}
        rows = list(plain)
        first = self._shares[self._peers.rank.index].start
        best = _best(logits[rows], list(plain.values()), [positions[row] for row in rows], first)
        bests = self._peers.gather(best, [2] * len(self._shares)).view(len(rows), -1, 2)
        # numpy's argmax takes the first of equals, and so the lowest token, as one rank does
        winners = torch.from_numpy(bests[..., 0].numpy().argmax(-1))
        tokens = bests[..., 1].gather(1, winners[:, None]).squeeze(1)
        return dict(zip(rows, tokens.to(torch.int64).tolist(), strict=True))


def _best(logits: torch.Tensor, draws: Sequence[PlainDraw], positions: Sequence[int], first_token: int) -> torch.Tensor:
    """float32 [rows, 2]: of each row the best logit with its noise, and its token, which is below 2**24."""
    random = [row for row, draw in enumerate(draws) if draw.temperature > 0.0]
    if random:
        logits[random] = kernels.with_noise(
            logits[random] / torch.tensor([draws[row].temperature for row in random])[:, None],
            torch.tensor([draws[row].seed for row in random], dtype=torch.int64),
            torch.tensor([positions[row] for row in random], dtype=torch.int64),
            first_token,
        )
    tokens = logits.argmax(-1, keepdim=True)
    return torch.cat((logits.gather(-1, tokens), (tokens + first_token).to(torch.float32)), -1)
