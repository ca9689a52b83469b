"""Which chunks the next step computes. Pure: values in, a plan out; no clock, no torch, no socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt as the scheduler sees it; `age_s` since it arrived."""

    num_tokens: int
    num_computed: int
    priority: int
    age_s: float


class Chunk(NamedTuple):
    """The next `length` tokens of prompt number `prompt`."""

    prompt: int
    length: int


AGING_TOKENS_PER_S = 2000.0
"""With "sjf", a prompt counts as shorter by so many tokens for each second that it has waited, so none starves."""


def service_order(prompts: Sequence[QueuedPrompt], policy: str) -> list[int]:
    """Indices of `prompts` (in order of arrival) in order of service: "fcfs", or "sjf" (shortest first, aging)."""
    if policy == "fcfs":
        return sorted(range(len(prompts)), key=lambda i: (-prompts[i].priority, i))
    assert policy == "sjf", policy
    return sorted(
        range(len(prompts)),
        key=lambda i: (
            -prompts[i].priority,
            prompts[i].num_tokens - prompts[i].num_computed - AGING_TOKENS_PER_S * prompts[i].age_s,
            i,
        ),
    )


def plan(
    prompts: Sequence[QueuedPrompt], order: Sequence[int], budget_tokens: int, max_chunk_tokens: int, full_tokens: int
) -> list[Chunk]:
    """Chunks of the prompts in the given order, at most one of each. The first may fill the token budget; others join
    it up to `full_tokens` in all: these keep the device busy, and more only keep the first one waiting."""
    chunks: list[Chunk] = []
    room, planned = budget_tokens, 0
    for index in order:
        length = min(prompts[index].num_tokens - prompts[index].num_computed, room, max_chunk_tokens)
        if length > 0:
            chunks.append(Chunk(index, length))
            planned += length
            room = min(budget_tokens, full_tokens) - planned
    return chunks
