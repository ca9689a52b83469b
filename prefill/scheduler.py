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
    num_cached: int = 0
    """Of the computed ones, those that a cache had."""


class Chunk(NamedTuple):
    """The next `length` tokens of prompt number `prompt`."""

    prompt: int
    length: int


class ServiceRules(NamedTuple):
    """The order of service, and how much of it is in a step."""

    policy: str
    """ "fcfs", "sjf" (the least work left first), or "due" (the least work in all first)."""
    max_chunk_tokens: int
    full_step_tokens: int
    aging_tokens_s: float = 2000.0
    """But for "fcfs", a prompt counts as shorter by so many tokens for each second that it has waited, so none starves.
    """


LONG_PROMPT_STEPS = 4
"""A prompt of more full steps is long: other tenants do not wait for all of it. Shorter ones are computed sooner whole.
"""
AGING_PART = 0.5
"""Of the device's speed, between tenants: a long prompt lets others pass for twice its own time, no longer."""
STEP_PART = 0.5
"""Of a full step, between tenants: a step costs 6 % more a token (docs/benchmarks/steps.md) and ends twice as soon."""


def between_tenants(rules: ServiceRules, tokens_s: float) -> ServiceRules:
    """The rules while a long prompt may meet those of other tenants: it is computed in short steps, and short prompts
    pass it. `tokens_s` is the device's speed, 0 where it is not known."""
    step_tokens = max(1, int(STEP_PART * rules.full_step_tokens))
    aging_tokens_s = max(rules.aging_tokens_s, AGING_PART * tokens_s)
    return ServiceRules("due", min(rules.max_chunk_tokens, step_tokens), step_tokens, aging_tokens_s)


def service_order(prompts: Sequence[QueuedPrompt], rules: ServiceRules) -> list[int]:
    """Indices of `prompts` (in order of arrival) in order of service."""
    if rules.policy == "fcfs":
        return sorted(range(len(prompts)), key=lambda i: (-prompts[i].priority, i))
    assert rules.policy in ("sjf", "due"), rules.policy

    def key(index: int) -> tuple[int, float, int]:
        prompt = prompts[index]
        done = prompt.num_computed if rules.policy == "sjf" else prompt.num_cached
        return -prompt.priority, prompt.num_tokens - done - rules.aging_tokens_s * prompt.age_s, index

    return sorted(range(len(prompts)), key=key)


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
