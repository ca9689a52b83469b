"""An MLP of experts on the CPU: the rows of each expert that some token goes to, multiplied together.

A token's result depends on its own row alone, and is summed in the order of its experts' numbers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.kernels.linear.experts import ExpertLinears

AddedToExpert = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""added_to(product, expert, tokens, x, y): y [n, outputs], the `gate_up` or `down` product of x [n, inputs] with an
expert that is held here, after something was added to it; the rows are those of `tokens`."""


def add_nothing(product: str, expert: int, tokens: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An AddedToExpert."""
    return y


def apply_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertLinears,
    down: ExpertLinears,
    activation: Callable[[torch.Tensor], torch.Tensor],
    first: int = 0,
    added_to: AddedToExpert = add_nothing,
) -> torch.Tensor:
    """[N, hidden]: for each token the sum over its experts e of  weight * down_e(activation(gate_up_e x)).

    x: [N, hidden]; experts, weights: [N, top_k] of each token. gate_up and down hold the experts from number `first`
    on; the others add nothing. added_to: what changes both products of each expert that has tokens.
    """
    top_k, held = experts.shape[1], gate_up.num_experts
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=first + held).tolist()
    begin = sum(counts[:first])
    order = order[begin : begin + sum(counts[first : first + held])]
    tokens = order // top_k
    parts = []
    for index, own in enumerate(tokens.split(counts[first : first + held])):
        if len(own):
            rows = x[own]
            active = activation(added_to("gate_up", index, own, rows, gate_up.expert(index)(rows)))
            parts.append(added_to("down", index, own, active, down.expert(index)(active)))
    added = torch.zeros(x.shape[0], down.num_outputs, dtype=torch.float32, device=x.device)
    if parts:
        added.index_add_(0, tokens, torch.cat(parts).float().mul_(weights.flatten()[order, None]))
    return added.to(x.dtype)
