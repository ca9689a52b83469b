"""What the next step computes, which sequences are preempted, which are admitted. Pure: numbers in, a plan out.

Running sequences come most senior first. Each gets its next token; a sequence whose tokens are not all computed yet
(local prefill, recompute after preemption) gets a chunk from what the budget leaves. When blocks run out, the least
senior gives all of its blocks back and is computed again later, so the most senior always advances. No clock, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Item(NamedTuple):
    """A sequence as the scheduler sees it."""

    num_tokens: int
    num_computed: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int


class PlannedRow(NamedTuple):
    """Running item number `item` computes `length` tokens."""

    item: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    rows: tuple[PlannedRow, ...]
    preempted: tuple[int, ...]
    """Indices of running items that give their blocks back before the step."""
    admitted: int
    """The first `admitted` waiting items start running; there are blocks for all their tokens."""


def plan(
    running: Sequence[Item], waiting: Sequence[Item], free_blocks: int, limits: DecodeLimits, reserved_rows: int = 0
) -> StepPlan:
    """`reserved_rows` are kept for sequences whose KV is on its way.

    `free_blocks` counts those that can be allocated now. Item.num_blocks are taken to be freed by preemption; where
    some are shared fewer come free, the row is left out of this step, and the next plan preempts further."""
    alive = len(running)
    preempted: list[int] = []
    rows: list[PlannedRow] = []
    budget = max(0, limits.max_num_batched_tokens - alive)
    index = 0
    while index < alive:
        item = running[index]
        length = _length(item, budget, limits)
        lacking = _lacking(item, item.num_computed + length, limits)
        while lacking > free_blocks and alive > index:
            alive -= 1
            preempted.append(alive)
            free_blocks += running[alive].num_blocks
        if alive == index:
            break  # it was preempted itself
        if length > 0:
            rows.append(PlannedRow(index, length))
            free_blocks -= lacking
            budget -= length - 1
        index += 1
    admitted = 0 if preempted else _admit(waiting, free_blocks, limits.max_num_seqs - alive - reserved_rows, limits)
    return StepPlan(tuple(rows), tuple(preempted), admitted)


def _length(item: Item, budget: int, limits: DecodeLimits) -> int:
    """Every running item may compute one token; more than that comes out of the budget left for chunks."""
    work = item.num_tokens - item.num_computed
    return min(work, 1 + budget, limits.max_chunk_tokens)


def _lacking(item: Item, num_tokens: int, limits: DecodeLimits) -> int:
    return max(0, -(-num_tokens // limits.block_tokens) - item.num_blocks)


def _admit(waiting: Sequence[Item], free_blocks: int, free_rows: int, limits: DecodeLimits) -> int:
    """In order, without overtaking: an item that does not fit makes the others wait."""
    admitted = 0
    for item in waiting[: max(0, free_rows)]:
        lacking = _lacking(item, item.num_tokens + 1, limits)
        if lacking > free_blocks:
            break
        free_blocks -= lacking
        admitted += 1
    return admitted
