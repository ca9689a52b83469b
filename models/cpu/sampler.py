"""From logits to tokens on the CPU: carries out models.sampling_rules row by row.

A draw depends on the row's logits, its seed and its position alone, so the batch around it does not matter, and a
replay draws the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from baton import kernels
from baton.models.batch import Draw, Drawn
from baton.models.sampling_rules import DrawRules, rules_of
from baton.node.messages.control import Logprob


def draw_tokens(
    logits: torch.Tensor, draws: Sequence[Draw], positions: Sequence[int], masks: Sequence[np.ndarray] = ()
) -> list[Drawn]:
    """One token a row; float32 logits [len(draws), vocab], which may be overwritten; positions of the new tokens;
    masks: of the masked draws, in order, as models.batch.Launched has them."""
    rules = [rules_of(draw.sampling, logits.shape[-1]) for draw in draws]
    num_tops = {row: each.num_top for row, each in enumerate(rules) if each.num_top is not None}
    raw = logits[list(num_tops)].log_softmax(-1) if num_tops else None
    masked = [row for row, draw in enumerate(draws) if draw.is_masked]
    for row, mask in zip(masked, masks, strict=True):
        kernels.keep_masked(logits[row], torch.from_numpy(mask))
    edited = [row for row, each in enumerate(rules) if each.edits_logits(draws[row].num_generated)]
    if edited:
        logits[edited] = _edit(logits[edited], [rules[row] for row in edited], [draws[row] for row in edited])
    token_ids = logits.argmax(-1)
    random = [row for row, each in enumerate(rules) if each.is_random]
    if random:
        chosen = _draw(logits[random], [rules[row] for row in random], [positions[row] for row in random])
        token_ids[random] = chosen
    ids = token_ids.tolist()
    logprobs: dict[int, tuple[Logprob, ...]] = {}
    if raw is not None:
        logprobs = {
            row: (_logprob(raw[place], ids[row], num_top),) for place, (row, num_top) in enumerate(num_tops.items())
        }
    return [Drawn((token_id,), logprobs.get(row, ())) for row, token_id in enumerate(ids)]


def _edit(logits: torch.Tensor, rules: Sequence[DrawRules], draws: Sequence[Draw]) -> torch.Tensor:
    """The logits after allowed tokens, logit_bias, bad words, min_tokens and penalties; changed in place."""
    for row, (each, draw) in enumerate(zip(rules, draws, strict=True)):
        if each.allowed:
            kernels.keep_tokens(logits[row], torch.tensor(each.allowed, dtype=torch.int64))
        if each.bias:
            ids = torch.tensor([token for token, _ in each.bias], dtype=torch.int64)
            logits[row].index_add_(0, ids, torch.tensor([value for _, value in each.bias]))
        if each.bad_words:
            logits[row, _ends_of_bad_words(each.bad_words, draw.history[draw.prompt_len :])] = float("-inf")
        if draw.num_generated < each.min_tokens:
            logits[row, list(each.forbidden)] = float("-inf")
    penalised = [row for row, each in enumerate(rules) if each.is_penalised]
    if penalised:
        part = logits[penalised]
        _penalise(part, [rules[row] for row in penalised], [draws[row] for row in penalised])
        logits[penalised] = part
    return logits


def _ends_of_bad_words(words: Sequence[Sequence[int]], generated: Sequence[int]) -> list[int]:
    """Tokens that would complete one of the words after these."""
    ends = []
    for *before, end in words:
        if len(before) <= len(generated) and list(generated[len(generated) - len(before) :]) == before:
            ends.append(end)
    return ends


def _penalise(logits: torch.Tensor, rules: Sequence[DrawRules], draws: Sequence[Draw]) -> None:
    def counts(parts: Sequence[Sequence[int]]) -> torch.Tensor:
        found = [np.bincount(np.asarray(part, dtype=np.int64), minlength=logits.shape[-1]) for part in parts]
        return torch.from_numpy(np.stack(found))

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    kernels.apply_penalties(
        logits,
        counts([draw.history[: draw.prompt_len] for draw in draws]),
        counts([draw.history[draw.prompt_len :] for draw in draws]),
        column([each.repetition_penalty for each in rules]),
        column([each.frequency_penalty for each in rules]),
        column([each.presence_penalty for each in rules]),
    )


def _draw(logits: torch.Tensor, rules: Sequence[DrawRules], positions: Sequence[int]) -> torch.Tensor:
    """Tokens [rows] drawn from the filtered distributions; the logits are overwritten."""
    logits.div_(torch.tensor([each.temperature for each in rules])[:, None])
    _filter(logits, kernels.keep_min_p, {row: each.min_p for row, each in enumerate(rules) if each.min_p > 0.0})
    _filter(logits, kernels.keep_top_k, {row: each.top_k for row, each in enumerate(rules) if each.top_k > 0})
    _filter(logits, kernels.keep_top_p, {row: each.top_p for row, each in enumerate(rules) if each.top_p < 1.0})
    seeds = torch.tensor([each.seed for each in rules], dtype=torch.int64)
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
