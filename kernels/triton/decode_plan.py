"""How decode attention cuts sequences into chunks that run side by side. Pure arithmetic.

A chunk of one sequence and one key head is one program. Few sequences need many chunks to fill the GPU; many need none.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # keys that a program reads at a time; chunks are multiples of it
SINGLE_WAVE = 4  # programs a multiprocessor holds at most
LONG, MOST_SPLITS, LONG_STAGES = 8192, 32, 3  # for few sequences of more tokens
FULL = 0.9  # a plan that fills this share of the places is taken before one that needs more programs


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """num_splits * chunk_tokens is at least the longest sequence; chunk i begins at token i * chunk_tokens.

    even: each sequence is cut into num_splits chunks of its own size; chunk_tokens is the largest that one can have.
    """

    num_splits: int
    chunk_tokens: int
    num_stages: int
    """Of the pipeline, the block table's load included: 3, 5, 7 keep 1, 2, 3 tiles of keys and values in flight."""
    merges: bool
    """Whether programs leave partial results that the last of a sequence merges."""
    even: bool = False


def split_plan(num_rows: int, kv_heads: int, max_tokens: int, num_sms: int) -> DecodePlan:
    """The fast plan for num_rows sequences of up to max_tokens: all programs resident at once, and the GPU nearly full.

    Take max_tokens as the top of a bucket: one token past num_splits * chunk_tokens would not be seen. Follows the
    optima measured (docs/benchmarks/kernels.md): from about 32 rows of 8 heads on no split; up to 16 rows beyond 8k
    tokens four programs a multiprocessor, but no more chunks than 32 a sequence where two programs a multiprocessor are
    no more; one program alone on its multiprocessor needs the deepest pipeline.
    """
    programs = num_rows * kv_heads
    num_splits = 1
    if programs <= SINGLE_WAVE * num_sms:
        waves = [wave for wave in range(1, SINGLE_WAVE + 1) if wave * num_sms >= programs]
        shares = {wave: wave * num_sms // programs * programs / (wave * num_sms) for wave in waves}
        best = next((wave for wave in waves if shares[wave] >= FULL), max(waves, key=shares.__getitem__))
        num_splits = best * num_sms // programs
    long = max_tokens > LONG and programs <= num_sms
    if long:
        num_splits = min(max(MOST_SPLITS, 2 * num_sms // programs), SINGLE_WAVE * num_sms // programs)
    chunk = max(TILE, -(-max_tokens // num_splits // TILE) * TILE)
    num_splits = -(-max_tokens // chunk)
    stages = LONG_STAGES if long and programs * num_splits > num_sms else _stages(programs * num_splits, chunk, num_sms)
    return DecodePlan(num_splits, chunk, stages, merges=num_splits > 1)


def even_plan(num_rows: int, kv_heads: int, max_tokens: int, num_sms: int) -> DecodePlan:
    """A fast plan that may be taken for any lengths up to max_tokens: short sequences get short chunks.

    As many chunks as `split_plan` makes for the longest, so that one captured graph serves all lengths of a bucket.
    """
    plan = split_plan(num_rows, kv_heads, max_tokens, num_sms)
    stages = min(plan.num_stages, 1 + 2 * (plan.chunk_tokens // TILE)) if plan.merges else plan.num_stages
    return DecodePlan(plan.num_splits, plan.chunk_tokens, stages, plan.merges, even=plan.merges)


def fixed_plan(num_rows: int, kv_heads: int, max_tokens: int, num_sms: int, chunk_tokens: int = 512) -> DecodePlan:
    """The plan whose results do not depend on the batch: chunks of one size, whatever the rows and their lengths.

    Only how many tiles are in flight depends on the rows, and no sum depends on that (checked bit for bit on an H200).
    """
    if chunk_tokens % TILE:
        raise ValueError(f"chunk_tokens {chunk_tokens} is not a multiple of {TILE}")
    num_splits = -(-max_tokens // chunk_tokens)
    stages = _stages(num_rows * kv_heads * num_splits, chunk_tokens, num_sms)
    return DecodePlan(num_splits, chunk_tokens, stages, merges=True)


def _stages(programs: int, chunk_tokens: int, num_sms: int) -> int:
    """The deepest pipeline with which all programs of a multiprocessor fit on it."""
    return 3 if chunk_tokens == TILE else {1: 7, 2: 5}.get(-(-programs // num_sms), 3)
