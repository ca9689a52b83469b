"""Which chunks the next step computes. Pure: values in, a plan out; no clock, no torch, no socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A job as the scheduler sees it; `age_s` since it arrived."""

    num_tokens: int
    num_computed: int
    priority: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of job number `index`."""

    index: int
    start: int
    length: int


AGING_TOKENS_PER_S = 2000.0
"""With "sjf", a job that has waited one second counts as so many tokens shorter: long prompts are not starved."""


def order(jobs: Sequence[QueuedPrompt], policy: str) -> list[int]:
    """Indices of `jobs` (given in order of arrival) in order of service: "fcfs", or "sjf" (shortest first, aging)."""
    if policy == "fcfs":
        return sorted(range(len(jobs)), key=lambda i: (-jobs[i].priority, i))
    assert policy == "sjf", policy
    return sorted(
        range(len(jobs)),
        key=lambda i: (
            -jobs[i].priority,
            jobs[i].num_tokens - jobs[i].num_computed - AGING_TOKENS_PER_S * jobs[i].age_s,
            i,
        ),
    )


def plan(
    jobs: Sequence[QueuedPrompt], sequence: Sequence[int], budget_tokens: int, max_chunk_tokens: int, full_tokens: int
) -> list[Chunk]:
    """Chunks of the jobs in the order of `sequence`, at most one of a job. The first may fill the token budget; others
    join it up to `full_tokens` in all: so many keep the device busy, and more only keep the first one waiting."""
    chunks: list[Chunk] = []
    room = budget_tokens
    for index in sequence:
        job = jobs[index]
        length = min(job.num_tokens - job.num_computed, room, max_chunk_tokens)
        if length > 0:
            chunks.append(Chunk(index, job.num_computed, length))
            room = min(budget_tokens, full_tokens) - sum(chunk.length for chunk in chunks)
    return chunks
