"""What the next step computes, which sequences are preempted, which are admitted. Pure: numbers in, a plan out.

Running sequences come most senior first. Each gets its next token. Sequences of which more is to be computed (local
prefill, recompute after preemption) share the room for chunks, the admitted ones after the running ones. When blocks
run out, the least senior gives all of its blocks back and is computed again later, so the most senior always advances.
Drafts get blocks that nothing else needs: no sequence is preempted, and none waits, for them.

The room is what a step holds beside one token a row. The first chunk may be as long as chunks get; others join it only
up to `full_step_tokens` in all. Many in one step are few long pauses of all answers, few are many short ones.
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
    num_drafting: int = 0
    """Drafts in flight: it may be so many tokens longer, and computed as far."""
    most_drafts: int = 0
    """Drafts that its next token may be followed by."""
    draft_reach: int = 0
    """Places behind them that are written while the next ones are proposed."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    full_step_tokens: int


class PlannedRow(NamedTuple):
    """Running item number `item` computes `length` tokens, and up to `num_drafts` drafts behind the last one."""

    item: int
    length: int
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    rows: tuple[PlannedRow, ...]
    preempted: tuple[int, ...]
    """Indices of running items that give their blocks back before the step."""
    admitted: tuple[int, ...]
    """The first waiting items start running, and compute so many tokens at once, which may be none. There are blocks
    for all their tokens."""


def plan(
    running: Sequence[Item], waiting: Sequence[Item], free_blocks: int, limits: DecodeLimits, reserved_rows: int = 0
) -> StepPlan:
    """`reserved_rows` are kept for sequences whose KV is on its way.

    `free_blocks` counts those that can be allocated now. Item.num_blocks are taken to be freed by preemption; where
    some are shared fewer come free, the row is left out of this step, and the next plan preempts further."""
    alive = len(running)
    preempted: list[int] = []
    rows: list[PlannedRow] = []
    room = _ChunkRoom(limits, alive)
    index = 0
    while index < alive:
        item = running[index]
        length = room.length_for(item)
        lacking = _lacking(item, item.num_computed + item.num_drafting + length, limits)
        while lacking > free_blocks and alive > index:
            alive -= 1
            preempted.append(alive)
            free_blocks += running[alive].num_blocks
        if alive == index:
            break  # it was preempted itself
        if length > 0:
            rows.append(PlannedRow(index, length))
            free_blocks -= lacking
        if length > 1:
            room.take(length)
        index += 1
    free_rows = 0 if preempted else limits.max_num_seqs - alive - reserved_rows
    num_admitted, free_blocks = _admit(waiting, free_blocks, free_rows, limits)
    admitted = [room.take_for(item) for item in waiting[:num_admitted]]
    if any(item.most_drafts for item in running):
        spare_blocks = 0 if preempted or num_admitted < min(len(waiting), free_rows) else free_blocks - alive
        rows = _with_drafts(rows, running, spare_blocks, limits)
    return StepPlan(tuple(rows), tuple(preempted), tuple(admitted))


def _with_drafts(
    rows: Sequence[PlannedRow], running: Sequence[Item], spare_blocks: int, limits: DecodeLimits
) -> list[PlannedRow]:
    """The rows with their drafts, as far as a step has room for tokens. `spare_blocks` may be allocated for drafts."""
    room, size = limits.max_num_batched_tokens - sum(row.length for row in rows), limits.block_tokens
    planned = []
    for row in rows:
        index, length, _ = row
        item = running[index]
        drafts = min(item.most_drafts, room)
        if length == 1 and drafts > 0:
            end = item.num_computed + item.num_drafting + 1
            lacking = -(-(end + drafts + item.draft_reach) // size) - max(item.num_blocks, -(-end // size))
            if lacking <= 0 or lacking <= spare_blocks:
                spare_blocks -= max(0, lacking)
                room -= drafts
                row = PlannedRow(index, length, drafts)
        planned.append(row)
    return planned


class _ChunkRoom:
    """Tokens that a step may hold beside one of each of its `num_rows` rows."""

    def __init__(self, limits: DecodeLimits, num_rows: int) -> None:
        self._tokens = max(1, limits.max_num_batched_tokens - num_rows)
        self._others = min(self._tokens, limits.full_step_tokens)
        self._longest = limits.max_chunk_tokens

    def length_for(self, item: Item) -> int:
        """How much of its work a running item computes: its one token in any case, a chunk as far as there is room."""
        work = item.num_tokens - item.num_computed
        return work if work <= 1 else min(work, self._longest, self._tokens)

    def take(self, length: int) -> None:
        self._others -= length
        self._tokens = max(0, self._others)

    def take_for(self, item: Item) -> int:
        """How much of its work a new item computes."""
        length = min(self.length_for(item), self._tokens)
        self.take(length)
        return length


def _lacking(item: Item, num_tokens: int, limits: DecodeLimits) -> int:
    return max(0, -(-num_tokens // limits.block_tokens) - item.num_blocks)


def _admit(waiting: Sequence[Item], free_blocks: int, free_rows: int, limits: DecodeLimits) -> tuple[int, int]:
    """How many of them, and the blocks that are left. In order, without overtaking: an item that does not fit makes the
    others wait."""
    admitted = 0
    for item in waiting[: max(0, free_rows)]:
        lacking = _lacking(item, item.num_tokens + 1, limits)
        if lacking > free_blocks:
            break
        free_blocks -= lacking
        admitted += 1
    return admitted, free_blocks
