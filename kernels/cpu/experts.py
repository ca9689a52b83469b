"""An MLP of experts on the CPU: the rows of each expert that some token goes to, multiplied together.

A token's result depends on its own row alone, and is summed in the order of its experts' numbers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.kernels.linear.experts import ExpertLinears


def apply_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertLinears,
    down: ExpertLinears,
    activation: Callable[[torch.Tensor], torch.Tensor],
    first: int = 0,
) -> torch.Tensor:
    """[N, hidden]: for each token the sum over its experts e of  weight * down_e(activation(gate_up_e x)).

    x: [N, hidden]; experts, weights: [N, top_k] of each token. gate_up and down hold the experts from number `first`
    on; the others add nothing.
    """
    top_k = experts.shape[1]
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    tokens = order // top_k
    counts = chosen.bincount(minlength=first + gate_up.num_experts).tolist()
    sorted_weights = weights.flatten()[order, None]
    added = torch.zeros(x.shape[0], down.num_outputs, dtype=torch.float32, device=x.device)
    begin = sum(counts[:first])
    for index, count in enumerate(counts[first : first + gate_up.num_experts]):
        if count:
            rows = tokens[begin : begin + count]
            y = down.expert(index)(activation(gate_up.expert(index)(x[rows])))
            added.index_add_(0, rows, y.float() * sorted_weights[begin : begin + count])
            begin += count
    return added.to(x.dtype)
