"""From logits to tokens: which rows need what, and the order in which it happens.

The order is vLLM's: log probabilities are taken from the raw logits; then min_tokens and logit_bias, then penalties,
then either the argmax (temperature 0) or temperature, min_p, top_k, top_p and a draw by Gumbel-max. A draw depends on
the row's logits, its seed and its position alone, so the batch around it does not matter, and a replay draws the same
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from baton import kernels
from baton.models.batch import Draw, Drawn
from baton.node.messages.control import Logprob, SamplingParams

GREEDY_BELOW = 1e-5  # temperatures under this are 0, as in vLLM: dividing by them would only overflow


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> list[Drawn]:
    """One token a row; float32 logits [len(draws), vocab], which may be overwritten; positions of the new tokens."""
    logprob_rows = [row for row, draw in enumerate(draws) if draw.sampling.logprobs]
    raw = logits[logprob_rows].log_softmax(-1) if logprob_rows else None
    edited = [row for row, draw in enumerate(draws) if _is_edited(draw)]
    if edited:
        logits[edited] = _edit(logits[edited], [draws[row] for row in edited])
    token_ids = logits.argmax(-1)
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature >= GREEDY_BELOW]
    if random:
        chosen = _draw(logits[random], [draws[row].sampling for row in random], [positions[row] for row in random])
        token_ids[random] = chosen
    ids = token_ids.tolist()
    logprobs: dict[int, tuple[Logprob, ...]] = {}
    if raw is not None:
        logprobs = {
            row: (_logprob(raw[place], ids[row], draws[row].sampling.top_logprobs),)
            for place, row in enumerate(logprob_rows)
        }
    return [Drawn((token_id,), logprobs.get(row, ())) for row, token_id in enumerate(ids)]


def has_penalty(sampling: SamplingParams) -> bool:
    """Whether counts of tokens change the logits."""
    return bool(
        sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
    )


def _is_edited(draw: Draw) -> bool:
    sampling = draw.sampling
    return bool(sampling.logit_bias) or draw.num_generated < sampling.min_tokens or has_penalty(sampling)


def _edit(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The logits after logit_bias, min_tokens and penalties; changed in place."""
    vocab_size = logits.shape[-1]
    for row, draw in enumerate(draws):
        if draw.sampling.logit_bias:
            ids = torch.tensor(
                [token for token, _ in draw.sampling.logit_bias if token < vocab_size], dtype=torch.int64
            )
            values = torch.tensor([bias for token, bias in draw.sampling.logit_bias if token < vocab_size])
            logits[row].index_add_(0, ids, values)
        if draw.num_generated < draw.sampling.min_tokens:
            stops = [token for token in draw.sampling.stop_token_ids if token < vocab_size]
            logits[row, stops] = float("-inf")
    penalised = [row for row, draw in enumerate(draws) if has_penalty(draw.sampling)]
    if penalised:
        part = logits[penalised]
        _penalise(part, [draws[row] for row in penalised])
        logits[penalised] = part
    return logits


def _penalise(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    def counts(parts: Sequence[Sequence[int]]) -> torch.Tensor:
        found = [np.bincount(np.asarray(part, dtype=np.int64), minlength=logits.shape[-1]) for part in parts]
        return torch.from_numpy(np.stack(found))

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    kernels.apply_penalties(
        logits,
        counts([draw.history[: draw.prompt_len] for draw in draws]),
        counts([draw.history[draw.prompt_len :] for draw in draws]),
        column([draw.sampling.repetition_penalty for draw in draws]),
        column([draw.sampling.frequency_penalty for draw in draws]),
        column([draw.sampling.presence_penalty for draw in draws]),
    )


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """Tokens [rows] drawn from the filtered distributions; the logits are overwritten."""
    vocab_size = logits.shape[-1]
    logits.div_(torch.tensor([each.temperature for each in params])[:, None])
    _filter(logits, kernels.keep_min_p, {row: each.min_p for row, each in enumerate(params) if each.min_p > 0.0})
    _filter(
        logits, kernels.keep_top_k, {row: each.top_k for row, each in enumerate(params) if 0 < each.top_k < vocab_size}
    )
    _filter(logits, kernels.keep_top_p, {row: each.top_p for row, each in enumerate(params) if each.top_p < 1.0})
    seeds = torch.tensor([each.seed for each in params], dtype=torch.int64)
    return kernels.draw(logits, seeds, torch.tensor(positions, dtype=torch.int64))


def _filter(
    logits: torch.Tensor, keep: Callable[[torch.Tensor, torch.Tensor], None], values: Mapping[int, float]
) -> None:
    """Applies `keep` in place to the rows that have a value for it."""
    if not values:
        return
    rows = list(values)
    part = logits[rows]
    keep(part, torch.tensor([values[row] for row in rows])[:, None])
    logits[rows] = part


def _logprob(raw: torch.Tensor, token_id: int, num_top: int) -> Logprob:
    """raw: log probabilities [vocab] of the row."""
    top = raw.topk(min(num_top, raw.shape[-1]))
    return Logprob(float(raw[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
