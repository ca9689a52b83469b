"""How decode attention shares out a step's sequences among programs. Pure arithmetic; `decode_work` carries it out.

A chunk of one sequence and one key head is one program. Few sequences need many chunks to fill the GPU; of many, only
those that are much longer than the others are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # keys that a program reads at a time; chunks are multiples of it
GROUP_ROWS = 16  # rows of the smallest matrix instruction: query heads and tokens of a program, padded
FP8_AIM = 4
"""Programs that a multiprocessor has at once over 8-bit floats. One takes longer to widen a tile than the memory to
bring it, and waits in between: several do both at a time."""
FP8_LEAST_TOKENS = 128
"""Of a chunk, where there are so many programs that what each begins with counts."""
MERGED_ELEMENTS = 4096
"""Of parts that a program reads at a time as it merges them: 32 registers a thread."""
FEWEST_MERGED, MOST_MERGED = 2, 16
MERGE_COST = 4
"""Tiles that a program computes in the time in which it merges parts once; the one that ends last merges those of all.
Measured: 2 is as fast in bf16, and slower with FP8."""
ALONE = 4
"""With fewer programs a multiprocessor, where chunks are fixed, each token of a sequence reads alone: there is room for
all at once, and one program would merge the parts of several tokens one after the other."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What can be said of a step before its sequences are known: how many chunks it has at most, and how large.

    chunk_tokens 0: chunks of nearly one size, `splits` a sequence in the mean, none of less than `least_tokens`, and
    no more than can be merged soon. A sequence that is longer than the mean has more of them and a shorter one fewer,
    down to one. Else chunk i begins at token i * chunk_tokens.
    """

    num_chunks: int
    """Places for chunks, used or not."""
    num_stages: int
    """Of the pipeline, the block table's load included: 3, 5, 7, 9 keep 1 to 4 tiles of keys and values in flight."""
    splits: int = 1
    chunk_tokens: int = 0
    least_tokens: int = TILE
    queries: int = 1
    """Tokens of a sequence that read its keys and values together at most: the last and the drafts behind it."""
    merged: int = 0
    """Parts that a program merges at a time, which bounds how many a sequence has; 0: no bound, and what the kernel has
    by default."""

    @property
    def num_parts(self) -> int:
        """Places for what programs leave of a key head, one a chunk and query. Where chunks are fixed, the places for
        chunks of the queries' rows are enough."""
        return self.num_chunks if self.chunk_tokens else self.num_chunks * self.queries


def queries_of(group: int) -> int:
    """Tokens that fill a program's rows, where `group` query heads share a key head."""
    return max(1, GROUP_ROWS // group)


def merged_parts(elements: int, splits: int = 1) -> int:
    """Parts that a program merges at a time, of so many numbers each; twice as many where sequences have more. (Over
    8-bit floats that would take the registers of a multiprocessor's fourth program.)"""
    few, many = (
        max(FEWEST_MERGED, min(MOST_MERGED, room // elements)) for room in (MERGED_ELEMENTS, 2 * MERGED_ELEMENTS)
    )
    return few if splits <= few else many


def split_plan(
    num_rows: int, kv_heads: int, num_sms: int, aim: int = 1, queries: int = 1, elements: int = 0
) -> DecodePlan:
    """The fast plan for up to num_rows sequences of any length.

    As many chunks as multiprocessors, or whole sequences where these are more: the optima measured in whole steps
    (docs/benchmarks/kernels.md). To cut them further, so that the last wave is full, costs more than it gives. `aim`
    times as many of 8-bit floats. elements: of a part, that of the query heads of a key head, both their number
    and their size rounded up to powers of two; 0: of a kernel that merges in another way.
    """
    programs = num_rows * kv_heads
    splits = max(1, aim * num_sms // programs)
    stages = _stages(programs * splits, num_sms, aim)
    least_tokens = FP8_LEAST_TOKENS if aim > 1 else TILE
    merged = merged_parts(elements, 1 if aim > 1 else splits) if elements else 0
    return DecodePlan(
        (splits + 1) * num_rows, stages, splits, least_tokens=least_tokens, queries=queries, merged=merged
    )


def fixed_plan(
    num_rows: int,
    kv_heads: int,
    max_tokens: int,
    num_sms: int,
    chunk_tokens: int = 512,
    aim: int = 1,
    queries: int = 1,
) -> DecodePlan:
    """The plan whose results do not depend on the batch: chunks of one size, whatever the rows and their lengths.

    Only how many tiles are in flight depends on the rows, and no sum depends on that (checked bit for bit on an H200).
    """
    if chunk_tokens % TILE:
        raise ValueError(f"chunk_tokens {chunk_tokens} is not a multiple of {TILE}")
    num_chunks = num_rows * -(-max_tokens // chunk_tokens)
    programs = num_chunks * kv_heads
    together = 1 if programs < ALONE * num_sms else queries
    return DecodePlan(num_chunks, _stages(programs, num_sms, aim), chunk_tokens=chunk_tokens, queries=together)


def _stages(programs: int, num_sms: int, aim: int) -> int:
    """So deep that a multiprocessor holds as many programs as each has to, and no more: programs that start early,
    while kernels before them still run, would crowd on some while others stay empty. With heads of 256 bytes it holds
    one program of depth 9, two of 7, three of 5, five of 3. Four are held two at a time, so that those of unequal
    sequences even out; of still more, many at a time do. With heads of 128 bytes it holds two of 13, three of 9, and
    four of 7.
    """
    held = -(-programs // num_sms)
    return {1: 17, 2: 13, 3: 9}.get(held, 7) if aim > 1 else {1: 9, 2: 7, 3: 5, 4: 7}.get(held, 3)
