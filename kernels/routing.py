"""Which experts a token goes to, and how much each counts: the rules of a router, and their plain implementation.

It is what the CPU runs and the reference of every kernel. Logits, scores and weights are float32, whatever the model's
dtype. Knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """A token's scores s are the softmax, or the sigmoid, of its router's logits. It goes to the `top_k` experts of the
    highest s + correction, of equal ones to those of lower numbers; an expert counts by its s, times `scale`.

    With groups, experts are num_groups runs of equal length, and only those of the `kept_groups` best groups are
    chosen from: a group is as good as its best expert, or as the sum of its two best.
    """

    num_experts: int
    top_k: int
    sigmoid: bool = False
    """Scores are sigmoids; else a softmax over all experts."""
    renormalised: bool = True
    """The weights of a token are divided by their sum, before `scale`."""
    scale: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    groups_by_two: bool = False
    """A group counts by its two best experts."""


def route(logits: torch.Tensor, correction: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [N, top_k], the best first, and their weights float32 [N, top_k].

    logits: float32 [N, num_experts]; correction: float32 [num_experts], added to scores where experts are chosen.
    """
    scores = logits.sigmoid() if routing.sigmoid else logits.softmax(-1)
    choice = scores if correction is None else scores + correction
    if routing.kept_groups < routing.num_groups:
        choice = _keep_groups(choice, routing)
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, experts)
    if routing.renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights if routing.scale == 1.0 else weights * routing.scale


def _keep_groups(choice: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[N, num_experts] with -inf for experts of groups that are not kept."""
    groups = choice.unflatten(1, (routing.num_groups, -1))
    values = groups.topk(2, -1).values.sum(-1) if routing.groups_by_two else groups.amax(-1)
    kept = values.sort(dim=-1, descending=True, stable=True).indices[:, : routing.kept_groups]
    dropped = torch.ones_like(values, dtype=torch.bool).scatter_(1, kept, False)
    return groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)


def expected_experts(num_tokens: int, routing: Routing) -> float:
    """How many experts so many tokens choose between them, if each is chosen as often as another."""
    missed = 1 - routing.top_k / routing.num_experts
    return routing.num_experts * (1 - missed**num_tokens)
