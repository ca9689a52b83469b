"""Attention of one whole prompt in plain float32: what an admission measures rounding with."""

from __future__ import annotations

import torch

from baton.models.fallback.attention import AttentionCall


class WholeAttention:
    """The Listener of a step that is one sequence from its first token on."""

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        group, length = query.shape[1] // key.shape[1], len(query)
        keys, values = (each.float().repeat_interleave(group, 1).transpose(0, 1) for each in (key, value))
        scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * call.scores.scale  # [H, N, N]
        if call.scores.softcap is not None:
            scores = call.scores.softcap * torch.tanh(scores / call.scores.softcap)
        place = torch.arange(length, device=query.device)
        behind = place[:, None] - place[None, :]
        seen = behind >= 0 if call.window is None else (behind >= 0) & (behind < call.window)
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
        return out.transpose(0, 1).to(value.dtype)
